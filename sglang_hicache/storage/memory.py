"""The reference backend: a dictionary in the storage process, gone with it.

Shows what the interface asks for and nothing more; tests and other backends are compared with it.  It is bounded, as
every store must be that keeps bytes itself: what `capacity.py` names first goes before a page that has no room.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.backend import Capabilities, OpenContext, PageOutcome, PageResult, StorageBackend
from sglang_hicache.storage.capacity import Catalogue, Limits, size_text
from sglang_hicache.storage.page_format import HEADER_BYTES, IncomingPage, OutgoingPage, PageName
from sglang_hicache.storage.settings import MemorySettings

#: For each rank; the host pool beside it is larger on any machine worth the name.
DEFAULT_MAX_BYTES = 4 << 30

#: There is no disk whose free bytes would bound the store.
_ENDLESS = 1 << 62


class MemoryBackend(StorageBackend):
    """Objects by name.  Both lanes use them, one at a time."""

    capabilities = Capabilities(durable=False)

    def __init__(
        self, settings: MemorySettings, context: OpenContext, clock: Callable[[], float] = time.monotonic
    ) -> None:
        max_bytes = settings.max_bytes()
        high, low = settings.watermarks()
        page_bytes = HEADER_BYTES + context.page_bytes
        self._limits = Limits(DEFAULT_MAX_BYTES if max_bytes is None else max_bytes, 0, high, low, page_bytes)
        self._ttl_s = settings.ttl_s
        self._clock = clock
        self._in_use = {context.namespace}
        self._lock = threading.Lock()
        self._objects: dict[PageName, bytes] = {}
        self._catalogue = Catalogue()
        self._next_expiry_s = 0
        self._evicted_pages = 0
        self._expired_pages = 0
        self._no_space_pages = 0

    def open_blocking(self) -> None:
        pass

    def exists_blocking(self, names: Sequence[PageName]) -> int:
        with self._lock:
            return next((index for index, name in enumerate(names) if name not in self._objects), len(names))

    def read_blocking(self, pages: Sequence[IncomingPage]) -> list[PageOutcome]:
        return [self._read(page) for page in pages]

    def write_blocking(self, pages: Sequence[OutgoingPage]) -> list[PageOutcome]:
        outcomes: list[PageOutcome] = []
        for page in pages:
            outcomes.append(self._write(page))
            if isinstance(outcomes[-1], StorageError):
                # The rest would make room for itself at the cost of what it hangs on.
                break
        return outcomes

    def delete_blocking(self, names: Sequence[PageName]) -> int:
        with self._lock:
            return sum(self._delete(name) for name in names)

    def clear_blocking(self, namespace: str) -> int:
        with self._lock:
            return sum(self._delete(name) for name in list(self._objects) if name.namespace == namespace)

    def touch_blocking(self, names: Sequence[PageName]) -> None:
        with self._lock:
            for name in names:
                self._catalogue.touch(name.namespace, name.key, self._now_s())

    def use_namespace(self, namespace: str) -> None:
        self._in_use = {namespace}

    def stats(self) -> dict[str, int]:
        with self._lock:
            return {
                "used_bytes": self._catalogue.used_bytes,
                "used_pages": len(self._objects),
                "evicted_pages": self._evicted_pages,
                "expired_pages": self._expired_pages,
                "no_space_pages": self._no_space_pages,
                "max_bytes": self._limits.max_bytes,
            }

    def close_blocking(self) -> None:
        with self._lock:
            self._objects.clear()
            self._catalogue = Catalogue()

    def _now_s(self) -> int:
        return int(self._clock())

    def _read(self, page: IncomingPage) -> PageResult:
        with self._lock:
            stored = self._objects.get(page.name)
        if stored is None:
            return PageResult.MISS
        if len(stored) != page.size_bytes:
            return PageResult.WRONG_SIZE
        page.header[:] = stored[:HEADER_BYTES]
        page.payload[:] = memoryview(stored)[HEADER_BYTES:]
        return PageResult.HIT

    def _write(self, page: OutgoingPage) -> PageOutcome:
        with self._lock:
            stored = self._objects.get(page.name)
            # A write is a use, of what the page hangs on as well.
            for key in (page.parent, page.name.key):
                self._catalogue.touch(page.name.namespace, key, self._now_s())
            if stored is not None and len(stored) == page.size_bytes:
                return PageResult.PRESENT
        written = page.header() + page.payload
        with self._lock:
            self._make_room(page)
            if self._limits.room(self._catalogue.used_bytes, _ENDLESS) < page.size_bytes:
                self._no_space_pages += 1
                most = size_text(self._limits.max_bytes)
                return StorageError(f"no room for page {page.name}: the store may hold {most}", "no_space")
            self._delete(page.name)
            self._objects[page.name] = written
            self._catalogue.add(page.name, page.parent, page.depth, page.size_bytes, self._now_s())
        return PageResult.WRITTEN

    def _make_room(self, page: OutgoingPage) -> None:
        """Let go what is past its time and what is too much, but neither the page nor what it hangs on."""
        now_s = self._now_s()
        excess = self._limits.excess(self._catalogue.used_bytes + page.size_bytes, _ENDLESS)
        is_expiry_due = self._ttl_s > 0 and now_s >= self._next_expiry_s
        if not excess and not is_expiry_due:
            return
        self._next_expiry_s = now_s + self._ttl_s // 10
        unused_since = now_s - self._ttl_s if self._ttl_s else None
        for victim, is_expired in self._catalogue.victims(self._in_use, unused_since):
            if excess <= 0 and not is_expired:
                return
            if victim.key in (page.parent, page.name.key):
                continue
            excess -= victim.size_bytes
            self._evicted_pages += not is_expired
            self._expired_pages += is_expired
            for name in victim.names:
                self._objects.pop(name)
            self._catalogue.remove(victim)

    def _delete(self, name: PageName) -> bool:
        if self._objects.pop(name, None) is None:
            return False
        page = self._catalogue.find(name.namespace, name.key)
        if page is not None:
            self._catalogue.remove_range(page, name)
            if not page.ranges:
                self._catalogue.remove(page)
        return True
