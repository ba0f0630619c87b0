"""The stores of a scenario as the server is told them, and the faults in them.

A store that takes faults is attached inside the saboteur, with a control file in the drill's folder: the drill writes
into it, and every storage process of the store does what it says.  Of a server that is not the drill's own only the
store that is attached is known, and only where somebody has put a saboteur around it can anything be injected.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from sglang_hicache.ctl.drill.own_server import DrillError
from sglang_hicache.ctl.drill.scenario import (
    AttachStep,
    DryRunStep,
    FaultStep,
    HealStep,
    KillStep,
    RestartStep,
    Scenario,
    StoreTable,
    SwitchStep,
)
from sglang_hicache.errors import UserError
from sglang_hicache.observe import REDACTED, redacted
from sglang_hicache.storage.fault_control import read_faults, write_faults
from sglang_hicache.storage.faulty_settings import Fault
from sglang_hicache.storage.settings import COMMON_KEYS

_SABOTEUR = "faulty"


@dataclass(frozen=True, slots=True)
class Store:
    """One store."""

    name: str
    backend: str
    #: Extra config as it is sent.
    config: Mapping[str, Any]
    #: Where its faults are written; None: it takes none.
    control: Path | None = None

    def inject(self, faults: Mapping[str, Fault]) -> None:
        """These faults and no others, from now on."""
        if self.control is None:
            raise UserError(f"the store {self.name!r} takes no faults")
        try:
            write_faults(self.control, faults)
        except OSError as error:
            raise DrillError(f"the control file of {self.name!r} cannot be written: {error}") from error

    def heal(self) -> None:
        """No faults any more."""
        if self.control is not None:
            self.inject({})

    def is_attached(self, status: Mapping[str, Any]) -> bool:
        """Does the status of a server speak of this store?"""
        echo = status["hicache_storage_backend_extra_config"]
        return status["hicache_storage_backend"] == self.backend and _config(echo) == redacted(self.config)


def own_stores(tables: Mapping[str, StoreTable], folder: Path, names: Mapping[str, str]) -> dict[str, Store]:
    """The stores of a drill with its own server.  `names`: what stands for "{folder}" and the like in a config."""
    made: dict[str, Store] = {}
    # Standbys first: their configs are part of the others'.
    for name, table in sorted(tables.items(), key=lambda item: bool(item[1].standby)):
        config = filled_config(table.extra_config, names)
        if table.backend == "file":
            config.setdefault("file_storage_path", str(folder / f"pages-{name}"))
        backend, control = table.backend, None
        if table.sabotaged:
            control = folder / f"faults-{name}.json"
            write_faults(control, {})
            common = {key: config.pop(key) for key in COMMON_KEYS if key in config}
            backend, config = _SABOTEUR, common | {"inner": backend, "inner_config": config, "control": str(control)}
        if table.standby:
            config = with_standbys(config, [(made[other].backend, made[other].config) for other in table.standby])
        made[name] = Store(name, backend, config, control)
    return made


def foreign_stores(scenario: Scenario, status: Mapping[str, Any]) -> dict[str, Store]:
    """The stores of a drill with somebody else's server; `UserError` where the drill would need more than it may touch.

    Its first store is whatever is attached.  The others are sent as the scenario says.
    """
    live = _live_store(scenario, status)
    _check_foreign(scenario, live)
    stores = {name: Store(name, table.backend, table.extra_config) for name, table in scenario.stores.items()}
    return stores | ({live.name: live} if live is not None else {})


def _live_store(scenario: Scenario, status: Mapping[str, Any]) -> Store | None:
    name, backend = scenario.server.store, status["hicache_storage_backend"]
    if not name:
        return None
    if backend is None:
        raise UserError(f"the drill wants its store {name!r} to be attached at the start, and the server has none")
    controls = {rank.get("backend_info", {}).get("control") for rank in status["ranks"]}
    control = controls.pop() if backend == _SABOTEUR and len(controls) == 1 else None
    # A drill that injects nothing has nothing to take away either.
    is_used = control and any(isinstance(step, FaultStep | HealStep | KillStep) for step in scenario.timeline)
    config = _config(status["hicache_storage_backend_extra_config"])
    return Store(name, backend, config, Path(control) if is_used else None)


def _check_foreign(scenario: Scenario, live: Store | None) -> None:
    """Everything that could make it stop half-way is found now."""
    if scenario.programs or any(isinstance(step, RestartStep) for step in scenario.timeline):
        raise UserError("the drill starts programs, or its server again, and so needs its own server; leave out --url")
    for step in scenario.timeline:
        # A storage process of somebody else's server is ended by a fault: its id means nothing on this machine.
        if isinstance(step, FaultStep | HealStep | KillStep):
            _check_control(live if isinstance(step, KillStep) else _named(step.store, live), scenario)
        if isinstance(step, AttachStep | SwitchStep | DryRunStep):
            _check_config(step.store, scenario, live)


def _named(name: str, live: Store | None) -> Store | None:
    return live if live is not None and live.name == name else None


def _check_control(store: Store | None, scenario: Scenario) -> None:
    if store is None or store.control is None:
        raise UserError(
            "the drill injects faults, and the server was not started with a fault wrapper around the store that is "
            'attached: the backend "faulty" with "control" in its extra config, and SGLANG_HICACHE_ALLOW_FAULTY=1'
        )
    where = store.control
    if not os.access(where.parent, os.W_OK | os.X_OK) or (where.exists() and not os.access(where, os.R_OK | os.W_OK)):
        raise UserError(
            f"the control file {where} of {scenario.server.store!r} cannot be written from here; run the drill on the "
            "server's machine, as its user"
        )
    # The name comes from the server, and what is written replaces what is there.
    try:
        with contextlib.suppress(FileNotFoundError):
            read_faults(where)
    except (OSError, msgspec.DecodeError) as error:
        raise UserError(
            f"the server says that {where} is the control file of {scenario.server.store!r}, but it is none, and is "
            f"left as it is: {error}"
        ) from error


def _check_config(name: str, scenario: Scenario, live: Store | None) -> None:
    """Can this store be attached without anything that only the drill's own server has?"""
    if store := _named(name, live):
        if REDACTED in json.dumps(store.config):
            raise UserError(
                f"the drill attaches the store {name!r} again, and its extra config holds secrets that the server does "
                "not tell; run it with a store that needs none, or leave that step out"
            )
        return
    table = scenario.stores[name]
    if table.sabotaged or table.standby or (table.backend == "file" and "file_storage_path" not in table.extra_config):
        raise UserError(
            f"the drill attaches the store {name!r}, which exists on the drill's own server only; leave out --url, or "
            "give the store a complete extra config, without `sabotaged` and `standby`"
        )


def with_standbys(config: Mapping[str, Any], standbys: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """An extra config whose fault tolerance has these backends, with their configs, to fall back to."""
    entries = [{"backend": backend, "extra_config": extra_config} for backend, extra_config in standbys]
    return {**config, "fault_tolerance": {**config.get("fault_tolerance", {}), "standby": entries}}


def filled_config(value: Any, names: Mapping[str, str]) -> Any:
    """A copy with "{folder}" and the like replaced in every text."""
    if isinstance(value, dict):
        return {key: filled_config(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [filled_config(item, names) for item in value]
    return filled(value, names) if isinstance(value, str) else value


def filled(text: str, names: Mapping[str, str]) -> str:
    """The text with what stands for each name in it; other braces stay as they are."""
    for name, value in names.items():
        text = text.replace("{" + name + "}", value)
    return text


def _config(echo: str | None) -> dict[str, Any]:
    try:
        config = json.loads(echo or "{}")
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}
