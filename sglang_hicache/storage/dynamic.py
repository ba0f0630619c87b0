"""A backend around any class that was written for SGLang's `HiCacheStorage`: a plug-in.

Who owns what: this backend owns the staging pool and the plug-in object; the plug-in owns its store, its threads and
whatever it does in a slot of the pool.  It never gets to see the rank's host pool (`plugin_pool.py`).  A value is our
whole page, header included, so that what comes back is judged like a page of any other store.

A plug-in is told that it serves one rank of one whose keys and values are the same on all ranks
(`is_mla_model`).  For it that is so: our names say which heads a page holds.  Told the truth it would put the number of
the rank into its keys, and a rank that shares its heads with another one would never find what that one wrote; or it
would skip the writes of all ranks but the first.

The interface has no deletion.  A plug-in that can delete has a method `batch_delete`, `delete` or `remove`.  In any
other a page that is to go gets another key, the next one.  What lies under the old one is in nobody's way, and a page
that was damaged there can be written again, even where a plug-in keeps what it has.  Another process that meets the
damage takes the same step, and finds what the first one wrote.

Threads: as any backend; the slots of one direction are used by one call at a time.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from sglang_hicache.errors import StorageError
from sglang_hicache.observe import SharedCounters
from sglang_hicache.storage.backend import Capabilities, OpenContext, PageOutcome, PageResult, StorageBackend
from sglang_hicache.storage.dynamic_settings import DynamicSettings
from sglang_hicache.storage.object_name import DEFAULT_PREFIX, object_name
from sglang_hicache.storage.page_format import HEADER_BYTES, IncomingPage, OutgoingPage, PageName, parse_header
from sglang_hicache.storage.plugin_calls import Copies, Interface, NotWrittenError, PlugIn, Pools, Slots, careful
from sglang_hicache.storage.plugin_modules import class_blocking, interface_blocking
from sglang_hicache.storage.plugin_pool import StagingPool

_logger = logging.getLogger(__name__)

#: Methods that take pages away, as plug-ins call them.  The first takes a list of keys.
_DELETE_MANY, _DELETE_ONE = "batch_delete", ("delete", "remove")

#: Names that are remembered; beyond it the oldest is forgotten.
_MOST_NAMES = 65_536


class Names:
    """A number for each name, 0 if none was given; forgets the oldest.  Both lanes use it."""

    def __init__(self) -> None:
        self._numbers: dict[PageName, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._numbers)

    def get(self, name: PageName) -> int:
        return self._numbers.get(name, 0)

    def add(self, name: PageName, number: int = 1) -> None:
        """To the number that it has."""
        with self._lock:
            self._numbers[name] = self._numbers.get(name, 0) + number
            if len(self._numbers) > _MOST_NAMES:
                del self._numbers[next(iter(self._numbers))]

    def discard(self, name: PageName) -> None:
        with self._lock:
            self._numbers.pop(name, None)

    def clear(self) -> None:
        with self._lock:
            self._numbers.clear()


class DynamicBackend(StorageBackend):
    """One plug-in."""

    #: Nobody knows whether its pages outlive it.
    capabilities = Capabilities(durable=False)

    def __init__(self, settings: DynamicSettings, context: OpenContext) -> None:
        self._settings = settings
        self._context = context
        self._counters = SharedCounters()
        self._plug_in: PlugIn | None = None
        self._interface: Interface | None = None
        self._pool: StagingPool | None = None
        #: How often a page was to go and its key could not be had back; and pages that this process wrote.
        self._steps = Names()
        self._written = Names()
        self._reading, self._writing = threading.Lock(), threading.Lock()

    def __repr__(self) -> str:
        return f"<DynamicBackend {self._settings.plug_in()}>"

    # ---- open and close

    def open_blocking(self) -> None:
        settings = self._settings
        types = careful("the interface of SGLang cannot be imported", interface_blocking)
        plug_in_class = class_blocking(settings.module_path, settings.class_name, settings.backend_name)
        pool = self._pool = StagingPool(self._context.page_bytes)
        config = types.HiCacheStorageConfig(
            tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=True,
            enable_storage_metrics=False, is_page_first_layout=True, model_name=self._context.model_name,
            extra_config=settings.extra_config(),
        )  # fmt: skip
        instance = self._make(plug_in_class, config, pool)
        self._plug_in = PlugIn(instance, settings.plug_in(), self._counters)
        self._interface = self._choose(self._plug_in, pool, types)
        self._register(self._plug_in, types)

    def _make(self, plug_in_class: Any, config: Any, pool: StagingPool) -> Any:
        calls = {
            "config_kwargs": lambda: plug_in_class(config, dict(self._settings.rest)),
            "config": lambda: plug_in_class(config),
            "config_pool": lambda: plug_in_class(config, pool),
            "env_config": lambda: plug_in_class.from_env_config(pool.value_bytes, pool.dtype, config),
        }
        what = f"the plug-in {self._settings.plug_in()} cannot be made"
        try:
            return careful(what, calls[self._settings.constructor])
        except StorageError as error:
            raise StorageError(str(error), "refused") from error

    def _choose(self, plug_in: PlugIn, pool: StagingPool, types: ModuleType) -> Interface:
        settings = self._settings
        chosen = Pools if settings.interface_v2 else Slots if settings.interface_v1 else Copies
        lacks = [method for method in chosen.needs if not plug_in.has(method)]
        if lacks:
            raise StorageError(
                f"the plug-in {settings.plug_in()} has no {', '.join(lacks)}, which the interface {chosen.name} needs",
                "refused", "bad_config",
            )  # fmt: skip
        return chosen(plug_in, pool, types)

    def _register(self, plug_in: PlugIn, types: ModuleType) -> None:
        """In the order in which SGLang does it."""
        calls: list[tuple[str, tuple[Any, ...]]] = [("register_mem_pool_host", (self._pool,))]
        if self._settings.interface_v2:
            calls.append(("register_mem_host_pool_v2", (self._pool, types.PoolName.KV)))
        calls.append(("on_host_pools_registered", ()))
        for method, args in calls:
            if plug_in.has(method):
                plug_in.call(method, *args)

    def close_blocking(self) -> None:
        plug_in, self._plug_in, self._interface = self._plug_in, None, None
        try:
            if plug_in is not None and plug_in.has("close"):
                plug_in.call("close")
        except StorageError as error:
            _logger.warning("%s", error)
        finally:
            if self._pool is not None:
                self._pool.close()

    # ---- pages

    def exists_blocking(self, names: Sequence[PageName]) -> int:
        return self._ask(lambda interface: interface.count(self._keys(names))) if names else 0

    def read_blocking(self, pages: Sequence[IncomingPage]) -> list[PageOutcome]:
        outcomes: list[PageOutcome] = []
        with self._reading:
            for part in self._parts(pages):
                try:
                    outcomes += self._read(part)
                except StorageError as error:
                    return [*outcomes, error]
                if PageResult.MISS in outcomes:
                    break  # nobody uses a page behind a gap
        return outcomes

    def write_blocking(self, pages: Sequence[OutgoingPage]) -> list[PageOutcome]:
        outcomes: list[PageOutcome] = []
        with self._writing:
            for part in self._parts(pages):
                try:
                    outcomes += self._write(part)
                except StorageError as error:
                    return [*outcomes, error]
                if isinstance(outcomes[-1], StorageError):
                    break
        return outcomes

    def delete_blocking(self, names: Sequence[PageName]) -> int:
        there = [name for name in names if self.exists_blocking([name])]
        for name in there:
            self._delete(name)
            self._written.discard(name)
        return len(there)

    def clear_blocking(self, namespace: str) -> int:
        """All pages of all namespaces, if the operator has said that they are ours; how many this process knew of."""
        if not self._settings.clear_all:
            raise StorageError(
                "a plug-in can only forget everything, also what is not of this model or not of this server; "
                'if its store is ours alone, attach it with "clear_all": true',
                "refused",
            )
        self._ask(lambda interface: interface.clear())
        known = len(self._written)
        self._written.clear()
        self._steps.clear()
        return known

    def info(self) -> dict[str, str]:
        generation = self._interface.name if self._interface else ""
        deletes = "yes" if self._how_to_delete() else "no: a page that must go gets another key"
        return {"plug_in": self._settings.plug_in(), "interface": generation, "deletes": deletes}

    def stats(self) -> dict[str, int]:
        return self._counters.snapshot() | {"hidden_pages": len(self._steps)}

    # ---- inside

    def _ask(self, question: Any) -> Any:
        """One call into the plug-in.  What it has not written is a fault like any other."""
        interface = self._interface
        if interface is None:
            raise StorageError("the plug-in is not open")
        try:
            return question(interface)
        except NotWrittenError:
            self._counters.add("wrong_answers")
            raise

    def _called(self, method: str, *args: Any) -> Any:
        assert self._plug_in is not None, "asked through `_ask`"
        return self._plug_in.call(method, *args)

    def _slots(self) -> int:
        if self._pool is None:
            raise StorageError("the plug-in is not open")
        return self._pool.slots

    def _parts(self, pages: Sequence[Any]) -> list[Sequence[Any]]:
        """What fits into the slots of one direction."""
        slots = self._slots()
        return [pages[start : start + slots] for start in range(0, len(pages), slots)]

    def _read(self, pages: Sequence[IncomingPage]) -> list[PageOutcome]:
        pool = self._pool
        assert pool is not None, "asked before"
        self._check_size(pages[0])
        slots, keys = range(len(pages)), self._keys([page.name for page in pages])
        pool.wipe(slots)
        values = self._ask(lambda interface: interface.read(keys, slots))
        return [self._taken(page, value) for page, value in zip(pages, values, strict=True)]

    def _taken(self, page: IncomingPage, value: memoryview | None) -> PageResult:
        """Copy a page to where it belongs.  From here on the plug-in cannot reach it."""
        assert self._pool is not None, "asked before"
        if value is None:
            return PageResult.MISS
        if len(value) != self._pool.value_bytes:
            return PageResult.WRONG_SIZE
        page.header[:] = value[:HEADER_BYTES]
        page.payload[:] = value[HEADER_BYTES : page.size_bytes]
        header = parse_header(page.header)
        return PageResult.WRONG_SIZE if header and header.payload_bytes != len(page.payload) else PageResult.HIT

    def _write(self, pages: Sequence[OutgoingPage]) -> list[PageOutcome]:
        pool = self._pool
        assert pool is not None, "asked before"
        present = self.exists_blocking([page.name for page in pages])
        outcomes: list[PageOutcome] = [PageResult.PRESENT] * present
        rest = pages[present:]
        if not rest:
            return outcomes
        self._check_size(rest[0])
        slots = range(pool.slots, pool.slots + len(rest))
        for slot, page in zip(slots, rest, strict=True):
            pool.fill(slot, page)
        keys = self._keys([page.name for page in rest])
        kept = self._ask(lambda interface: interface.write(keys, slots))
        for page, is_kept in zip(rest, kept):
            if not is_kept:
                said = f"the plug-in {self._settings.plug_in()} did not keep the page {page.name}"
                return [*outcomes, StorageError(said)]
            self._written.add(page.name)
            outcomes.append(PageResult.WRITTEN)
        return outcomes

    def _check_size(self, page: IncomingPage | OutgoingPage) -> None:
        """Pages of a batch are of one size, and of the size that the store was opened for."""
        assert self._pool is not None, "asked before"
        if page.size_bytes > self._pool.value_bytes:
            raise StorageError(f"{page} does not fit into a value of {self._pool.value_bytes} bytes", "contract")

    def _how_to_delete(self) -> str:
        """Its method for that, "" if it has none."""
        plug_in = self._plug_in
        return next((m for m in (_DELETE_MANY, *_DELETE_ONE) if plug_in is not None and plug_in.has(m)), "")

    def _delete(self, name: PageName) -> None:
        """What the method answers means something else in every plug-in; whether the page is gone can be asked."""
        method = self._how_to_delete()
        key = self._keys([name])[0]
        if method:
            self._ask(lambda _: self._called(method, [key] if method == _DELETE_MANY else key))
        if not method or self.exists_blocking([name]):
            self._steps.add(name)

    def _keys(self, names: Sequence[PageName]) -> list[str]:
        """What the pages are called in the plug-in's store: 64 hex digits, as SGLang's own keys are, because a plug-in
        may make a file name, a path or an index of it.  The header inside says the rest."""
        return [_key(name, self._steps.get(name)) for name in names]


def _key(name: PageName, step: int) -> str:
    text = object_name(DEFAULT_PREFIX, name) + (f"~{step}" if step else "")
    return hashlib.sha256(text.encode()).hexdigest()
