"""`incidents`: what outages, refusals and cold starts of the storage have cost."""

from __future__ import annotations

import argparse
from typing import Any

from sglang_hicache.ctl.access import add_command, client_of
from sglang_hicache.ctl.console import Console
from sglang_hicache.ctl.exits import Exit
from sglang_hicache.ctl.tables import age, moment, table

_HEADINGS = ("number", "kind", "backend", "began, UTC", "lasted", "requests", "computed again", "took", "cause")


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
    lasted = age(incident["lasted_s"]) + ("" if incident["ended"] else " so far")
    # Where nobody knows what storage held, the most that it can have cost.
    known, most = incident["reprefilled_tokens"], incident["computed_tokens"]
    tokens = f"{known} tokens" if known or not most else f"at most {most} tokens"
    return [
        incident["number"], incident["kind"].replace("_", " "), incident["backend"], moment(incident["began"]), lasted,
        incident["requests"], tokens, age(incident["reprefill_s"] or None), incident["cause"],
    ]  # fmt: skip
