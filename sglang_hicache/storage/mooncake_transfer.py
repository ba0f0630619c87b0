"""Batches of pages to and from a Mooncake store, cut into calls of the library.

One `TransferLane` for each lane of a storage process, called by that lane alone.  What a call brought is looked at
before the next one begins, so that nothing is sent behind a page that failed.  Hashing and copying beside a call, on a
second thread, was tried and gained nothing: the library's own threads need the cores.
"""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from sglang_hicache.errors import StorageError
from sglang_hicache.observe import SharedCounters
from sglang_hicache.storage.backend import PageOutcome, PageResult
from sglang_hicache.storage.mooncake_client import (
    BAD_PARAMETERS,
    NOT_FOUND,
    NOT_READY,
    REPLICA_GONE,
    REPLICA_NOT_FOUND,
    TRANSFER_FAILED,
    MooncakeClient,
    failure,
)
from sglang_hicache.storage.mooncake_memory import HostSpan, Pieces, Room
from sglang_hicache.storage.object_name import object_name
from sglang_hicache.storage.page_format import IncomingPage, OutgoingPage

_Page = TypeVar("_Page", IncomingPage, OutgoingPage)

#: Most objects of one call; a page that is not copied takes two transfers.  The library waits `timeout_s` for every
#: transfer of a process that hangs, so many at a time as it has connections to it (`mooncake_client.CONNECTIONS`): with
#: larger calls the storage process would be given up for dead before it could say so, smaller ones are slow.
MOST_COPIED, MOST_DIRECT = 64, 32

#: Objects of a call after one that failed: if it fails as well, little was waited for.
DOUBTFUL_PAGES = 2

#: Answers to a read that say the page is not there (any more, or yet).
_MISSES = (NOT_FOUND, NOT_READY, REPLICA_NOT_FOUND, REPLICA_GONE)

#: A batch goes on behind these; behind a WRONG_SIZE so that one call shows every damaged page.
_GO_ON = (PageResult.HIT, PageResult.WRONG_SIZE, PageResult.WRITTEN)


class Work(ABC, Generic[_Page]):
    """What a lane does with its pages."""

    def __init__(self, client: MooncakeClient, prefix: str, counters: SharedCounters) -> None:
        self._client = client
        self._prefix = prefix
        self._counters = counters

    @abstractmethod
    def move_blocking(self, pages: Sequence[_Page], room: Room, pieces: Pieces) -> list[PageOutcome]:
        """One call of the library, and what became of each page."""

    def keys(self, pages: Sequence[_Page]) -> list[str]:
        """Names of the objects."""
        return [object_name(self._prefix, page.name) for page in pages]


class Reading(Work[IncomingPage]):
    """From the store into memory.  `removing` is held by whoever removes objects: their memory is given to others at
    once, and a reader that is half through would take the bytes of another page for the rest."""

    def __init__(self, client: MooncakeClient, prefix: str, counters: SharedCounters, removing: threading.Lock) -> None:
        super().__init__(client, prefix, counters)
        self._removing = removing

    def move_blocking(self, pages: Sequence[IncomingPage], room: Room, pieces: Pieces) -> list[PageOutcome]:
        keys = self.keys(pages)
        with self._removing:
            codes = self._client.get_blocking(keys, pieces)
        # The library says that an object is larger than its place, and otherwise only that something went wrong.
        unclear = [key for key, code in zip(keys, codes) if code in (BAD_PARAMETERS, TRANSFER_FAILED)]
        sizes = self._client.sizes_blocking(unclear) if unclear else {}
        outcomes: list[PageOutcome] = []
        for index, (page, key, code) in enumerate(zip(pages, keys, codes)):
            if code == page.size_bytes:
                room.drain(page, pieces, index)
                # Warm in the cache still, if it was copied.
                page.arrived(len(page.payload))
            stored_bytes = sizes.get(key, 0) if key in unclear else page.size_bytes
            outcomes.append(_read_outcome(page, code, stored_bytes))
        self._counters.add(_counter(pieces), outcomes.count(PageResult.HIT))
        return outcomes


class Writing(Work[OutgoingPage]):
    """From memory into the store."""

    def move_blocking(self, pages: Sequence[OutgoingPage], room: Room, pieces: Pieces) -> list[PageOutcome]:
        for index, page in enumerate(pages):
            room.pour(page, pieces, index)
        codes = self._client.put_blocking(self.keys(pages), pieces)
        outcomes: list[PageOutcome] = [
            PageResult.WRITTEN if code == 0 else failure(code, f"write page {page.name}")
            for page, code in zip(pages, codes)
        ]
        self._counters.add(_counter(pieces), outcomes.count(PageResult.WRITTEN))
        full = [outcome for outcome in outcomes if isinstance(outcome, StorageError) and outcome.reason == "no_space"]
        self._counters.add("no_space_pages", len(full))
        return outcomes


class Doubt:
    """Did the last call fail, of either lane?  Then the next one is a small one."""

    def __init__(self) -> None:
        self.is_there = False


class TransferLane(Generic[_Page]):
    """One kind of work, and the room for it."""

    def __init__(self, work: Work[_Page], host: HostSpan, room: Room, doubt: Doubt) -> None:
        self._work = work
        self._host = host
        self._room = room
        self._doubt = doubt

    def transfer_blocking(self, pages: Sequence[_Page]) -> list[PageOutcome]:
        """Outcomes up to the first page that stops the batch."""
        outcomes: list[PageOutcome] = []
        while len(outcomes) < len(pages):
            outcomes += self._some_blocking(pages[len(outcomes) :])
            stopped = next((index for index, outcome in enumerate(outcomes) if outcome not in _GO_ON), None)
            if stopped is not None:
                outcome = outcomes[stopped]
                self._doubt.is_there = isinstance(outcome, StorageError) and outcome.reason == "io"
                return outcomes[: stopped + 1]
            self._doubt.is_there = False
        return outcomes

    def close(self) -> None:
        """Give back the room."""
        self._room.close()

    def _some_blocking(self, pages: Sequence[_Page]) -> list[PageOutcome]:
        """The first of these pages, as many as one call should have: all in the host pool, or all to be copied."""
        found = map(self._host.find, (page.payload for page in pages[:MOST_DIRECT]))
        direct = list(itertools.takewhile(bool, found))
        most = len(direct) or min(MOST_COPIED, self._room.fits(pages[0].size_bytes))
        taken = pages[: min(most, DOUBTFUL_PAGES) if self._doubt.is_there else most]
        pieces = self._room.place(taken, direct)
        try:
            return self._work.move_blocking(taken, self._room, pieces)
        except StorageError as error:
            return [error]


def _counter(pieces: Pieces) -> str:
    return "direct_pages" if pieces.is_direct else "staged_pages"


def _read_outcome(page: IncomingPage, code: int, stored_bytes: int) -> PageOutcome:
    """What an answer means, given the size of the object; 0: there is none."""
    if code == page.size_bytes:
        return PageResult.HIT
    if code in _MISSES or stored_bytes == 0:
        return PageResult.MISS
    if code >= 0 or stored_bytes != page.size_bytes:
        return PageResult.WRONG_SIZE
    return failure(code, f"read page {page.name}")
