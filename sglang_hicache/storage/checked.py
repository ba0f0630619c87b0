"""The only caller of a backend: puts headers on pages, judges what comes back, and trusts no answer.

One object per lane thread of a storage process, all over the same backend.  It turns whatever a backend returns into
numbers that hold: `pages` counts whole, verified pages from the first one on.  A backend that answers None, too little
or nonsense has failed the call (`StorageError`, reason "contract"), and a page that is corrupt is set aside, so that its
name can be written again.  It keeps no thread, clock or socket of its own.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.backend import PageOutcome, PageResult, StorageBackend
from sglang_hicache.storage.page_format import IncomingPage, OutgoingPage, PageLayout, Part, Verdict

_logger = logging.getLogger(__name__)

_Page = TypeVar("_Page", IncomingPage, OutgoingPage)

#: How often a page is tried.  In the field one retry saved 99 of 100 failed calls; a second one costs nothing more
#: where it is not needed.
ATTEMPTS = 3

_SELF_TEST_BYTES = 4096


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What became of a batch."""

    #: Whole pages, counted from the first one.
    pages: int
    #: Pages that were refused for their size, header or checksum.
    corrupt: int = 0
    #: "" or why `pages` is less than the whole batch.
    reason: str = ""


class CheckedStore:
    """A backend behind its contract."""

    def __init__(self, backend: StorageBackend, layout: PageLayout) -> None:
        self._backend = backend
        self._layout = layout

    def lookup_blocking(self, keys: Sequence[bytes]) -> int:
        """How many pages from the first on the store says it has."""
        names = [self._layout.name(key) for key in keys]
        return _count(self._backend.exists_blocking(names), "exists", len(names))

    def read_blocking(
        self, keys: Sequence[bytes], payloads: Sequence[memoryview], previous: bytes = b""
    ) -> BatchResult:
        """Read pages in order; `previous` is the key before the first one, b"" if the caller does not know it."""
        pages = [IncomingPage(self._layout, key, payload) for key, payload in zip(keys, payloads, strict=True)]
        going_on = (PageResult.HIT, PageResult.WRONG_SIZE)
        outcomes, stopped = self._repeat("read", self._backend.read_blocking, pages, going_on)
        whole, corrupt, reason = len(outcomes), 0, _reason(stopped)
        # Pages behind the first wrong one do not count, but are judged all the same: a store that has many of them
        # would otherwise lose one per request, and every request in between would read and refuse.
        for index, outcome in enumerate(outcomes):
            wrong = _wrong(pages[index], outcome, keys[index - 1] if index else previous)
            if not wrong:
                continue
            if not corrupt:
                whole, reason = index, f"corrupt: {wrong}"
            corrupt += 1
            self._remove(pages[index], wrong)
        return BatchResult(whole, corrupt, reason)

    def write_blocking(
        self,
        keys: Sequence[bytes],
        payloads: Sequence[memoryview],
        parent: bytes,
        depth: int,
        tenant: bytes = b"",
    ) -> BatchResult:
        """Write pages in order; the first one is `depth` pages from the root and its parent is `parent`.  `tenant` is
        the seed of their hash chain, b"" for nobody's."""
        parents = [parent, *keys]
        pages = [
            OutgoingPage(self._layout, key, payload, parents[index], depth + index, tenant)
            for index, (key, payload) in enumerate(zip(keys, payloads, strict=True))
        ]
        good = (PageResult.WRITTEN, PageResult.PRESENT)
        written, stopped = self._repeat("write", self._backend.write_blocking, pages, good)
        return BatchResult(len(written), reason=_reason(stopped))

    def touch_blocking(self, keys: Sequence[bytes]) -> None:
        """Pages were used.  A failure is told to the log only: the pages were read all the same."""
        try:
            self._backend.touch_blocking([self._layout.name(key) for key in keys])
        except StorageError as error:
            _logger.warning("%s", error)

    def clear_blocking(self) -> int:
        """Remove all pages of the own namespace; how many there were."""
        return _count(self._backend.clear_blocking(self._layout.namespace), "clear", None)

    def self_test_blocking(self, rank: int) -> None:
        """Write, find, read back, compare and delete one page that nobody else can mean."""
        layout = PageLayout(
            self._layout.namespace, self._layout.head_start, self._layout.head_end, (Part("kv", _SELF_TEST_BYTES),)
        )
        own = CheckedStore(self._backend, layout)
        key = hashlib.sha256(b"self-test" + secrets.token_bytes(16) + rank.to_bytes(4, "little")).digest()
        content = secrets.token_bytes(_SELF_TEST_BYTES)
        target = bytearray(_SELF_TEST_BYTES)
        _expect(own.lookup_blocking([key]), 0, "found a page that was never written")
        written = own.write_blocking([key], [memoryview(content)], b"", 0)
        _expect(written.pages, 1, f"could not write ({written.reason})")
        _expect(own.lookup_blocking([key]), 1, "does not find the page it has just written")
        read = own.read_blocking([key], [memoryview(target)])
        _expect(read.pages, 1, f"could not read back what it has written ({read.reason})")
        _expect(bytes(target), content, "read back other bytes than it has written")
        _expect(_count(self._backend.delete_blocking([layout.name(key)]), "delete", 1), 1, "deletes nothing")
        _expect(own.lookup_blocking([key]), 0, "still finds a page that was deleted")

    def _repeat(
        self,
        call_name: str,
        call: Callable[[Sequence[_Page]], list[PageOutcome]],
        pages: list[_Page],
        good: tuple[PageResult, ...],
    ) -> tuple[list[PageOutcome], PageOutcome | None]:
        """Call until every page is good, or one is not and will not be: outcomes of the good ones, from the first
        page on, and what stopped the rest."""
        done: list[PageOutcome] = []
        stopped: PageOutcome | None = None
        for _ in range(ATTEMPTS):
            outcomes = _call(call_name, call, pages[len(done) :])
            gained = next((i for i, outcome in enumerate(outcomes) if outcome not in good), len(outcomes))
            done += outcomes[:gained]
            if len(done) == len(pages):
                return done, None
            if gained == len(outcomes):
                if outcomes and outcomes[-1] is PageResult.WRONG_SIZE:
                    return done, None  # a backend may stop there
                raise StorageError(f"{call_name} answered for {gained} pages and says nothing of the rest", "contract")
            stopped = outcomes[gained]
            if not isinstance(stopped, StorageError) or stopped.reason != "io":
                break
            for page in pages[len(done) :]:
                page.restart()
        return done, stopped

    def _remove(self, page: IncomingPage, wrong: str) -> None:
        """Take a bad page out of every reader's way: left there it would be found, read and refused for ever."""
        _logger.warning("page %s is corrupt (%s); it is set aside", page.name, wrong)
        try:
            self._backend.set_aside_blocking(page.name)
        except StorageError as error:
            _logger.warning("corrupt page %s cannot be set aside: %s", page.name, error)


