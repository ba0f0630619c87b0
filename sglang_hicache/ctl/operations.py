"""`operations`: commands that run or have run, by id; and how this tool waits for one.

Every change that `change` begins is an operation of the server: it goes on whether somebody waits here or not.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from sglang_hicache.ctl.access import add_command, client_of
from sglang_hicache.ctl.client import Client
from sglang_hicache.ctl.console import Console
from sglang_hicache.ctl.exits import Exit, OutcomeUnknown, Refused, Unreachable
from sglang_hicache.ctl.runbook import runbook
from sglang_hicache.ctl.tables import age, moment, table

OPERATIONS = "/hicache/operations"

#: Seconds between two questions about an operation: short for the many that take no time, then longer.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5

#: Seconds after which somebody who waits is told what for.
_SILENCE_S = 2.0

#: Seconds for which a server that does not answer is asked again about an operation: it may be busy.
_PATIENCE_S = 60.0

#: Seconds for a cancel: the server gives it ten.
_CANCEL_S = 30.0

#: What the end of an operation is to a script.
_CODES = {"succeeded": Exit.OK, "unknown": Exit.UNKNOWN}

_HEADINGS = ("operation", "what", "state", "began, UTC", "took", "message")


def add_commands(commands: Any) -> None:
    """A group of four."""
    group = add_command(commands, "operations", run_list, "commands that run or have run")
    actions = group.add_subparsers(title="actions", metavar="list | show | wait | cancel")
    add_command(actions, "list", run_list, "all that the server remembers, the latest last (default)")
    for name, run, about in (
        ("show", run_show, "one, with the answer of each rank"),
        ("wait", run_wait, "wait for the end of one; the exit code says how it ended"),
        ("cancel", run_cancel, "give one up, as far as that can still be done"),
    ):
        add_command(actions, name, run, about).add_argument("id", metavar="ID")


def run_list(args: argparse.Namespace, console: Console) -> Exit:
    """GET /hicache/operations."""
    told = client_of(args).ask(OPERATIONS)
    if console.is_json:
        console.json(told)
    elif told["operations"]:
        # The server tells the newest first; on a terminal it stands where the prompt is.
        console.screen.lines(operation_table(reversed(told["operations"])))
    else:
        console.screen.line("no operation since the server started")
    return Exit.OK


def run_show(args: argparse.Namespace, console: Console) -> Exit:
    """GET /hicache/operations/ID."""
    operation = _ask(client_of(args), args.id)
    if console.is_json:
        console.json(operation)
        return Exit.OK
    console.screen.lines(operation_table([operation]))
    console.screen.line()
    rows = [(rank["rank"], "ok" if rank["success"] else "failed", rank["message"]) for rank in operation["ranks"]]
    console.screen.lines(table(("rank", "answer", "message"), rows))
    return Exit.OK


def run_wait(args: argparse.Namespace, console: Console) -> Exit:
    """Ask until it has ended."""
    client = client_of(args)
    _ask(client, args.id)  # an id that nobody knows is a mistake, and not an outcome that nobody knows
    return follow(client, args.id, console)


def run_cancel(args: argparse.Namespace, console: Console) -> Exit:
    """DELETE /hicache/operations/ID."""
    reply = client_of(args).command("DELETE", _path(args.id), timeout_s=_CANCEL_S)
    return console.ended(Exit.OK, reply.message, operation_id=args.id)


def follow(client: Client, operation_id: str, console: Console) -> Exit:
    """Wait for the end of an operation, and tell it."""
    try:
        operation = _end(client, operation_id, console)
    except KeyboardInterrupt:
        console.note(
            f"\noperation {operation_id} goes on in the server; see how it ends with: "
            f"hicachectl operations wait {operation_id}; give it up with: hicachectl operations cancel {operation_id}"
        )
        raise
    state, message = operation["state"], operation["message"]
    code = _CODES.get(state, Exit.REFUSED)
    words = f"{operation['kind'].replace('_', ' ')} {state} after {age(operation['took_s'])}: {message or 'no message'}"
    if code is not Exit.OK and (page := runbook(message or "")):
        words += f"\n  what to do: {page}"
    return console.ended(code, words, operation_id=operation_id, operation=operation)


def operation_table(operations: Iterable[dict[str, Any]]) -> list[str]:
    """One line each."""
    return table(_HEADINGS, map(_row, operations))


def _row(operation: dict[str, Any]) -> list[Any]:
    what = operation["kind"].replace("_", " ")
    details = [operation["target"], operation["backend"], operation["mode"] and f"({operation['mode']})"]
    return [
        operation["id"], " ".join([what, *filter(None, details)]), operation["state"], moment(operation["began"]),
        age(operation["took_s"]), operation["message"],
    ]  # fmt: skip


def _ask(client: Client, operation_id: str) -> dict[str, Any]:
    found = client.ask(_path(operation_id))
    if not isinstance(found, dict) or not {"state", "message", "kind", "took_s"} <= found.keys():
        raise Refused(f"what {client.url} tells of it is no operation; is --url that of a server?")
    return found


def _path(operation_id: str) -> str:
    return f"{OPERATIONS}/{quote(operation_id, safe='')}"


def _end(client: Client, operation_id: str, console: Console) -> dict[str, Any]:
    """The operation, once it no longer runs.

    There is no event to wait for across HTTP, so it is asked for again and again.  A server that is out of reach is
    asked for a while; after that, or if it was started anew and has forgotten the operation, the outcome is unknown.
    """
    pause, pause_s, heard_s = threading.Event(), _FIRST_PAUSE_S, time.monotonic()
    tell_s: float | None = heard_s + _SILENCE_S
    while True:
        if tell_s is not None and time.monotonic() >= tell_s:
            console.note(f"waiting for operation {operation_id}; Ctrl-C ends the waiting, not the operation")
            tell_s = None
        try:
            operation = _ask(client, operation_id)
            if operation["state"] != "running":
                return operation
            heard_s = time.monotonic()
        except (Refused, Unreachable) as error:
            if isinstance(error, Refused) or time.monotonic() - heard_s > _PATIENCE_S:
                raise OutcomeUnknown(f"{error}; how operation {operation_id} ended is not known") from error
        pause.wait(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
