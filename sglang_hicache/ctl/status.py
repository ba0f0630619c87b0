"""`status`: what somebody reads who was woken up.  One screen: is storage on, is it trusted, and if not, why not.

What is wrong comes with the page of its runbook.  Nothing is computed here but ages and agreement: every figure is
the server's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from sglang_hicache.ctl.access import add_command, client_of
from sglang_hicache.ctl.client import Client
from sglang_hicache.ctl.console import Console
from sglang_hicache.ctl.exits import Exit, Refused, Unreachable
from sglang_hicache.ctl.incidents import incident_table
from sglang_hicache.ctl.operations import operation_table
from sglang_hicache.ctl.runbook import runbook
from sglang_hicache.ctl.tables import Screen, age, amounts, printable, table

#: Incidents on the screen.
_LATEST = 3

_RANK_HEADINGS = (
    "rank", "state", "backend", "epoch", "in flight", "backups waiting", "quarantined pages", "requests", "last error",
)  # fmt: skip
_PLACE_HEADINGS = ("rank", "place", "state", "backend", "epoch", "in flight")


def add_commands(commands: Any) -> None:
    """One."""
    add_command(commands, "status", run_status, "what is attached, whether it is well, and why not")


def run_status(args: argparse.Namespace, console: Console) -> Exit:
    """GET /hicache/storage-backend, and the latest incidents."""
    client = client_of(args)
    status = client.ask("/hicache/storage-backend")
    if console.is_json:
        console.json(status)
        return Exit.OK
    _show(status, _incidents(client), client.url, console.screen)
    return Exit.OK


def _incidents(client: Client) -> list[dict[str, Any]]:
    """The latest; the rest of the screen must not wait for a server that cannot tell them."""
    try:
        found: list[dict[str, Any]] = client.ask("/hicache/incidents")["incidents"]
    except (Refused, Unreachable):
        return []
    return found[-_LATEST:]


def _show(status: dict[str, Any], incidents: list[dict[str, Any]], url: str, screen: Screen) -> None:
    ranks = status["ranks"]
    screen.lines(_head(status, url, screen))
    screen.line()
    screen.lines(table(_RANK_HEADINGS, map(_rank_row, ranks)))
    places = [(rank["rank"], place) for rank in ranks for place in rank.get("places", [])]
    if any(place["role"] != "current" for _, place in places):
        screen.heading("attachments (a change is under way)")
        screen.lines(table(_PLACE_HEADINGS, (_place_row(rank, place) for rank, place in places)))
    if status["operation"]:
        screen.heading("running operations")
        screen.lines(operation_table(status["operation"]))
    screen.heading("why")
    for sentence in status["why"]:
        screen.sentence(sentence)
    _show_errors(ranks, screen)
    if incidents:
        screen.heading("latest incidents")
        screen.lines(incident_table(incidents))


def _head(status: dict[str, Any], url: str, screen: Screen) -> Iterator[str]:
    """What is attached, in few lines, each with its name in front."""
    ranks = status["ranks"]
    states = {rank["state"] for rank in ranks}
    state = states.pop() if len(states) == 1 else "ranks differ"
    paint = {"attached": screen.good, "detached": screen.bad, "failed": screen.bad}.get(state, screen.doubtful)
    epochs = sorted({rank["epoch"] for rank in ranks if rank["epoch"] is not None})
    backend = status["hicache_storage_backend"]
    yield f"server    {printable(url)}, {len(ranks)} rank{'s' if len(ranks) > 1 else ''}"
    yield f"storage   {paint(state)}" + (f", {printable(backend)}" if backend else "") + _epochs(epochs)
    if backend:
        yield f"config    {printable(status['hicache_storage_backend_extra_config'])}"
    yield f"policies  prefetch {status['hicache_storage_prefetch_policy']}, write {status['hicache_write_policy']}"
    yield f"at start  {_startup(status, screen)}"
    yield f"breaker   {_breaker(status['breaker'], screen)}"
    if status["audit_head"]:
        yield f"audit     head {printable(status['audit_head'])}"


def _epochs(epochs: list[int]) -> str:
    if not epochs:
        return ""
    return f", epoch {epochs[0]}" if len(epochs) == 1 else f", epochs {', '.join(map(str, epochs))}"


def _startup(status: dict[str, Any], screen: Screen) -> str:
    """What the server would attach if it were started again, where that is not what is attached now."""
    startup = status["startup"]
    then = (startup["backend"], _parsed(startup["extra_config"]))
    now = (status["hicache_storage_backend"], _parsed(status["hicache_storage_backend_extra_config"]))
    if then == now:
        return "the same"
    wanted = f"{printable(then[0])} {printable(startup['extra_config'] or '{}')}" if then[0] else "no storage"
    return f"{screen.doubtful('not what is live')}: {wanted}"


def _parsed(extra_config: str | None) -> Any:
    """Two texts of the same config may differ in blanks."""
    try:
        return json.loads(extra_config or "{}")
    except ValueError:
        return extra_config


def _breaker(breaker: dict[str, Any] | None, screen: Screen) -> str:
    """Whether the server trusts the storage, and what it does next by itself."""
    if breaker is None or breaker["state"] == "off":
        return f"off (fault tolerance {breaker['level'] if breaker else 'unknown'})"
    state = breaker["state"].replace("_", " ")
    paint = {"closed": screen.good, "open": screen.bad}.get(breaker["state"], screen.doubtful)
    parts = [f"{paint(state)} for {age(breaker['in_state_s'])}, level {breaker['level']}"]
    if breaker["serving"]:
        parts.append(f"{printable(breaker['serving'])} serves")
    if breaker["next_try_s"] is not None:
        parts.append(f"next try in {age(breaker['next_try_s'])}")
    counts = ((breaker["trips"], "trips"), (breaker["failovers"], "failovers"), (breaker["failbacks"], "failbacks"))
    parts += [f"{count} {what}" for count, what in counts if count]
    if breaker["reason"]:
        parts.append(f"last opened because: {printable(breaker['reason'])}")
    return ", ".join(parts)


def _rank_row(rank: dict[str, Any]) -> list[Any]:
    if rank["state"] == "unknown":
        return [rank["rank"], "silent"]
    load = rank["load"]
    requests = f"{load.get('running-req', 0)} run, {load.get('queue-req', 0)} wait"
    error = f"{age(rank['last_error_age_s'])} ago, below" if rank["last_error"] else None
    return [
        rank["rank"], rank["state"], rank["backend"], rank["epoch"], amounts(rank["in_flight"]),
        rank["queued_backups"], rank["quarantined_pages"], requests, error,
    ]  # fmt: skip


def _place_row(rank: int, place: dict[str, Any]) -> list[Any]:
    return [rank, place["role"], place["state"], place["backend"], place["epoch"], place["in_flight"]]


def _show_errors(ranks: list[dict[str, Any]], screen: Screen) -> None:
    """Each error once, with the ranks that have it, how old it is, and where to read on."""
    said: dict[str, list[dict[str, Any]]] = {}
    for rank in ranks:
        if rank["last_error"] and rank["state"] != "unknown":
            said.setdefault(rank["last_error"], []).append(rank)
    if not said:
        return
    screen.heading("last error")
    for error, by in said.items():
        who = "all ranks" if len(by) == len(ranks) else f"rank {', '.join(str(rank['rank']) for rank in by)}"
        screen.sentence(f"{who}, {age(min(rank['last_error_age_s'] for rank in by))} ago: {error}")
        if page := runbook(error):
            screen.line(f"  what to do: {page}")
