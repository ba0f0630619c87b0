"""Reads scenario files.

Whoever writes one finds out here what is wrong with it, before a server is started or one that serves people is
touched: an unknown key, a store that does not exist, a fault that could never strike, an extra config that the server
would refuse.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from sglang_hicache.ctl.drill.scenario import (
    STORAGE,
    AttachStep,
    Condition,
    DryRunStep,
    FaultStep,
    HealStep,
    KillStep,
    Scenario,
    StartStep,
    SwitchStep,
    WaitStep,
    tag,
)
from sglang_hicache.ctl.drill.stores import filled_config, with_standbys
from sglang_hicache.errors import UserError
from sglang_hicache.storage import registry


def read(path: Path, *, is_short: bool) -> Scenario:
    """The scenario of a file; `UserError` says what is wrong with it and where."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the scenario {path} cannot be read: {error}") from error
    try:
        return parse(text, is_short=is_short)
    except UserError as error:
        raise UserError(f"the scenario {path}: {error}") from error


def parse(text: str, *, is_short: bool = False) -> Scenario:
    """The same for a text."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"it is not valid TOML: {error}") from error
    try:
        scenario = msgspec.convert(_shortened(tables, is_short), Scenario)
    except msgspec.ValidationError as error:
        raise UserError(f"{error}; docs/drills.md has every key") from error
    for problem in _problems(scenario):
        raise UserError(problem)
    return scenario


def _shortened(tables: dict[str, Any], is_short: bool) -> dict[str, Any]:
    """`[short]` laid over the tables that it names, and `short = {...}` over the step that holds it - or left out."""
    found = _without_short(tables, is_short)
    steps = found.get("timeline")
    if isinstance(steps, list):
        found["timeline"] = [_without_short(step, is_short) if isinstance(step, dict) else step for step in steps]
    return found


def _without_short(table: dict[str, Any], is_short: bool) -> dict[str, Any]:
    short = table.pop("short", {})
    if not isinstance(short, dict):
        raise UserError("`short` is not a table; it takes what changes in the short form, such as [short.load]")
    return _overlaid(table, short) if is_short else table


def _overlaid(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for name, value in above.items():
        old = both.get(name)
        both[name] = _overlaid(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def _problems(scenario: Scenario) -> Iterator[str]:
    """What no single table can know."""
    stores, programs = scenario.stores, scenario.programs
    for table, name in _stores_named(scenario):
        if name and name not in stores:
            yield f"{table}: there is no store {name!r}; [stores] has {', '.join(stores) or 'none'}"
    for name, store in stores.items():
        for other in store.standby:
            if other not in stores or stores[other].standby:
                yield f"stores.{name}: standby {other!r} is not a store of its own without standbys"
        yield from _config_problems(name, scenario)
    for number, step in enumerate(scenario.timeline, 1):
        where = f"step {number} ({tag(step)})"
        if isinstance(step, FaultStep | HealStep) and not stores[step.store].sabotaged:
            yield f"{where}: the store {step.store!r} takes no faults; give it `sabotaged = true`"
        if isinstance(step, KillStep) and step.what != STORAGE and step.what not in programs:
            yield f"{where}: there is no program {step.what!r}; it takes {STORAGE!r} or a name from [programs]"
        if isinstance(step, KillStep) and step.rank >= scenario.server.tp_size:
            yield f"{where}: there is no rank {step.rank}; tp_size is {scenario.server.tp_size}"
        if isinstance(step, StartStep) and step.program not in programs:
            yield f"{where}: there is no program {step.program!r}; [programs] has {', '.join(programs) or 'none'}"
        if isinstance(step, WaitStep) and step.until == Condition():
            yield f"{where}: `until` names nothing to wait for"


def _stores_named(scenario: Scenario) -> Iterator[tuple[str, str]]:
    """Where a store is called by its name."""
    yield "server", scenario.server.store
    yield "expect", scenario.expect.store or ""
    for number, step in enumerate(scenario.timeline, 1):
        where = f"step {number} ({tag(step)})"
        if isinstance(step, FaultStep | HealStep | AttachStep | SwitchStep | DryRunStep):
            yield where, step.store
        for condition in (step.after, step.until if isinstance(step, WaitStep) else step.after):
            if condition.status is not None and condition.status.store:
                yield where, condition.status.store


def _config_problems(name: str, scenario: Scenario) -> Iterator[str]:
    """The extra config, as the server would judge it; not that of a backend without which the drill is skipped."""
    store, known = scenario.stores[name], registry.names()
    if store.broken or (store.backend not in known and store.backend in scenario.needs.backends):
        return
    config = store.extra_config
    if store.standby:
        others = [scenario.stores[other] for other in store.standby]
        config = with_standbys(config, [(other.backend, other.extra_config) for other in others])
    # Where a form matters, as that of an address does, it is that of what will stand there.
    config = filled_config(config, {"folder": "/drill"} | {f"{program}.port": "1" for program in scenario.programs})
    try:
        registry.validate_extra_config(store.backend, msgspec.json.encode(config).decode())
    except UserError as error:
        yield f"stores.{name}: {error}"
