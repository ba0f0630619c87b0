"""A module that is a program, and ends."""

raise SystemExit(2)
