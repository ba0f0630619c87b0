"""Pages of one batch on their way, over as many connections as the backend gives: `redis.py` is the only caller.

A job is the pages of a batch that go over one connection, in order.  It runs on a thread of its own, asks for a few
pages ahead - bounded in bytes, for the server keeps its replies in memory until they are fetched - and puts the outcome
of each page in its place.  A place that stays empty was not come to: the batch ends before it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from itertools import islice

import redis

from sglang_hicache.errors import StorageError
from sglang_hicache.remote.redis_client import REDIS_ERRORS, storage_error
from sglang_hicache.storage.backend import PageOutcome, PageResult
from sglang_hicache.storage.page_format import HEADER_BYTES, IncomingPage, OutgoingPage
from sglang_hicache.storage.redis_servers import Group, Servers
from sglang_hicache.storage.redis_wire import Line, line_of, packed

#: Bytes that are asked for, or sent, ahead of the page that is waited for; two pages in any case.
WINDOW_BYTES = 8 * 1024 * 1024

#: A server that says this has the name no more, or not yet.
_REDIRECTED = ("MOVED ", "ASK ")


def is_redirected(reply: object) -> bool:
    """Does a node of a cluster say that another one has the name?"""
    return isinstance(reply, redis.ResponseError) and str(reply).startswith(_REDIRECTED)


def is_wrong_type(reply: object) -> bool:
    """Is under this name something that is no text, and so none of ours?"""
    return isinstance(reply, redis.ResponseError) and str(reply).startswith("WRONGTYPE")


def is_demoted(error: BaseException) -> bool:
    """Is it a server that was the master, and is none any more?"""
    return isinstance(error, redis.ResponseError) and str(error).startswith(("READONLY", "You can't write against"))


class Batch(ABC):
    """Names, pages, and a place for the outcome of each."""

    def __init__(self, servers: Servers, place: str, names: Sequence[bytes], size_bytes: int) -> None:
        self._servers = servers
        self._place = place
        self._names = names
        self._window = max(2, WINDOW_BYTES // max(1, size_bytes))
        self.outcomes: list[PageOutcome | None] = [None] * len(names)
        #: Pages that went the long way, through the client library.
        self.redirected = 0

    def run_blocking(self, job: Group) -> None:
        """The pages of one job; any thread.  Whatever goes wrong outside is the outcome of the page that met it."""
        moved: list[int] = []
        try:
            with line_of(job.pool) as line:
                self._carry_blocking(line, job.numbers, moved)
            for number in moved:
                self.outcomes[number] = self._follow_blocking(number)
                self.redirected += 1
        except REDIS_ERRORS as error:
            self._servers.lost()
            number = next((number for number in job.numbers if self.outcomes[number] is None), job.numbers[-1])
            self.outcomes[number] = storage_error(error, self._place)

    def finished(self) -> list[PageOutcome]:
        """Outcomes up to the first page that was not come to."""
        done: list[PageOutcome] = []
        for outcome in self.outcomes:
            if outcome is None:
                break
            done.append(outcome)
        return done

    @abstractmethod
    def _carry_blocking(self, line: Line, numbers: Sequence[int], moved: list[int]) -> None:
        """Send and receive; pages that are elsewhere are noted in `moved`."""

    @abstractmethod
    def _follow_blocking(self, number: int) -> PageOutcome:
        """One page by way of the library, which finds out where it has gone."""

    def _complaint(self, error: redis.ResponseError) -> StorageError:
        """What the server says about one page."""
        if is_demoted(error):
            raise error  # the connection is of no use any more, and the server neither
        return storage_error(error, self._place)


class ReadBatch(Batch):
    """From servers to the host pool."""

    def __init__(self, servers: Servers, place: str, names: Sequence[bytes], pages: Sequence[IncomingPage]) -> None:
        super().__init__(servers, place, names, pages[0].size_bytes)
        self._pages = pages

    def _carry_blocking(self, line: Line, numbers: Sequence[int], moved: list[int]) -> None:
        to_ask = iter(numbers)
        asked = deque(islice(to_ask, self._window))
        line.send([b"".join(self._get(number) for number in asked)])
        while asked:
            number = asked.popleft()
            outcome = line.receive_page(self._pages[number])
            if is_redirected(outcome):
                moved.append(number)
            elif is_wrong_type(outcome):
                self.outcomes[number] = PageResult.WRONG_SIZE
            elif isinstance(outcome, redis.ResponseError):
                self.outcomes[number] = self._complaint(outcome)
            else:
                self.outcomes[number] = outcome
            if self.outcomes[number] in (PageResult.HIT, PageResult.WRONG_SIZE, None):
                for following in islice(to_ask, 1):
                    line.send([self._get(following)])
                    asked.append(following)
            else:
                to_ask = iter(())  # nobody uses a page behind a gap

    def _get(self, number: int) -> bytes:
        return packed(b"GET", self._names[number])

    def _follow_blocking(self, number: int) -> PageOutcome:
        page = self._pages[number]
        value = self._servers.follow_blocking("GET", self._names[number])
        if value is None:
            return PageResult.MISS
        if len(value) != page.size_bytes:
            return PageResult.WRONG_SIZE
        page.header[:] = value[:HEADER_BYTES]
        page.payload[:] = memoryview(value)[HEADER_BYTES:]
        return PageResult.HIT


class WriteBatch(Batch):
    """From the host pool to servers."""

    def __init__(
        self, servers: Servers, place: str, names: Sequence[bytes], pages: Sequence[OutgoingPage], ttl_s: int
    ) -> None:
        super().__init__(servers, place, names, pages[0].size_bytes)
        self._pages = pages
        self._ttl_s = ttl_s

    def _carry_blocking(self, line: Line, numbers: Sequence[int], moved: list[int]) -> None:
        sent: deque[int] = deque()
        for number in numbers:
            line.send_page(self._names[number], self._pages[number], self._ttl_s)
            sent.append(number)
            if len(sent) >= self._window and not self._heard_blocking(line, sent.popleft(), moved):
                break  # what follows would hang on a page that is not there
        while sent:
            self._heard_blocking(line, sent.popleft(), moved)

    def _heard_blocking(self, line: Line, number: int, moved: list[int]) -> bool:
        """The reply to the oldest page; False: the server has not taken it."""
        reply = line.reply()
        if is_redirected(reply):
            moved.append(number)
            return True
        if isinstance(reply, redis.ResponseError):
            self.outcomes[number] = self._complaint(reply)
            return False
        self.outcomes[number] = PageResult.WRITTEN
        return True

    def _follow_blocking(self, number: int) -> PageOutcome:
        page = self._pages[number]
        ttl = ("EX", self._ttl_s) if self._ttl_s else ()
        self._servers.follow_blocking("SET", self._names[number], page.header() + page.payload, *ttl)
        return PageResult.WRITTEN
