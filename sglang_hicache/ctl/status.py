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
from sglang_hicache.words import counted

#: Incidents on the screen.
_LATEST = 3

_RANK_HEADINGS = (
    "rank", "state", "backend", "epoch", "in flight", "backups waiting", "quarantined pages", "requests", "last error",
)  # fmt: skip
#: State of a rank that did not answer in time: nothing else is known of it.
_SILENT = "unknown"

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
    return [incident for incident in found if not _is_nothing(incident)][-_LATEST:]


def _is_nothing(incident: dict[str, Any]) -> bool:
    """Every start without storage at once is one in the list of `incidents`, and most meet no request."""
    return incident["kind"] == "cold_start" and incident["ended"] is not None and not incident["requests"]


def _show(status: dict[str, Any], incidents: list[dict[str, Any]], url: str, screen: Screen) -> None:
    ranks = status["ranks"]
    screen.lines(_head(status, url, screen))
    screen.line()
    screen.lines(table(_RANK_HEADINGS, map(_rank_row, ranks)))
    places = [(rank["rank"], place) for rank in ranks for place in rank.get("places", [])]
    if any(place["role"] != "current" for _, place in places):
        screen.heading("attachments: a change is under way")
        screen.lines(table(_PLACE_HEADINGS, (_place_row(rank, place) for rank, place in places)))
    if status["operation"]:
        screen.heading("running operations")
        screen.lines(operation_table(status["operation"]))
    screen.heading("why")
    for sentence in status["why"]:
        screen.sentence(sentence)
    _show_errors(status, screen)
    if incidents:
        screen.heading("latest incidents")
        screen.lines(incident_table(incidents))


def _head(status: dict[str, Any], url: str, screen: Screen) -> Iterator[str]:
    """What is attached, in few lines, each with its name in front."""
    backend = status["hicache_storage_backend"]
    yield f"server    {printable(url)}, {counted(len(status['ranks']), 'rank')}"
    yield f"storage   {', '.join(_storage(status, screen))}"
    if backend:
        yield f"config    {printable(status['hicache_storage_backend_extra_config'])}"
    prefetch, write = status["hicache_storage_prefetch_policy"] or "-", status["hicache_write_policy"] or "-"
    yield f"policies  prefetch {prefetch}, write {write}"
    yield f"at start  {_startup(status, screen)}"
    yield f"breaker   {_breaker(status['breaker'], screen)}"
    if status["audit"]:
        yield f"audit     head {printable(status['audit']['head'])}"
    for complaint in _complaints(status):
        yield f"{screen.bad('trouble')}   {printable(complaint)}"


def _storage(status: dict[str, Any], screen: Screen) -> Iterator[str]:
    """State, backend and epoch, as far as the ranks agree, and who says nothing."""
    talking = [rank for rank in status["ranks"] if rank["state"] != _SILENT]
    states = {rank["state"] for rank in talking}
    state = states.pop() if len(states) == 1 else "ranks differ" if states else "unknown"
    paint = {"attached": screen.good, "detached": screen.bad, "failed": screen.bad}.get(state, screen.doubtful)
    yield paint(state)
    if status["hicache_storage_backend"]:
        yield printable(status["hicache_storage_backend"])
    if epochs := sorted({rank["epoch"] for rank in talking}):
        yield f"epoch {' and '.join(map(str, epochs))}"
    if silent := [str(rank["rank"]) for rank in status["ranks"] if rank["state"] == _SILENT]:
        yield screen.bad(f"rank {', '.join(silent)} silent")


def _startup(status: dict[str, Any], screen: Screen) -> str:
    """What the server was told to attach when it started, where that is not what is attached now."""
    started = status["startup"]
    backend, config = started["backend"], started["extra_config"]
    live = status["hicache_storage_backend"], _parsed(status["hicache_storage_backend_extra_config"])
    policies = status["hicache_storage_prefetch_policy"], status["hicache_write_policy"]
    parts = []
    if (backend, _parsed(config)) != live:
        wanted = f"{printable(backend)} {printable(config or '{}')}" if backend else "no storage"
        parts.append(f"{screen.doubtful('not what is live')}: {wanted}")
    if None not in policies and (started["prefetch_policy"], started["write_policy"]) != policies:
        parts.append(f"policies: prefetch {started['prefetch_policy']}, write {started['write_policy']}")
    return f"{'; '.join(parts) or 'the same'} ({started['source']})"


def _parsed(config: str | None) -> Any:
    """What can be compared: two texts of the same config may differ in blanks."""
    try:
        return json.loads(config or "{}")
    except ValueError:
        return config


def _complaints(status: dict[str, Any]) -> Iterator[str]:
    """What an operator relies on and what does not work, beside the storage itself."""
    started = status["startup"]
    if started["warning"]:
        yield started["warning"]
    # What has been attached since makes it a matter of the past.
    if started["outcome"] not in (None, "succeeded", "running") and not status["hicache_storage_backend"]:
        yield f"the attach at start: {started['outcome']}: {started['message']}"
    for name in ("audit", "state_file"):
        if status[name] and status[name]["error"]:
            yield f"{name.replace('_', ' ')}: {status[name]['error']}"


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
    parts += [counted(breaker[f"{what}s"], what) for what in ("trip", "failover", "failback") if breaker[f"{what}s"]]
    return ", ".join(parts)


def _rank_row(rank: dict[str, Any]) -> list[Any]:
    if rank["state"] == _SILENT:
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


def _show_errors(status: dict[str, Any], screen: Screen) -> None:
    """Each error once, with the ranks that have it, how old it is, and where to read on."""
    ranks, breaker = status["ranks"], status["breaker"]
    said: dict[str, list[dict[str, Any]]] = {}
    for rank in ranks:
        if rank["last_error"] and rank["state"] != _SILENT:
            said.setdefault(rank["last_error"], []).append(rank)
    told = {error: _who(by, ranks) for error, by in said.items()}
    if breaker and breaker["reason"]:
        told.setdefault(breaker["reason"], "the breaker, when it opened last")
    if told:
        screen.heading("last error")
    for error, who in told.items():
        screen.sentence(f"{who}: {error}")
        if page := runbook(error):
            screen.line(f"    what to do: {page}")


def _who(some: list[dict[str, Any]], ranks: list[dict[str, Any]]) -> str:
    """Ranks with the same error, and when the latest of them met it."""
    names = "all ranks" if len(some) == len(ranks) else f"rank {', '.join(str(rank['rank']) for rank in some)}"
    return f"{names}, {age(min(rank['last_error_age_s'] for rank in some))} ago"
