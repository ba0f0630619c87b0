"""`audit`: who did what, from the server's audit log, and whether anybody has changed the log.

Reads a file, and asks no server: whoever looks into what happened may have nothing else left.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from pathlib import Path
from typing import Any

from sglang_hicache import audit
from sglang_hicache.ctl.access import add_command
from sglang_hicache.ctl.console import Console
from sglang_hicache.ctl.exits import Exit
from sglang_hicache.ctl.tables import moment, table
from sglang_hicache.errors import UserError

_HEADINGS = ("entry", "time, UTC", "event", "key", "address", "what", "before", "after", "outcome", "message")


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
    show = add_command(actions, "show", run_show, "the latest entries, as they are: verify says whether they are true")
    show.add_argument("--last", type=_count, default=20, metavar="N", help="default: 20")
    for parser in (verify, show):
        parser.add_argument("file", type=Path, metavar="FILE", help="the log; its key is read from FILE.key")


def run_verify(args: argparse.Namespace, console: Console) -> Exit:
    """What is wrong with the log, line by line."""
    complaints = audit.verify(str(args.file), args.expect)
    if complaints:
        return console.ended(Exit.REFUSED, "\n".join(complaints), complaints=complaints)
    beyond = "" if args.expect else "; without --expect nobody can tell whether lines are missing at its end"
    return console.ended(Exit.OK, f"{args.file} is whole{beyond}", complaints=[])


def run_show(args: argparse.Namespace, console: Console) -> Exit:
    """The latest entries."""
    try:
        with args.file.open(encoding="utf-8", errors="replace") as file:
            lines = deque(file, args.last)
    except OSError as error:
        raise UserError(f"{args.file} cannot be read: {error.strerror}") from error
    entries = list(map(_entry, lines))
    if console.is_json:
        console.json(entries)
    else:
        console.screen.lines(table(_HEADINGS, map(_row, entries)))
    return Exit.OK


def _entry(line: str) -> dict[str, Any]:
    """One line; what is no entry is shown and not left out."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    return entry if isinstance(entry, dict) else {"event": "no entry", "message": line.rstrip("\n")}


def _row(entry: dict[str, Any]) -> list[Any]:
    who = _record(entry.get("who"))
    return [
        entry.get("number"), moment(str(entry.get("time", ""))), entry.get("event"), who.get("key"), who.get("address"),
        entry.get("what"), _state(entry.get("before")), _state(entry.get("after")), entry.get("outcome"),
        entry.get("message"),
    ]  # fmt: skip


def _state(told: Any) -> str:
    """What was attached, or which weights served."""
    state = _record(told)
    return " ".join(str(state[name]) for name in ("backend", "extra_config", "model_path") if name in state)


def _record(value: Any) -> dict[str, Any]:
    """Somebody may have changed the line, and the rest of it is what is looked for."""
    return value if isinstance(value, dict) else {}


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of lines, 1 or more")
    return int(text)
