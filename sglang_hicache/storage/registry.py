"""Which backends there are, what each may be told, and how one is made.

`names`, `spec` and `validate_extra_config` are pure and used in every process that judges an attach command; they
import no backend.  `create` is called in the storage process alone and imports the one backend that was asked for,
because the libraries behind a backend cost start-up time and may not even be installed.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from sglang_hicache.errors import StorageError, UserError
from sglang_hicache.storage.backend import OpenContext, StorageBackend
from sglang_hicache.storage.faulty_settings import FaultySettings
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
    "BackendSpec", "create", "late_io", "names", "spec", "split_extra_config", "trial_blocking",
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


_SPECS = {
    found.name: found
    for found in (
        BackendSpec(
            "file", "sglang_hicache.storage.file", "FileBackend", FileSettings,
            trial_module="sglang_hicache.storage.file_trial",
        ),
        BackendSpec("memory", "sglang_hicache.storage.memory", "MemoryBackend", MemorySettings),
        BackendSpec("redis", "sglang_hicache.storage.redis", "RedisBackend", RedisSettings, extra="redis"),
        BackendSpec("s3", "sglang_hicache.storage.s3", "S3Backend", S3Settings, extra="s3"),
        BackendSpec("faulty", "sglang_hicache.storage.faulty", "FaultyBackend", FaultySettings),
    )
}


def names() -> list[str]:
    """Backends that may be attached here."""
    return [name for name in _SPECS if name != "faulty" or os.environ.get(ALLOW_FAULTY_ENV) == "1"]


def spec(name: str) -> BackendSpec:
    """The entry of one backend."""
    if name not in names():
        raise UserError(f"unknown storage backend {name!r}; choose one of: {', '.join(names())}")
    return _SPECS[name]


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


def late_io(name: str, settings: BackendSettings) -> bool:
    """May host memory of this backend be written after its process died?  The rank must know it when the process can
    no longer be asked."""
    inside = [late_io(child, child_settings) for child, child_settings in _children(settings)]
    return settings.may_write_late() or any(inside)


def create(name: str, settings: BackendSettings, context: OpenContext) -> StorageBackend:
    """Make a backend, and those that it is made of; it is not open yet."""
    backend_class = _class(spec(name))
    inside = [create(child, child_settings, context) for child, child_settings in _children(settings)]
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
    return vars(module)[found.class_name]


def _convert(found: BackendSpec, config: dict[str, Any]) -> BackendSettings:
    """The backend's record, or a UserError that names what is allowed."""
    allowed = found.settings.__struct_fields__
    takes = f"{found.name} takes {', '.join(allowed)}" if allowed else f"{found.name} takes no extra config"
    unknown = sorted(set(config) - set(allowed))
    if unknown:
        common = ", ".join(COMMON_KEYS)
        raise UserError(f"unknown extra config {', '.join(map(repr, unknown))}; {takes} (and every backend {common})")
    try:
        settings = msgspec.convert(config, found.settings)
    except msgspec.ValidationError as error:
        raise UserError(f"extra config of {found.name}: {error}; {takes}") from error
    for child in settings.children():
        if child.backend == found.name == "faulty":
            raise UserError("extra config inner='faulty' is not allowed; sabotage one real backend")
        _convert(spec(child.backend), child.config)
    return settings
