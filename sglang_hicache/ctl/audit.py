"""`audit`: who did what, from the server's audit log, and whether anybody has changed the log.

Reads a file, and asks no server: whoever looks into what happened may have nothing else left.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from pathlib import Path
from typing import Any

from sglang_hicache import audit_chain
from sglang_hicache.ctl.access import add_command
from sglang_hicache.ctl.console import Console
from sglang_hicache.ctl.exits import Exit
from sglang_hicache.ctl.tables import Screen, moment, printable
from sglang_hicache.errors import UserError

#: Of an entry, below its first line.
_DETAILS = ("asked", "before", "after", "message")


def add_commands(commands: Any) -> None:
    """A group of two."""
    group = add_command(commands, "audit", None, "the server's audit log: is it whole, and who did what")
    actions = group.add_subparsers(title="actions", required=True, metavar="verify | show")
    verify = add_command(actions, "verify", run_verify, "find lines that were changed, removed or cut off at the end")
    verify.add_argument(
        "--expect", metavar="HEAD",
        help="head that the server told earlier, in its own log or to `status`; without it, lines that were cut off at "
        "the end are not missed",
    )  # fmt: skip
    show = add_command(actions, "show", run_show, "the latest entries as they are; times are UTC")
    show.add_argument("--last", type=_count, default=20, metavar="N", help="default: 20")
    for parser in (verify, show):
        parser.add_argument("file", type=Path, metavar="FILE", help="the log; its key is read from FILE.key")


def run_verify(args: argparse.Namespace, console: Console) -> Exit:
    """What is wrong with the log, line by line."""
    complaints = audit_chain.verify(str(args.file), args.expect)
    if complaints:
        return console.ended(Exit.REFUSED, "\n".join(complaints), complaints=complaints)
    beyond = "" if args.expect else "; without --expect nobody can tell whether lines are missing at its end"
    return console.ended(Exit.OK, f"{args.file} is whole{beyond}", complaints=[])


def run_show(args: argparse.Namespace, console: Console) -> Exit:
    """The latest entries."""
    try:
        lines = deque(audit_chain.lines_of(str(args.file)), args.last)
    except OSError as error:
        raise UserError(f"{args.file} cannot be read: {error.strerror}") from error
    entries = [_entry(line.decode(errors="replace")) for line in lines]
    if console.is_json:
        console.json(entries)
    else:
        for entry in entries:
            _show(entry, console.screen)
    return Exit.OK


def _entry(line: str) -> dict[str, Any]:
    """One line; what is no entry is shown and not left out."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    return entry if isinstance(entry, dict) else {"event": "no entry", "message": line.rstrip("\n")}


def _show(entry: dict[str, Any], screen: Screen) -> None:
    """One line for what was done and by whom, and the details below, which may be long."""
    who = _record(entry.get("who"))
    head = [entry.get("number", "?"), moment(str(entry.get("time", ""))), entry.get("event"), entry.get("what")]
    by = f"key {who.get('key')}" + (f", {who['address']}" if who.get("address") else "")
    done = [" ".join(str(part) for part in head if part), *filter(None, (entry.get("outcome"), who and by))]
    screen.line(", ".join(map(printable, done)))
    for name in _DETAILS:
        if entry.get(name) not in (None, "", {}, []):
            screen.sentence(_details(entry[name]), indent="    ", first=f"{name}: ")


def _details(value: Any) -> str:
    """`backend file, extra_config {...}`."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items() if item is not None)
    return str(value)


def _record(value: Any) -> dict[str, Any]:
    """Somebody may have changed the line, and the rest of it is what is looked for."""
    return value if isinstance(value, dict) else {}


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of lines, 1 or more")
    return int(text)
