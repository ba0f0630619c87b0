"""Which backends there are, what each may be told, and how one is made.

`names`, `spec` and `validate_extra_config` are pure and used in every process that judges an attach command; they
import no backend.  `create` is called in the storage process alone and imports the one backend that was asked for,
because the libraries behind a backend cost start-up time and may not even be installed.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sglang_hicache.errors import StorageError, UserError
from sglang_hicache.storage.backend import OpenContext, StorageBackend
from sglang_hicache.storage.composite_settings import MirrorSettings, TieredSettings
from sglang_hicache.storage.dynamic_settings import ALIASES, DynamicSettings
from sglang_hicache.storage.faulty_settings import FaultySettings
from sglang_hicache.storage.mooncake_settings import MooncakeSettings
from sglang_hicache.storage.redis_settings import RedisSettings
from sglang_hicache.storage.s3_settings import S3Settings
from sglang_hicache.storage.settings import (
    COMMON_KEYS,
    BackendSettings,
    FileSettings,
    MemorySettings,
    PrefetchSettings,
    split_extra_config,
    store_settings,
)

__all__ = [
    "BackendSpec", "create", "family", "late_io", "names", "plug_ins", "spec", "split_extra_config", "trial_blocking",
    "validate_extra_config",
]  # fmt: skip

#: A server started with this set to 1 can be attached to the saboteur.
ALLOW_FAULTY_ENV = "SGLANG_HICACHE_ALLOW_FAULTY"


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """Where a backend lives and what it may be told."""

    name: str
    module: str
    class_name: str
    settings: type[BackendSettings]
    #: What `pip install sglang-hicache[...]` must name for its libraries; "": it needs none.
    extra: str = ""
    #: Module with a `trial_blocking(settings, context)` of its own for dry runs; "": a dry run uses the store itself.
    trial_module: str = ""
    #: What the name itself says: keys that an extra config need not repeat, and may not say otherwise.
    preset: Mapping[str, Any] = field(default_factory=dict)
    #: Its class is told how a store inside is made anew, as one that did not open cannot be opened again.
    remakes: bool = False


_SPECS = {
    found.name: found
    for found in (
        BackendSpec(
            "file", "sglang_hicache.storage.file", "FileBackend", FileSettings,
            trial_module="sglang_hicache.storage.file_trial",
        ),
        BackendSpec("memory", "sglang_hicache.storage.memory", "MemoryBackend", MemorySettings),
        BackendSpec("dynamic", "sglang_hicache.storage.dynamic", "DynamicBackend", DynamicSettings),
        BackendSpec(
            "mooncake", "sglang_hicache.storage.mooncake", "MooncakeBackend", MooncakeSettings, extra="mooncake"
        ),
        BackendSpec("redis", "sglang_hicache.storage.redis", "RedisBackend", RedisSettings, extra="redis"),
        BackendSpec("s3", "sglang_hicache.storage.s3", "S3Backend", S3Settings, extra="s3"),
        BackendSpec("tiered", "sglang_hicache.storage.tiered", "TieredBackend", TieredSettings, remakes=True),
        BackendSpec("mirror", "sglang_hicache.storage.mirror", "MirrorBackend", MirrorSettings, remakes=True),
        BackendSpec("faulty", "sglang_hicache.storage.faulty", "FaultyBackend", FaultySettings),
    )
}

#: Names of plug-ins: each is `dynamic` with a class that is known.
_ALIASES = {
    name: BackendSpec(
        name, _SPECS["dynamic"].module, _SPECS["dynamic"].class_name, DynamicSettings, preset=alias.preset(name)
    )
    for name, alias in ALIASES.items()
}


def names() -> list[str]:
    """Backends that may be attached here; plug-ins that have a name of their own are no further backends."""
    return [name for name in _SPECS if name != "faulty" or os.environ.get(ALLOW_FAULTY_ENV) == "1"]


def spec(name: str) -> BackendSpec:
    """The entry of one backend."""
    if name in _ALIASES:
        return _ALIASES[name]
    if name not in names():
        raise UserError(
            f"unknown storage backend {name!r}; choose one of: {', '.join(names())}; or a plug-in of SGLang: "
            f"{', '.join(_ALIASES)}"
        )
    return _SPECS[name]


def family(name: str) -> str:
    """The one of `names` that this one is, for whoever counts by backend."""
    return "dynamic" if name in _ALIASES else name


def validate_extra_config(name: str, text: str | None) -> tuple[PrefetchSettings, BackendSettings]:
    """Check an extra config without touching anything: the controller's part and the backend's part."""
    prefetch, config = split_extra_config(text)
    settings = _convert(spec(name), config)
    for number, standby in enumerate(store_settings(text).fault_tolerance.standby, start=1):
        try:
            validate_extra_config(standby.backend, standby.extra_config_json())
        except UserError as error:
            raise UserError(f"extra config fault_tolerance, standby {number}: {error}") from error
    return prefetch, settings


def plug_ins(name: str, text: str | None) -> list[str]:
    """Classes that this config would have loaded, as "module:Class": its own, those of stores inside it, and those of
    its standbys.  None of them is touched."""
    found = _plug_ins(validate_extra_config(name, text)[1])
    for standby in store_settings(text).fault_tolerance.standby:
        found += plug_ins(standby.backend, standby.extra_config_json())
    return found


def _plug_ins(settings: BackendSettings) -> list[str]:
    own = settings.plug_in()
    inside = [found for _, child in _children(settings) for found in _plug_ins(child)]
    return [own, *inside] if own else inside


def late_io(name: str, settings: BackendSettings) -> bool:
    """May host memory of this backend be written after its process died?  The rank must know it when the process can
    no longer be asked."""
    inside = [late_io(child, child_settings) for child, child_settings in _children(settings)]
    return settings.may_write_late() or any(inside)


def create(name: str, settings: BackendSettings, context: OpenContext) -> StorageBackend:
    """Make a backend, and those that it is made of; it is not open yet."""
    found = spec(name)
    backend_class, children = _class(found), _children(settings)
    inside = [create(child, child_settings, context) for child, child_settings in children]
    if found.remakes:
        return backend_class(settings, inside, lambda number: create(*children[number], context))
    return backend_class(settings, inside) if inside else backend_class(settings, context)


@contextlib.contextmanager
def trial_blocking(name: str, settings: BackendSettings, context: OpenContext) -> Iterator[StorageBackend]:
    """A backend for a dry run, not open yet: where it can it keeps out of the way of the pages that are there."""
    found = spec(name)
    children = _children(settings)
    if children:
        with contextlib.ExitStack() as stack:
            trials = [trial_blocking(child, child_settings, context) for child, child_settings in children]
            yield _class(found)(settings, [stack.enter_context(trial) for trial in trials])
    elif found.trial_module:
        module = importlib.import_module(found.trial_module)  # lazy door: as below
        with vars(module)["trial_blocking"](settings, context) as backend:
            yield backend
    else:
        yield create(name, settings, context)


def _children(settings: BackendSettings) -> list[tuple[str, BackendSettings]]:
    """Name and record of the backends inside."""
    return [(child.backend, _convert(spec(child.backend), child.config)) for child in settings.children()]


def _class(found: BackendSpec) -> Any:
    try:
        module = importlib.import_module(found.module)  # lazy door: only the chosen backend may cost start-up time
    except ModuleNotFoundError as error:
        if not found.extra:
            raise
        raise StorageError(
            f"the backend {found.name!r} needs the package {error.name!r}, which is not installed here: "
            f"pip install 'sglang-hicache[{found.extra}]'",
            "refused",
            "missing_library",
        ) from error
    except ImportError as error:
        if not found.extra:
            raise
        # The package is there, and something below it is not: a shared library of the system, most often.
        raise StorageError(
            f"the backend {found.name!r} is installed (sglang-hicache[{found.extra}]), but its library does not load "
            f"here: {error}",
            "refused",
            "missing_library",
        ) from error
    return vars(module)[found.class_name]


def _convert(found: BackendSpec, config: dict[str, Any]) -> BackendSettings:
    """The backend's record, or a UserError that names what is allowed."""
    rest = found.settings.REST
    allowed = [name for name in found.settings.__struct_fields__ if name != rest and name not in found.preset]
    takes = f"{found.name} takes {', '.join(allowed)}" if allowed else f"{found.name} takes no extra config"
    config = _with_preset(found, config)
    unknown = sorted(set(config) - set(allowed) - set(found.preset))
    if rest:
        takes += ", and keys of the plug-in itself"
        config = {rest: {name: config.pop(name) for name in unknown}} | config
    elif unknown:
        common = ", ".join(COMMON_KEYS)
        raise UserError(f"unknown extra config {', '.join(map(repr, unknown))}; {takes} (and every backend {common})")
    try:
        settings = msgspec.convert(config, found.settings)
    except msgspec.ValidationError as error:
        raise UserError(f"extra config of {found.name}: {error}; {takes}") from error
    for child in settings.children():
        if child.backend == found.name == "faulty":
            raise UserError("extra config inner='faulty' is not allowed; sabotage one real backend")
        try:
            _convert(spec(child.backend), child.config)
        except UserError as error:
            raise UserError(f"{child.label}: {error}" if child.label else str(error)) from error
    return settings


def _with_preset(found: BackendSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with what its backend's name says."""
    for name, value in found.preset.items():
        if config.get(name, value) != value:
            raise UserError(
                f"extra config {name}: the backend {found.name!r} stands for {value!r}; leave the key out, or use the "
                "backend 'dynamic'"
            )
    return {**config, **found.preset}
