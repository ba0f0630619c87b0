"""Storage -> host: what a waiting request fetches, and whether it is still worth waiting for.

One `Prefetch` per waiting request: a look-up (how many of the missing pages does the store hold?), then a read of
that many into host pages, which are published as host-only nodes once they are whole on every rank.  A request
never waits in here; it waits in the queue, and admission asks `may_run`.  Stopping takes one tick: the op is
revoked, and the next plan says how many pages counted (the leader knows which ops are revoked).

Policies, budget and thresholds are those of the contract (section 4.4): `timeout` budget in seconds =
base + (tokens // page_size) * (page_size / 1024 * per_ki_token), counted from the first time the request could
have run but for the prefetch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum

from sglang_hicache import wire
from sglang_hicache.cache.backup import BackupQueue
from sglang_hicache.cache.controller import CacheController
from sglang_hicache.cache.op import Op, OpKind, OpPhase
from sglang_hicache.cache.page import page_keys
from sglang_hicache.cache.storage_ops import UNASKED, StorageOps
from sglang_hicache.cache.tree import Match, Node
from sglang_hicache.storage.settings import PrefetchSettings

#: Prefetches may claim this share of the host pool: more, and they evict what they are about to need.
CAPACITY_SHARE = 0.5


class PrefetchPhase(Enum):
    LOOKUP = "lookup"
    READ = "read"
    STOPPING = "stopping"  # revoked; the next plan says what counts
    OVER = "over"


#: Phases in which pages may still arrive.
RUNNING = (PrefetchPhase.LOOKUP, PrefetchPhase.READ)


@dataclass(slots=True, eq=False)
class Prefetch:
    """What one request asked of storage."""

    rid: str
    seed: bytes
    #: Flat key of the prompt up to the end of the wanted span.
    key: bytes
    #: Pages of the prompt that device or host held already.
    start_page: int
    keys: list[bytes]
    op: Op
    #: Leader's clock when the look-up counts as a miss.
    lookup_deadline_us: int
    phase: PrefetchPhase = PrefetchPhase.LOOKUP
    #: Leader's clock when the request was first held back by this prefetch.
    blocked_since_us: int | None = None
    #: Pages of the span that are now in the tree because storage had them, and the backend that had them.
    published: int = 0
    backend: str = ""


class Prefetcher:
    """All prefetches of this replica, by request id."""

    def __init__(
        self, controller: CacheController, storage: StorageOps, backup: BackupQueue, page_size: int, policy: str,
        lookup_timeout_s: float,
    ) -> None:
        self._controller = controller
        self._storage = storage
        self._backup = backup
        self._page_size = page_size
        self._lookup_timeout_us = int(lookup_timeout_s * 1e6)
        self.policy = policy
        self.settings = PrefetchSettings()
        self._by_rid: dict[str, Prefetch] = {}
        self._occupied_pages = 0
        #: In tokens; names as the metrics' reasons.
        self.counters: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._by_rid)

    @property
    def occupied_pages(self) -> int:
        """Host pages that prefetches have asked for."""
        return self._occupied_pages

    @property
    def threshold_pages(self) -> int:
        return max(1, -(-max(self.settings.prefetch_threshold, self._page_size) // self._page_size))

    def start(self, rid: str, seed: bytes, key: bytes, match: Match, tokens: list[int], now_us: int) -> None:
        """Look the missing span of a new request up, if storage is on and the span is long enough."""
        host = self._controller.host
        if self._storage.tag is None or host is None:
            return
        start = (match.device_len + match.host_len) // self._page_size
        wanted = len(key) // (4 * self._page_size) - start
        if wanted < self.threshold_pages:
            self.counters["below_threshold"] += max(wanted, 0) * self._page_size
            return
        if (self._occupied_pages + wanted) > max(host.total * CAPACITY_SHARE, self.threshold_pages):
            room = int(host.total * CAPACITY_SHARE) - self._occupied_pages
            if room < self.threshold_pages:
                room = 0
            self.counters["host_capacity"] += (wanted - room) * self._page_size
            wanted = room
            if not wanted:
                return
        op = self._storage.admit(OpKind.LOOKUP, wanted, now_us, rid)
        if op is None:
            self.counters["dropped"] += wanted * self._page_size
            return
        previous = self._controller.tree.last_key(match.host_node, seed)
        end = start + wanted
        keys = page_keys(tokens[start * self._page_size : end * self._page_size], self._page_size, previous)
        self._occupied_pages += wanted
        self._by_rid[rid] = Prefetch(
            rid, seed, key[: 4 * end * self._page_size], start, keys, op, now_us + self._lookup_timeout_us
        )
        self._storage.send(op, wire.LookupPages(op_id=op.id, keys=keys))

    # --------------------------------------------------------------------------------- asked by admission

    def may_run(self, rid: str, now_us: int) -> bool:
        """May the request be admitted now?  May decide that it has waited long enough."""
        prefetch = self._by_rid.get(rid)
        if prefetch is None or prefetch.phase is PrefetchPhase.OVER:
            return True
        if prefetch.phase is PrefetchPhase.STOPPING:
            return False
        if prefetch.blocked_since_us is None:
            prefetch.blocked_since_us = now_us
        deadline_us = self._deadline_us(prefetch)
        if deadline_us is None or now_us < deadline_us:
            return False
        self.counters["deadline"] += len(prefetch.keys) * self._page_size
        self._stop(prefetch)
        return prefetch.phase is PrefetchPhase.OVER

    def _deadline_us(self, prefetch: Prefetch) -> int | None:
        """When waiting ends: of a look-up its own deadline, of a read the policy's budget."""
        if self.policy == "best_effort":
            return 0
        if self.policy == "wait_complete":
            return None
        if prefetch.phase is PrefetchPhase.LOOKUP:
            return prefetch.lookup_deadline_us
        if prefetch.blocked_since_us is None:
            return None
        per_page_s = self._page_size / 1024 * self.settings.prefetch_timeout_per_ki_token
        budget_s = self.settings.prefetch_timeout_base + len(prefetch.keys) * per_page_s
        return prefetch.blocked_since_us + int(budget_s * 1e6)

    def next_deadline_us(self) -> int | None:
        deadlines = [self._deadline_us(p) for p in self._by_rid.values() if p.phase in RUNNING]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def is_waiting(self, rid: str) -> bool:
        """The request has a prefetch that may still bring pages."""
        prefetch = self._by_rid.get(rid)
        return prefetch is not None and prefetch.phase is not PrefetchPhase.OVER

    def _stop(self, prefetch: Prefetch) -> None:
        reading = prefetch.phase is PrefetchPhase.READ
        prefetch.phase = PrefetchPhase.STOPPING if reading else PrefetchPhase.OVER
        self._storage.revoke(prefetch.op)

    def stop_epoch(self, epoch: int) -> None:
        """The attachment drains or is lost: its requests go on with what has arrived."""
        for prefetch in self._by_rid.values():
            if prefetch.op.epoch == epoch and prefetch.phase in RUNNING:
                self._stop(prefetch)

    def forget(self, rid: str) -> None:
        """The request leaves the waiting queue for good.  Where its prefetch still runs, stops it: pages go back
        when the op closes."""
        prefetch = self._by_rid.pop(rid, None)
        if prefetch is None:
            return
        self._occupied_pages -= len(prefetch.keys)
        if prefetch.phase in RUNNING:
            self._stop(prefetch)

    def span_tokens(self, rid: str) -> tuple[int, int]:
        """Token range [start, end) of the prompt that storage contributed so far."""
        prefetch = self._by_rid.get(rid)
        if prefetch is None:
            return 0, 0
        start = prefetch.start_page * self._page_size
        return start, start + prefetch.published * self._page_size

    def backend(self, rid: str) -> str:
        """Name of the backend that the pages of `span_tokens` came from: after a switch another one may serve."""
        prefetch = self._by_rid.get(rid)
        return prefetch.backend if prefetch is not None else ""

    # ------------------------------------------------------------------------------------ outcomes of ops

    def lookup_settled(self, op: Op, now_us: int) -> None:
        """All ranks know how many pages the store holds: read them, or give up."""
        prefetch = self._by_rid.get(op.rid)
        if prefetch is None or prefetch.op is not op or prefetch.phase is not PrefetchPhase.LOOKUP:
            return
        prefetch.phase = PrefetchPhase.OVER
        hit = op.done
        self._missed(prefetch, op)
        if hit < self.threshold_pages:
            self.counters["miss"] += len(prefetch.keys) * self._page_size
            return
        host_pages = self._controller.allocate_host(hit)
        if host_pages is None:
            self.counters["host_capacity"] += hit * self._page_size
            return
        read = self._storage.admit(OpKind.READ, hit, now_us, op.rid)
        if read is None:  # the gate closed since the look-up, or too many reads run
            self._controller.host.free(host_pages)
            self.counters["dropped"] += hit * self._page_size
            return
        read.host_pages = host_pages
        prefetch.op, prefetch.phase = read, PrefetchPhase.READ
        self.counters["hit"] += hit * self._page_size
        self._storage.send(read, wire.ReadPages(op_id=read.id, keys=prefetch.keys[:hit], host_pages=host_pages))

    def read_settled(self, op: Op, tick: int) -> None:
        """`op.done` pages are whole on every rank: publish them; the op keeps the rest until it is closed."""
        prefetch = self._by_rid.get(op.rid)
        if prefetch is None or prefetch.op is not op:
            return  # the request is gone; the pages go back when the op closes
        was_cut_off = prefetch.phase is PrefetchPhase.STOPPING
        prefetch.phase = PrefetchPhase.OVER
        if op.done < op.pages:
            self.counters["storage_transfer"] += (op.pages - op.done) * self._page_size
            if not was_cut_off:  # a store that was not asked for a page has not missed it
                self._missed(prefetch, op)
        pages, op.host_pages = op.host_pages[: op.done], op.host_pages[op.done :]
        if not pages:
            return
        end = prefetch.start_page + len(pages)
        node, duplicates = self._controller.tree.insert_host(
            prefetch.seed, prefetch.key[: 4 * end * self._page_size], prefetch.start_page, pages, tick, 0
        )
        self._controller.host.free(duplicates)
        if node is None:  # the anchor was evicted while the pages were on their way
            self.counters["anchor_lost"] += len(pages) * self._page_size
            return
        prefetch.published, prefetch.backend = len(pages), self._storage.backend_of(op)
        self.counters["prefetched"] += len(pages) * self._page_size
        part: Node | None = node
        while part is not None and part.depth_pages >= prefetch.start_page and part.page_count:
            self._backup.found(part, (op.epoch, op.generation))
            part = part.parent

    def _missed(self, prefetch: Prefetch, op: Op) -> None:
        """The store has not given the page after the last: somebody else may have put it into the tree meanwhile, and
        believe it stored."""
        if op.done < op.pages and op.reason not in UNASKED and self._storage.is_present(op):
            self._backup.not_there(prefetch.seed, prefetch.key, prefetch.start_page + op.done)

    def close(self, op: Op) -> None:
        """No rank touches the pages any more."""
        if op.kind is OpKind.READ and op.phase is OpPhase.SETTLED and op.host_pages:
            self._controller.host.free(op.host_pages)
            op.host_pages = []
        self._storage.close(op)

    def epoch_gone(self, op: Op) -> None:
        """The op went with its attachment, without an outcome of its own."""
        prefetch = self._by_rid.get(op.rid)
        if prefetch is not None and prefetch.op is op:
            prefetch.phase = PrefetchPhase.OVER
