"""A store of stores for tests: every store inside can be sabotaged, emptied and looked into."""

from __future__ import annotations

from typing import Any

import msgspec

from sglang_hicache.storage import registry
from sglang_hicache.storage.backend import OpenContext, StorageBackend
from sglang_hicache.storage.checked import BatchResult, CheckedStore
from sglang_hicache.storage.faulty import FaultyBackend
from sglang_hicache.storage.faulty_settings import Fault, FaultySettings
from sglang_hicache.storage.memory import MemoryBackend
from sglang_hicache.storage.mirror import MirrorBackend
from sglang_hicache.storage.page_format import IncomingPage, Verdict
from sglang_hicache.storage.settings import MemorySettings
from sglang_hicache.storage.tiered import TieredBackend
from tests.storage import pages

CONTEXT = OpenContext(rank=0, namespace=pages.NAMESPACE, page_bytes=pages.PAGE_BYTES)
ROOM = pages.PAGE_BYTES + 256
_CLASSES = {"tiered": TieredBackend, "mirror": MirrorBackend}


class Clock:
    """Time that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Composite:
    """Stores of memory, each behind a saboteur, and the store that is made of them."""

    def __init__(self, name: str, count: int = 2, rooms: dict[int, int] | None = None, **config: Any) -> None:
        key = "tiers" if name == "tiered" else "copies"
        entry = {"backend": "faulty", "extra_config": {"inner": "memory"}}
        text = msgspec.json.encode({key: [entry] * count} | config).decode()
        _, settings = registry.validate_extra_config(name, text)
        self.clock = Clock()
        #: How often a store was made anew.
        self.remade: list[int] = []
        self._rooms = rooms or {}
        self.inside = [self._make(number) for number in range(count)]
        self.backend: StorageBackend = _CLASSES[name](settings, list(self.inside), self._remake, self.clock)
        self.store = CheckedStore(self.backend, pages.layout())

    def _make(self, number: int) -> FaultyBackend:
        room = self._rooms.get(number)
        memory = MemoryBackend(
            MemorySettings(max_size=None if room is None else room * ROOM, high_watermark=1.0), CONTEXT
        )
        return FaultyBackend(FaultySettings(inner="memory"), [memory])

    def _remake(self, number: int) -> FaultyBackend:
        self.remade.append(number)
        self.inside[number] = self._make(number)
        return self.inside[number]

    def sabotage(self, number: int, *calls: str, kind: str = "error", **fault: Any) -> None:
        """From now on; without calls: no more."""
        self.inside[number].sabotage({call: Fault(kind=kind, **fault) for call in calls})

    def write(self, count: int, first: int = 1) -> BatchResult:
        contents = [pages.content(number) for number in range(first, first + count)]
        parent = pages.key(first - 1) if first > 1 else b""
        return self.store.write_blocking(pages.keys(count, first), contents, parent, first - 1)

    def read(self, count: int, first: int = 1) -> BatchResult:
        """Pages that count as read are what was written."""
        targets = pages.empty(count)
        result = self.store.read_blocking(pages.keys(count, first), targets)
        for number, target in zip(range(first, first + result.pages), targets, strict=False):
            assert target == pages.content(number)
        return result

    def look_up(self, count: int, first: int = 1) -> int:
        return self.backend.exists_blocking([pages.layout().name(key) for key in pages.keys(count, first)])

    def idle(self) -> None:
        """Wait for the helper."""
        assert self.backend._helper.wait_idle_blocking(pages.PATIENCE_S)

    def held(self, number: int) -> list[int]:
        """Numbers of the pages that a store inside has."""
        memory = self.inside[number]._inner
        return sorted(int.from_bytes(name.key, "big") for name in memory._objects)

    def drop(self, number: int, *numbers: int) -> None:
        """A store inside loses pages."""
        names = [pages.layout().name(pages.key(page)) for page in numbers]
        self.inside[number]._inner.delete_blocking(names)

    def damage(self, number: int, page: int, size: int | None = None) -> None:
        """A store inside has a wrong bit in a page, or an object of another size."""
        objects = self.inside[number]._inner._objects
        name = pages.layout().name(pages.key(page))
        stored = bytearray(objects[name])
        stored[300] ^= 1
        objects[name] = bytes(stored if size is None else stored[:size])

    def is_whole(self, number: int, page: int) -> bool:
        """Does a store inside hold this page as it was written?"""
        target = IncomingPage(pages.layout(), pages.key(page), pages.empty(1)[0])
        self.inside[number]._inner.read_blocking([target])
        return target.judge() is Verdict.GOOD and target.payload == pages.content(page)
