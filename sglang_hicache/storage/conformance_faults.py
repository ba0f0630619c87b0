"""The contract under attack: what must hold of a backend and its `CheckedStore` while a saboteur sits between them.

Used like `conformance.py`, by tests and by whoever writes a backend.  For every fault the same four statements:

    not one wrong byte is accepted        pages that count as whole are the pages that were written
    the numbers are right                 what counts as written can be found, what was damaged is counted
    nothing but StorageError comes out    everything else would be a defect to the lane that calls
    nothing is poisoned                   when the fault is over, the same pages are written, found and read
"""

from __future__ import annotations

import secrets
import threading
import time
from contextlib import suppress

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.backend import StorageBackend
from sglang_hicache.storage.checked import BatchResult, CheckedStore, Shared
from sglang_hicache.storage.conformance import ContractBroken, Make, demand, new_layout, opened
from sglang_hicache.storage.faulty import FaultyBackend
from sglang_hicache.storage.faulty_settings import Fault, FaultCall, FaultKind, FaultySettings
from sglang_hicache.storage.page_format import HEADER_BYTES, Cipher, PageLayout

#: Faults that strike, by call.  Those of reads and writes strike single pages.
SABOTAGES: tuple[tuple[FaultCall, FaultKind], ...] = (
    *((call, kind) for call in ("read", "write") for kind in ("flip", "short", "disappear", "duplicate")),
    *((call, kind) for call in ("exists", "read", "write") for kind in ("error", "no_space", "none", "wrong_type")),
    *((call, kind) for call in ("exists", "read", "write", "delete", "clear") for kind in ("slow", "twice")),
    *((call, "error") for call in ("touch", "delete", "set_aside", "clear")),
    *((call, "short_list") for call in ("read", "write")),
    ("exists", "stale"),
    ("exists", "disappear"),
)

#: Writes of these kinds are called good and are not: only a reader can find out.
_LIES = ("flip", "short", "duplicate", "disappear")
#: What a reader refuses for its content, and counts.
_DAMAGE = ("flip", "short", "duplicate")

_PAGES = 8
_FIRST, _COUNT = 3, 3
_MOST_ROUNDS = 10
_PATIENCE_S = 20.0


def check_sabotaged(
    make: Make, call: FaultCall, kind: FaultKind, cipher: Cipher | None = None, *, room_pages: int = _PAGES
) -> None:
    """A store is written, asked, read, cleared and written again while one kind of fault strikes three times.

    `room_pages`: how many pages the store must keep at least, for one that is too small for all of them.
    """
    faults = {call: Fault(kind=kind, first=_FIRST, count=_COUNT, delay_ms=1.0)}
    if call == "set_aside":  # nothing is set aside in a store without damage
        faults["write"] = Fault(kind="flip", first=0, count=_FIRST + _COUNT)
    with opened(make) as inner:
        world = _World(inner, call, faults, cipher, room_pages)
        for _ in range(_MOST_ROUNDS):
            world.write()
            world.look_up()
            world.read()
            world.touch_and_delete()
            if world.hits() == _COUNT:
                return world.is_over()
        raise ContractBroken(f"the backend was struck by {kind} in {call} {world.hits()} times only: nothing is shown")


def check_damage_at_every_byte(make: Make, cipher: Cipher | None = None) -> None:
    """One bit of a small page differs, at every byte of header and payload, on the way in and at rest."""
    layout = new_layout(page_bytes=40)
    with opened(make) as inner:
        for at in range(HEADER_BYTES + layout.payload_bytes):
            for call in ("read", "write"):
                keys, contents = _random_pages(layout, 1)
                store = CheckedStore(
                    _sabotaged(inner, {call: Fault(kind="flip", at=at, count=1)}), layout, Shared(cipher)
                )
                _write(store, keys, contents)
                result, _ = _read(store, layout, keys)
                demand(
                    (result.pages, result.corrupt) == (0, 1),
                    f"accepts a page with a wrong bit at byte {at}, on the way of a {call}: {result}",
                )
                _write(store, keys, contents)
                demand(
                    _read(store, layout, keys) == (BatchResult(1), contents), f"stays damaged after {call} at byte {at}"
                )


def check_pages_cut_at_every_byte(make: Make, cipher: Cipher | None = None) -> None:
    """A page ends early, at every byte: as an object that is too short, or as a read that says it was whole."""
    layout = new_layout(page_bytes=40)
    with opened(make) as inner:
        for at in range(HEADER_BYTES + layout.payload_bytes):
            for call in ("read", "write"):
                keys, contents = _random_pages(layout, 1)
                store = CheckedStore(
                    _sabotaged(inner, {call: Fault(kind="short", at=at, count=1)}), layout, Shared(cipher)
                )
                _write(store, keys, contents)
                result, found = _read(store, layout, keys)
                # A read that missed nothing but bytes which happen to be zero has missed nothing.
                demand(result.pages == 0 or found == contents, f"accepts a page cut at byte {at} by a {call}")
                _write(store, keys, contents)
                demand(
                    _read(store, layout, keys) == (BatchResult(1), contents), f"stays cut after a {call} at byte {at}"
                )


