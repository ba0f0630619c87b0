"""The reference backend: a dictionary in the storage process, gone with it.

Shows what the interface asks for and nothing more; tests and other backends are compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from sglang_hicache.storage.backend import Capabilities, OpenContext, PageOutcome, PageResult, StorageBackend
from sglang_hicache.storage.page_format import HEADER_BYTES, IncomingPage, OutgoingPage, PageName
from sglang_hicache.storage.settings import MemorySettings


class MemoryBackend(StorageBackend):
    """Objects by name.  Both lanes use the dictionary; each access is one atomic step of the interpreter."""

    capabilities = Capabilities(durable=False)

    def __init__(self, settings: MemorySettings, context: OpenContext) -> None:
        self._objects: dict[PageName, bytes] = {}

    def open_blocking(self) -> None:
        pass

    def exists_blocking(self, names: Sequence[PageName]) -> int:
        return next((index for index, name in enumerate(names) if name not in self._objects), len(names))

    def read_blocking(self, pages: Sequence[IncomingPage]) -> list[PageOutcome]:
        return [self._read(page) for page in pages]

    def write_blocking(self, pages: Sequence[OutgoingPage]) -> list[PageOutcome]:
        return [self._write(page) for page in pages]

    def delete_blocking(self, names: Sequence[PageName]) -> int:
        return sum(self._objects.pop(name, None) is not None for name in names)

    def clear_blocking(self, namespace: str) -> int:
        return self.delete_blocking([name for name in list(self._objects) if name.namespace == namespace])

    def stats(self) -> dict[str, int]:
        return {"objects": len(self._objects)}

    def close_blocking(self) -> None:
        self._objects.clear()

    def _read(self, page: IncomingPage) -> PageResult:
        stored = self._objects.get(page.name)
        if stored is None:
            return PageResult.MISS
        if len(stored) != page.size_bytes:
            return PageResult.WRONG_SIZE
        page.header[:] = stored[:HEADER_BYTES]
        page.payload[:] = memoryview(stored)[HEADER_BYTES:]
        return PageResult.HIT

    def _write(self, page: OutgoingPage) -> PageResult:
        stored = self._objects.get(page.name)
        if stored is not None and len(stored) == page.size_bytes:
            return PageResult.PRESENT
        self._objects[page.name] = page.header() + page.payload
        return PageResult.WRITTEN
