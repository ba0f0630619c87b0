"""When the next write may start: bounds that keep the store from holding up the rest of the cache.

    writes in flight      enough to keep the lane busy while answers travel, few enough to drain fast
    pages of one write    no single write may come near the time-out of an op
    host pages locked     a write locks what it reads and everything above it: most of the host pool must stay free to
                          go, or prefill and demotion would find no room while a store is slow
    uploads               bounded in rate, and after all fresh backups
    a full store          one write at a time tries whether there is room again

Asked by `BackupWriter`; replicated, so the only clock is the plan's.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_hicache.cache.node import Node
from sglang_hicache.cache.tree import PrefixTree
from sglang_hicache.config import ServerConfig

MAX_WRITES = 16
MAX_UPLOADS = 4

#: One write: whichever is less.  64 MiB take a second even at the speed of an old disk.
MOST_PAGES = 256
MOST_BYTES = 64 << 20
#: Share of the host pool that may be locked when another write starts.  One write may always run.
LOCKED_SHARE = 0.25

#: Where the size of a token is not known (simulated servers), a page counts as this many bytes.
ASSUMED_PAGE_BYTES = 1 << 20

FIRST_DELAY_US = 500_000
LONGEST_DELAY_US = 30_000_000
#: Attempts to write one page, and tries of a full store, before what waits is given up.
MAX_ATTEMPTS = 5


def delay_us(failures: int) -> int:
    """After so many failures in a row: 0.5 s, 1, 2, 4, 8 ..."""
    return min(FIRST_DELAY_US << min(failures - 1, 16), LONGEST_DELAY_US)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that follow from the configuration, the same on every rank."""

    #: Pages of one write.
    op_pages: int
    #: Host pages locked.
    locked_pages: int
    #: Time that one uploaded page takes up; 0: nothing is uploaded.
    upload_page_us: int

    @staticmethod
    def of(config: ServerConfig) -> Limits:
        pool, rate = config.pool, config.storage.upload_rate_mib
        page_bytes = pool.page_size * pool.token_bytes or ASSUMED_PAGE_BYTES
        locked_pages = int(pool.host_tokens // pool.page_size * LOCKED_SHARE)
        op_pages = max(1, min(MOST_PAGES, MOST_BYTES // page_bytes, locked_pages))
        return Limits(op_pages, locked_pages, max(1, int(page_bytes / (rate * 1.048576))) if rate else 0)


class FullStore:
    """A store that has no room is asked again and again, by one write at a time and ever less often."""

    def __init__(self) -> None:
        self.since_us: int | None = None
        self.probe_at_us = 0
        self.failures = 0
        #: Op that tries whether there is room, 0: none.
        self._probe = 0

    def may_try(self, now_us: int, in_flight: int) -> bool:
        return self.since_us is None or (not in_flight and now_us >= self.probe_at_us)

    def started(self, op_id: int) -> None:
        if self.since_us is not None:
            self._probe = op_id

    def refused(self, op_id: int, now_us: int) -> bool:
        """There was no room for this write; True: it is time to give up what waits."""
        if self.since_us is None:
            self.since_us = now_us
        elif op_id != self._probe:
            return False  # it was under way when the store became full
        self.failures += 1
        self.probe_at_us = now_us + delay_us(self.failures)
        return self.failures >= MAX_ATTEMPTS

    def accepted(self) -> None:
        self.since_us, self.failures = None, 0


class UploadPace:
    """Spreads uploads over time."""

    def __init__(self, page_us: int) -> None:
        self._page_us = page_us
        self.next_us = 0

    def took(self, pages: int, now_us: int) -> None:
        self.next_us = max(now_us, self.next_us) + pages * self._page_us


def has_room(tree: PrefixTree, node: Node, most_pages: int) -> bool:
    """May a write of this node lock what it must, with no more than `most_pages` of the host locked then?"""
    return locked_with(tree, node) <= most_pages


def locked_with(tree: PrefixTree, node: Node) -> int:
    """Host pages that are locked once a write of this node has begun."""
    locked = (tree.host_tokens - tree.host_tokens_evictable) // tree.page_size
    above: Node | None = node
    while above is not None and not above.host_locks:
        locked += above.page_count if above.host_pages is not None else 0
        above = above.parent
    return locked
