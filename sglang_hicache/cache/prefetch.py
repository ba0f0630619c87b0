"""Storage -> host: what waiting requests fetch.

One `Prefetch` per waiting request: a look-up (how many of the missing pages does the store hold?), then a read of
that many into host pages, which are published as host-only nodes once they are whole on every rank.  A request
never waits in here; it waits in the queue, and admission asks `may_run`.  Stopping takes one tick: the op is
revoked, and the next plan says how many pages counted (the leader knows which ops are revoked).

Whether a request fetches at all, and for how long it waits, is known to `prefetch_waits.py`.  A probe is a prefetch
that outlives its request: nobody waits for it, and it shows how fast the store is.
"""

from __future__ import annotations

from collections import Counter

from sglang_hicache import wire
from sglang_hicache.cache.backup import BackupQueue
from sglang_hicache.cache.controller import CacheController
from sglang_hicache.cache.op import Op, OpKind, OpPhase
from sglang_hicache.cache.page import page_keys
from sglang_hicache.cache.prefetch_record import RUNNING, Prefetch, PrefetchPhase
from sglang_hicache.cache.prefetch_waits import Waits
from sglang_hicache.cache.storage_ops import UNASKED, StorageOps
from sglang_hicache.cache.tree import Match, Node
from sglang_hicache.storage.settings import PrefetchSettings

#: Prefetches may claim this share of the host pool: more, and they evict what they are about to need.
CAPACITY_SHARE = 0.5