class _World:
    """One store under attack, the way a storage process uses it: a view for each lane, and the truth beside it."""

    def __init__(
        self,
        inner: StorageBackend,
        call: FaultCall,
        faults: dict[FaultCall, Fault],
        cipher: Cipher | None,
        room_pages: int,
    ) -> None:
        self._call = call
        self._kind = faults[call].kind
        self._inner = inner
        self._layout = new_layout()
        self._backend = _sabotaged(inner, faults)
        self._cipher = cipher
        self._room_pages = room_pages
        shared = Shared(cipher)
        self._reader = CheckedStore(self._backend, self._layout, shared)
        self._writer = CheckedStore(self._backend, self._layout, shared)
        self._keys, self._contents = _random_pages(self._layout, _PAGES)

    def hits(self) -> int:
        """How often the fault has struck."""
        return self._backend.stats().get(f"faults_{self._call}", 0)

    def write(self) -> None:
        """All pages; what counts as written is there, unless the fault is a lie about it."""
        with suppress(StorageError):
            result = _write(self._writer, self._keys, self._contents)
            demand((result.pages == _PAGES) is (result.reason == ""), f"stops a write short without a reason: {result}")
            is_lie = self._call == "set_aside" or (self._call == "write" and self._kind in _LIES)
            if not is_lie and self._room_pages == _PAGES:
                names = [self._layout.name(key) for key in self._keys[: result.pages]]
                demand(self._inner.exists_blocking(names) == len(names), f"writes {result} and holds less")

    def look_up(self) -> None:
        """Any answer that is a number is allowed: it is a hint, and reads find out."""
        with suppress(StorageError):
            self._reader.lookup_blocking(self._keys)

    def read(self) -> None:
        """All pages, with the counts and bytes that must be."""
        before = self.hits()
        with suppress(StorageError):
            result, found = _read(self._reader, self._layout, self._keys)
            demand(found[: result.pages] == self._contents[: result.pages], f"lets wrong bytes through: {result}")
            demand((result.pages == _PAGES) is (result.reason == ""), f"stops a read short without a reason: {result}")
            if self._call == "read" and self._kind in _DAMAGE:
                struck = self.hits() - before
                demand(result.corrupt == struck, f"counts {result.corrupt} bad pages of {struck}")

    def touch_and_delete(self) -> None:
        """What else a storage process does; a failure of it takes nothing along."""
        self._reader.touch_blocking(self._keys)
        with suppress(StorageError):
            self._backend.delete_blocking([self._layout.name(self._keys[-1])])
        if self._call == "clear":
            with suppress(StorageError):
                self._writer.clear_blocking()

    def is_over(self) -> None:
        """From here on nothing strikes: every view of the store must come to give all pages that fit."""
        for _ in range(2):  # a page that was stored wrong is found by the first read and replaced by the next write
            self._write_what_fits()
            _read(self._reader, self._layout, self._keys)
        after, room = f"after {self._kind} in {self._call}", self._room_pages
        for store in (self._reader, CheckedStore(self._inner, self._layout, Shared(self._cipher))):
            demand(store.lookup_blocking(self._keys) >= room, f"does not find its pages {after}")
            result, found = _read(store, self._layout, self._keys)
            demand(result.pages >= room and not result.corrupt, f"stays damaged {after}: {result}")
            demand(found[: result.pages] == self._contents[: result.pages], f"gives other bytes {after}")
        cleared = self._writer.clear_blocking()
        demand(room <= cleared <= _PAGES, f"counts {cleared} pages as cleared {after}")

    def _write_what_fits(self) -> None:
        """A full store may refuse pages for as long as it takes to make room, or to count what is there."""
        deadline_s, never = time.monotonic() + _PATIENCE_S, threading.Event()
        while _write(self._writer, self._keys, self._contents).pages < self._room_pages:
            demand(time.monotonic() < deadline_s, f"makes no room in {_PATIENCE_S:.0f} s")
            never.wait(0.01)


def _sabotaged(inner: StorageBackend, faults: dict[FaultCall, Fault]) -> FaultyBackend:
    """A saboteur around a backend that is open, and stays it."""
    return FaultyBackend(FaultySettings(inner="open already", faults=faults), [inner])


def _random_pages(layout: PageLayout, count: int) -> tuple[list[bytes], list[bytes]]:
    contents = [secrets.token_bytes(layout.payload_bytes) for _ in range(count)]
    return [secrets.token_bytes(32) for _ in contents], contents


def _write(store: CheckedStore, keys: list[bytes], contents: list[bytes]) -> BatchResult:
    return store.write_blocking(keys, list(map(memoryview, contents)), b"", 0)


def _read(store: CheckedStore, layout: PageLayout, keys: list[bytes]) -> tuple[BatchResult, list[bytes]]:
    targets = [bytearray(layout.payload_bytes) for _ in keys]
    result = store.read_blocking(keys, list(map(memoryview, targets)))
    return result, list(map(bytes, targets))