def _call(name: str, call: Callable[[Sequence[_Page]], list[PageOutcome]], pages: Sequence[_Page]) -> list[PageOutcome]:
    """One call; a fault of the whole call is a fault of its first page."""
    try:
        outcomes = call(pages)
    except StorageError as error:
        return [error]
    if not isinstance(outcomes, list) or len(outcomes) > len(pages):
        raise StorageError(f"{name} of {len(pages)} pages answered {_short(outcomes)}", "contract")
    for outcome in outcomes:
        if not isinstance(outcome, (PageResult, StorageError)):
            raise StorageError(f"{name} answered {_short(outcome)} for a page", "contract")
    return outcomes


def _wrong(page: IncomingPage, outcome: PageOutcome, previous: bytes) -> str:
    """What is wrong with a page that was read: "" if it is good and follows the page before it."""
    if outcome is PageResult.WRONG_SIZE:
        return outcome.value
    verdict = page.judge()
    if verdict is Verdict.GOOD and previous and page.parent != previous:
        verdict = Verdict.OTHER_PAGE
    return "" if verdict is Verdict.GOOD else verdict.value


def _count(answer: Any, name: str, limit: int | None) -> int:
    """A number of pages, or the backend has broken its contract."""
    if isinstance(answer, bool) or not isinstance(answer, int) or answer < 0 or (limit is not None and answer > limit):
        raise StorageError(f"{name} answered {_short(answer)}, not a number of pages", "contract")
    return answer


def _reason(stopped: PageOutcome | None) -> str:
    if isinstance(stopped, StorageError):
        return f"{stopped.reason}: {stopped}"
    return stopped.value if stopped is not None else ""


def _expect(found: object, wanted: object, complaint: str) -> None:
    if found != wanted:
        raise StorageError(f"self-test: the backend {complaint}", "refused")


def _short(answer: object) -> str:
    return repr(answer)[:80]
