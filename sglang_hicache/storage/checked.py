"""The only caller of a backend: puts headers on pages, judges what comes back, and trusts no answer.

One object per lane thread of a storage process, all over the same backend.  It turns whatever a backend returns into
numbers that hold: `pages` counts whole, verified pages from the first one on.  A backend that answers None, too little
or nonsense has failed the call (`StorageError`, reason "contract").  A page that is corrupt is set aside, so that its
name can be written again.  A page that is there and cannot be read for another reason - a stale index, a fault that
stays, another encryption key - ends look-ups for a while and is replaced when it is written.  Neither poisons its key.

It keeps no thread or socket of its own.  Encrypted pages are made in a buffer of the lane, never in the host pool.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sglang_hicache.errors import StorageError
from sglang_hicache.observe import SharedCounters
from sglang_hicache.storage.backend import PageOutcome, PageResult, StorageBackend
from sglang_hicache.storage.negative import NegativeCache
from sglang_hicache.storage.page_format import Cipher, IncomingPage, OutgoingPage, PageLayout, Part, Verdict
from sglang_hicache.storage.settings import StoreSettings

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


def _negative_cache() -> NegativeCache:
    return NegativeCache(time.monotonic, StoreSettings().negative_ttl_s)


@dataclass(frozen=True, slots=True)
class Shared:
    """What the stores of one process have in common."""

    #: None: pages are stored as they are.
    cipher: Cipher | None = None
    negative: NegativeCache = field(default_factory=_negative_cache)
    counters: SharedCounters = field(default_factory=SharedCounters)


class CheckedStore:
    """A backend behind its contract."""

    def __init__(self, backend: StorageBackend, layout: PageLayout, shared: Shared | None = None) -> None:
        self._backend = backend
        self._layout = layout
        self._shared = shared or Shared()
        self._negative = self._shared.negative
        #: Pages and bytes that went either way, and everything that went wrong.
        self.counters = self._shared.counters
        #: Encrypted pages of one batch; as large as the largest batch so far.
        self._ciphertext = bytearray()

    def lookup_blocking(self, keys: Sequence[bytes]) -> int:
        """How many pages from the first on the store says it has, up to one that it has failed to give."""
        promising = self._negative.readable(keys)
        names = [self._layout.name(key) for key in keys[:promising]]
        found = self._count(self._backend.exists_blocking(names), "exists", promising) if names else 0
        self.counters.add("lookup_pages", found)
        if found == promising < len(keys):
            self.counters.add("negative_hits")
        return found

    def read_blocking(
        self, keys: Sequence[bytes], payloads: Sequence[memoryview], previous: bytes = b""
    ) -> BatchResult:
        """Read pages in order; `previous` is the key before the first one, b"" if the caller does not know it."""
        pages = [IncomingPage(self._layout, key, payload) for key, payload in zip(keys, payloads, strict=True)]
        going_on = (PageResult.HIT, PageResult.WRONG_SIZE)
        outcomes, stopped = self._repeat("read", self._backend.read_blocking, pages, going_on)
        whole, corrupt, reason = len(outcomes), 0, _reason(stopped)
        if stopped is not None:
            # A look-up came before this read and was told that the page is there.
            self._negative.add(keys[whole])
        # Pages behind the first wrong one do not count, but are judged all the same: a store that has many of them
        # would otherwise lose one per request, and every request in between would read and refuse.
        for index, outcome in enumerate(outcomes):
            wrong = _wrong(pages[index], outcome, keys[index - 1] if index else previous, self._shared.cipher)
            if wrong is None:
                continue
            is_corrupt = wrong is not Verdict.OTHER_KEY
            if index < whole:
                whole, reason = index, f"{'corrupt' if is_corrupt else 'other_key'}: {wrong.value}"
            corrupt += is_corrupt
            self._remove(pages[index], wrong)
        self._negative.discard(keys[:whole])
        self.counters.add("read_pages", whole)
        self.counters.add("read_bytes", whole * self._layout.payload_bytes)
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
        self._encrypt(pages)
        outcomes, stopped = self._write(pages)
        if self._negative:
            outcomes, stopped = self._replace(pages, outcomes, stopped)
            self._negative.discard([key for key, outcome in zip(keys, outcomes) if outcome is PageResult.WRITTEN])
        written = outcomes.count(PageResult.WRITTEN)
        self.counters.add("written_pages", written)
        self.counters.add("written_bytes", written * self._layout.payload_bytes)
        self.counters.add("present_pages", len(outcomes) - written)
        return BatchResult(len(outcomes), reason=_reason(stopped))

    def touch_blocking(self, keys: Sequence[bytes]) -> None:
        """Pages were used.  A failure is told to the log only: the pages were read all the same."""
        try:
            self._backend.touch_blocking([self._layout.name(key) for key in keys])
        except StorageError as error:
            _logger.warning("%s", error)

    def clear_blocking(self) -> int:
        """Remove all pages of the own namespace; how many there were."""
        return self._count(self._backend.clear_blocking(self._layout.namespace), "clear", None)

    def self_test_blocking(self, rank: int) -> None:
        """Write, find, read back, compare and delete one page that nobody else can mean.  A store without room for it
        passes: what it holds can be read, and room may come."""
        layout = PageLayout(
            self._layout.namespace, self._layout.head_start, self._layout.head_end, (Part("kv", _SELF_TEST_BYTES),)
        )
        own = CheckedStore(self._backend, layout, Shared(self._shared.cipher))
        key = hashlib.sha256(b"self-test" + secrets.token_bytes(16) + rank.to_bytes(4, "little")).digest()
        try:
            own._prove_blocking(key)
        except StorageError:
            # Nobody else knows its key: a page of a test that went wrong would stay for good, one for each attach.
            with contextlib.suppress(StorageError):
                self._backend.delete_blocking([layout.name(key)])
            raise

    def _prove_blocking(self, key: bytes) -> None:
        """What the self-test does with its page."""
        content = secrets.token_bytes(_SELF_TEST_BYTES)
        target = bytearray(_SELF_TEST_BYTES)
        _expect(self.lookup_blocking([key]), 0, "found a page that was never written")
        written = self.write_blocking([key], [memoryview(content)], b"", 0)
        if written.reason.startswith("no_space"):
            _logger.warning("attached without room to write: %s", written.reason)
            return
        _expect(written.pages, 1, f"could not write ({written.reason})")
        _expect(self.lookup_blocking([key]), 1, "does not find the page it has just written")
        read = self.read_blocking([key], [memoryview(target)])
        _expect(read.pages, 1, f"could not read back what it has written ({read.reason})")
        _expect(bytes(target), content, "read back other bytes than it has written")
        deleted = self._count(self._backend.delete_blocking([self._layout.name(key)]), "delete", 1)
        _expect(deleted, 1, "deletes nothing")
        _expect(self.lookup_blocking([key]), 0, "still finds a page that was deleted")

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
        calls = tries = 0
        while tries < ATTEMPTS:
            outcomes = self._call(call_name, call, pages[len(done) :])
            gained = next((i for i, outcome in enumerate(outcomes) if outcome not in good), len(outcomes))
            done += outcomes[:gained]
            # Of the page that stops this call.  Counted by call, a long batch would end although no page fails twice.
            tries = 1 if gained else tries + 1
            if calls:
                self.counters.add("retried_calls")
            if len(done) == len(pages):
                if calls:
                    self.counters.add("recovered_calls")
                return done, None
            if gained == len(outcomes):
                if outcomes and outcomes[-1] is PageResult.WRONG_SIZE:
                    return done, None  # a backend may stop there
                raise self._broken(f"{call_name} answered for {gained} pages and says nothing of the rest")
            stopped = outcomes[gained]
            if not isinstance(stopped, StorageError) or stopped.reason != "io":
                break
            for page in pages[len(done) :]:
                page.restart()
            calls += 1
        return done, stopped

    def _write(self, pages: list[OutgoingPage]) -> tuple[list[PageOutcome], PageOutcome | None]:
        good = (PageResult.WRITTEN, PageResult.PRESENT)
        return self._repeat("write", self._backend.write_blocking, pages, good)

    def _replace(
        self, pages: list[OutgoingPage], outcomes: list[PageOutcome], stopped: PageOutcome | None
    ) -> tuple[list[PageOutcome], PageOutcome | None]:
        """What a write comes to when pages that were there, and are known to be unreadable, give way to ours."""
        for index, outcome in enumerate(outcomes):
            page = pages[index]
            if outcome is not PageResult.PRESENT or page.name.key not in self._negative:
                continue
            try:
                self._backend.delete_blocking([page.name])
            except StorageError as error:
                return outcomes[:index], error
            page.restart()
            again, failed = self._write([page])
            if failed is not None:
                return outcomes[:index], failed
            outcomes[index] = again[0]
            self.counters.add("replaced_pages")
        return outcomes, stopped

    def _encrypt(self, pages: list[OutgoingPage]) -> None:
        """Each page to a place of its own: a backend may write them side by side, and one of them twice."""
        cipher, size = self._shared.cipher, self._layout.payload_bytes
        if cipher is None:
            return
        if len(self._ciphertext) < len(pages) * size:
            self._ciphertext = bytearray(len(pages) * size)
        room = memoryview(self._ciphertext)
        for index, page in enumerate(pages):
            page.encrypt(cipher, room[index * size : (index + 1) * size])

    def _remove(self, page: IncomingPage, wrong: Verdict | PageResult) -> None:
        """Take a bad page out of every reader's way: left there it would be found, read and refused for ever."""
        if wrong is Verdict.OTHER_KEY:
            # Whole, and somebody's: it stays until we have a page for its place.
            self._negative.add(page.name.key)
            self.counters.add("other_key_pages")
            return
        self.counters.add("corrupt_pages")
        count = self.counters.get("corrupt_pages")
        # A disk that returns garbage does so for every page: each of ten is told, then each tenth, each hundredth ...
        level = logging.DEBUG if count % 10 ** (len(str(count)) - 1) else logging.WARNING
        _logger.log(level, "page %s is corrupt (%s); it is set aside (%d so far)", page.name, wrong.value, count)
        try:
            is_gone = self._backend.set_aside_blocking(page.name) is True
        except StorageError as error:
            is_gone = False
            _logger.warning("corrupt page %s cannot be set aside: %s", page.name, error)
        if is_gone:
            self.counters.add("set_aside_pages")
        else:
            self._negative.add(page.name.key)

    def _call(
        self, name: str, call: Callable[[Sequence[_Page]], list[PageOutcome]], pages: Sequence[_Page]
    ) -> list[PageOutcome]:
        """One call; a fault of the whole call is a fault of its first page."""
        try:
            outcomes = call(pages)
        except StorageError as error:
            return [error]
        if not isinstance(outcomes, list) or len(outcomes) > len(pages):
            raise self._broken(f"{name} of {len(pages)} pages answered {_short(outcomes)}")
        for outcome in outcomes:
            if not isinstance(outcome, (PageResult, StorageError)):
                raise self._broken(f"{name} answered {_short(outcome)} for a page")
        return outcomes

    def _count(self, answer: Any, name: str, limit: int | None) -> int:
        """A number of pages, or the backend has broken its contract."""
        is_number = isinstance(answer, int) and not isinstance(answer, bool)
        if not is_number or answer < 0 or (limit is not None and answer > limit):
            raise self._broken(f"{name} answered {_short(answer)}, not a number of pages")
        return answer

    def _broken(self, complaint: str) -> StorageError:
        self.counters.add("contract_faults")
        return StorageError(complaint, "contract")


def _wrong(
    page: IncomingPage, outcome: PageOutcome, previous: bytes, cipher: Cipher | None
) -> Verdict | PageResult | None:
    """What is wrong with a page that was read: None if it is good and follows the page before it."""
    if outcome is PageResult.WRONG_SIZE:
        return PageResult.WRONG_SIZE
    verdict = page.judge(cipher)
    if verdict is not Verdict.GOOD:
        return verdict
    return Verdict.OTHER_PAGE if previous and page.parent != previous else None


def _reason(stopped: PageOutcome | None) -> str:
    if isinstance(stopped, StorageError):
        return f"{stopped.reason}: {stopped}"
    return stopped.value if stopped is not None else ""


def _expect(found: object, wanted: object, complaint: str) -> None:
    if found != wanted:
        raise StorageError(f"self-test: the backend {complaint}", "refused")


def _short(answer: object) -> str:
    return repr(answer)[:80]