class Prefetcher:
    """All prefetches of this replica, by request id."""

    def __init__(
        self, controller: CacheController, storage: StorageOps, backup: BackupQueue, waits: Waits, page_size: int,
        policy: str,
    ) -> None:
        self._controller = controller
        self._storage = storage
        self._backup = backup
        self.waits = waits
        self._page_size = page_size
        self.policy = policy
        self.settings = PrefetchSettings()
        self._by_rid: dict[str, Prefetch] = {}
        #: Belongs to no request any more: kept until its op is closed, so that a store that hangs has one of them.
        self._probe: Prefetch | None = None
        #: Host pages that prefetches have asked for.
        self.occupied_pages = 0
        #: Of the reads that run.
        self._reading_pages = 0
        #: In tokens; names as the metrics' reasons.
        self.counters: Counter[str] = Counter()

    @property
    def threshold_pages(self) -> int:
        return max(1, -(-max(self.settings.prefetch_threshold, self._page_size) // self._page_size))

    def begin_tick(self, now_us: int, forward_us: int) -> None:
        """Before anything of a plan is applied."""
        self.waits.begin_tick(now_us, forward_us)
        probe = self._probe
        if probe is not None and probe.phase in RUNNING and self.waits.is_over(probe, self.policy, self.settings):
            self.waits.given_up(probe, self.policy)
            self._stop(probe)

    def start(self, rid: str, seed: bytes, key: bytes, match: Match, tokens: list[int], now_us: int) -> None:
        """Look the missing span of a new request up, if storage is on, the span is long enough and it should pay."""
        tag = self._storage.tag
        if tag is None or self._controller.host is None:
            return
        start = (match.device_len + match.host_len) // self._page_size
        wanted = self._room(len(key) // (4 * self._page_size) - start)
        if not wanted:
            return
        self.waits.gate.attached(tag[0])
        ahead = self._reading_pages * self._page_size
        decision = self.waits.decide(
            wanted * self._page_size, ahead, now_us, self._probe is None, self.policy, self.settings
        )
        self.counters[f"gate_{decision.verdict}"] += decision.tokens
        if decision.verdict == "recompute":
            self.counters["not_worth"] += decision.tokens
            self.waits.decided(rid, decision)
            return
        is_probe = decision.verdict == "probe"
        op = self._storage.admit(OpKind.LOOKUP, wanted, now_us, "" if is_probe else rid)
        if op is None:
            self.counters["dropped"] += decision.tokens
            return
        self.waits.decided(rid, decision)
        previous = self._controller.tree.last_key(match.host_node, seed)
        end = start + wanted
        keys = page_keys(tokens[start * self._page_size : end * self._page_size], self._page_size, previous)
        self.occupied_pages += wanted
        wanted_key = key[: 4 * end * self._page_size]
        prefetch = Prefetch(rid, seed, wanted_key, start, keys, op, ahead=ahead, is_probe=is_probe)
        if is_probe:
            prefetch.blocked_since_us, self._probe = now_us, prefetch
        else:
            self._by_rid[rid] = prefetch
        self._storage.send(op, wire.LookupPages(op_id=op.id, keys=keys))

    def _room(self, wanted: int) -> int:
        """Pages of those wanted that are asked for; 0: too few are wanted, or there is too little room for them."""
        host = self._controller.host
        if host is None or wanted < self.threshold_pages:
            self.counters["below_threshold"] += max(wanted, 0) * self._page_size
            return 0
        if (self.occupied_pages + wanted) <= max(host.total * CAPACITY_SHARE, self.threshold_pages):
            return wanted
        room = int(host.total * CAPACITY_SHARE) - self.occupied_pages
        if room < self.threshold_pages:
            room = 0
        self.counters["host_capacity"] += (wanted - room) * self._page_size
        return room

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
        if not self.waits.is_over(prefetch, self.policy, self.settings):
            return False
        self.counters["deadline"] += len(prefetch.keys) * self._page_size
        self.waits.given_up(prefetch, self.policy)
        self._stop(prefetch)
        return prefetch.phase is PrefetchPhase.OVER

    def next_deadline_us(self) -> int | None:
        deadlines = [self.waits.deadline_us(p, self.policy, self.settings) for p in self._running()]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _running(self) -> list[Prefetch]:
        probe = [self._probe] if self._probe is not None else []
        return [prefetch for prefetch in [*self._by_rid.values(), *probe] if prefetch.phase in RUNNING]

    def is_waiting(self, rid: str) -> bool:
        """The request has a prefetch that may still bring pages."""
        prefetch = self._by_rid.get(rid)
        return prefetch is not None and prefetch.phase is not PrefetchPhase.OVER

    def decision(self, rid: str, now_us: int) -> wire.FetchDecision | None:
        """What was decided for a request that waits in line; None: there was nothing to decide."""
        prefetch = self._by_rid.get(rid)
        return self.waits.decision(rid, prefetch.blocked_since_us if prefetch is not None else None, now_us)

    def _stop(self, prefetch: Prefetch) -> None:
        reading = prefetch.phase is PrefetchPhase.READ
        self._move(prefetch, PrefetchPhase.STOPPING if reading else PrefetchPhase.OVER)
        self._storage.revoke(prefetch.op)

    def _move(self, prefetch: Prefetch, phase: PrefetchPhase) -> None:
        """Every change of phase."""
        pages = prefetch.op.pages
        self._reading_pages += pages * ((phase is PrefetchPhase.READ) - (prefetch.phase is PrefetchPhase.READ))
        prefetch.phase = phase

    def stop_epoch(self, epoch: int) -> None:
        """The attachment drains or is lost: its requests go on with what has arrived."""
        for prefetch in self._running():
            if prefetch.op.epoch == epoch:
                self._stop(prefetch)

    def stop_probe(self) -> None:
        """Somebody waits for storage to come to rest."""
        if self._probe is not None and self._probe.phase in RUNNING:
            self._stop(self._probe)

    def forget(self, rid: str) -> None:
        """The request leaves the waiting queue for good.  Where its prefetch still runs, stops it: pages go back
        when the op closes."""
        self.waits.decided(rid, None)
        prefetch = self._by_rid.pop(rid, None)
        if prefetch is None:
            return
        self.occupied_pages -= len(prefetch.keys)
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

    def _of(self, op: Op) -> Prefetch | None:
        """Whose op it is; None: nobody's any more."""
        for prefetch in (self._by_rid.get(op.rid), self._probe):
            if prefetch is not None and prefetch.op is op:
                return prefetch
        return None

    def lookup_settled(self, op: Op, now_us: int) -> None:
        """All ranks know how many pages the store holds: read them, or give up."""
        prefetch = self._of(op)
        if prefetch is None or prefetch.phase is not PrefetchPhase.LOOKUP:
            return
        self._move(prefetch, PrefetchPhase.OVER)
        hit = op.done
        self._backup.known.add(prefetch.keys[:hit])
        self._missed(prefetch, op)
        if hit < self.threshold_pages:
            self.counters["miss"] += len(prefetch.keys) * self._page_size
            return
        tokens, ahead = hit * self._page_size, self._reading_pages * self._page_size
        if self.waits.objects_to_read(prefetch, tokens, ahead, self.policy, self.settings):
            self.counters["not_worth"] += tokens
            return
        self._read(prefetch, hit, now_us)

    def _read(self, prefetch: Prefetch, hit: int, now_us: int) -> None:
        """The store has so many of its pages."""
        host_pages = self._controller.allocate_host(hit)
        if host_pages is None:
            self.counters["host_capacity"] += hit * self._page_size
            return
        read = self._storage.admit(OpKind.READ, hit, now_us, prefetch.op.rid)
        if read is None:  # the gate closed since the look-up, or too many reads run
            self._controller.host.free(host_pages)
            self.counters["dropped"] += hit * self._page_size
            return
        read.host_pages = host_pages
        prefetch.op, prefetch.ahead = read, self._reading_pages * self._page_size
        self._move(prefetch, PrefetchPhase.READ)
        self.waits.reads(prefetch, hit * self._page_size, now_us)
        self.counters["hit"] += hit * self._page_size
        self._storage.send(read, wire.ReadPages(op_id=read.id, keys=prefetch.keys[:hit], host_pages=host_pages))

    def read_settled(self, op: Op, tick: int) -> None:
        """`op.done` pages are whole on every rank: publish them; the op keeps the rest until it is closed."""
        prefetch = self._of(op)
        if prefetch is None:
            return  # the request is gone; the pages go back when the op closes
        was_cut_off = prefetch.phase is PrefetchPhase.STOPPING
        self._move(prefetch, PrefetchPhase.OVER)
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
        self.waits.ended(op, self.threshold_pages)
        self._end_probe(op)

    def _end_probe(self, op: Op) -> None:
        """If this op was its last: the next one may begin."""
        if self._probe is not None and self._probe.op is op:
            self.occupied_pages -= len(self._probe.keys)
            self._probe = None

    def epoch_gone(self, op: Op) -> None:
        """The op went with its attachment, without an outcome of its own."""
        prefetch = self._of(op)
        if prefetch is not None:
            self._move(prefetch, PrefetchPhase.OVER)
        self._end_probe(op)
