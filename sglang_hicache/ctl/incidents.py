"""`incidents`: what outages, refusals and cold starts of the storage have cost."""

from __future__ import annotations

import argparse
from typing import Any

from sglang_hicache.ctl.access import add_command, client_of
from sglang_hicache.ctl.console import Console
from sglang_hicache.ctl.exits import Exit
from sglang_hicache.ctl.tables import age, table

_HEADINGS = ("number", "kind", "backend", "began", "lasted", "requests", "computed again", "took", "cause")


def add_commands(commands: Any) -> None:
    """One."""
    add_command(commands, "incidents", run_incidents, "what outages, refusals and cold starts have cost")


def run_incidents(args: argparse.Namespace, console: Console) -> Exit:
    """GET /hicache/incidents."""
    told = client_of(args).ask("/hicache/incidents")
    if console.is_json:
        console.json(told)
    elif told["incidents"]:
        console.screen.lines(incident_table(told["incidents"]))
    else:
        console.screen.line("no incident since the server started")
    return Exit.OK


def incident_table(incidents: list[dict[str, Any]]) -> list[str]:
    """Oldest first, as the server tells them: the latest stands where a terminal ends."""
    return table(_HEADINGS, map(_row, incidents))


def _row(incident: dict[str, Any]) -> list[Any]:
    began, ended = incident["began_s_ago"], incident["ended_s_ago"]
    lasted = f"{age(began)} so far" if ended is None else age(began - ended)
    # Where nobody knows what storage held, the most that it can have cost.
    cost = incident["reprefilled_tokens"]
    tokens = f"{cost} tokens" if cost else f"at most {incident['computed_tokens']} tokens"
    return [
        incident["number"], incident["kind"].replace("_", " "), incident["backend"], f"{age(began)} ago", lasted,
        incident["requests"], tokens, age(incident["reprefill_s"]), incident["cause"],
    ]  # fmt: skip
