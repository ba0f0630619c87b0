"""Storage -> host: what a waiting request fetches, and whether it is still worth waiting for.

One `Prefetch` per waiting request: a look-up (how many of the missing pages does the store hold?), then a read of
that many into host pages, which are published as host-only nodes once they are whole on every rank.  A request
never waits in here; it waits in the queue, and admission asks `may_run`.  Stopping takes one tick: the op is
revoked, and the next plan says how many pages counted (the leader knows which ops are revoked).

Policies, budget and thresholds are those of the contract (section 4.4): `timeout` budget in seconds =
base + (tokens // page_size) * (page_size / 1024 * per_ki_token), counted from the first time the request could
have run but for the prefetch.  Under that policy the cost gate (`cost_gate.py`) stands before both: it says who asks
the store at all, and waiting ends when it no longer pays.  What came during a forward is seen only after it, so that a
deadline is judged as of the forward's beginning.
"""

from __future__ import annotations

from collections import Counter

import msgspec

from sglang_hicache import wire
from sglang_hicache.cache.backup import BackupQueue
from sglang_hicache.cache.controller import CacheController
from sglang_hicache.cache.cost_gate import PATIENCE, CostGate
from sglang_hicache.cache.op import Op, OpKind, OpPhase
from sglang_hicache.cache.page import page_keys
from sglang_hicache.cache.prefetch_record import RUNNING, Prefetch, PrefetchPhase
from sglang_hicache.cache.storage_ops import UNASKED, StorageOps
from sglang_hicache.cache.tree import Match, Node
from sglang_hicache.storage.settings import PrefetchSettings

#: Prefetches may claim this share of the host pool: more, and they evict what they are about to need.
CAPACITY_SHARE = 0.5


class Prefetcher:
    """All prefetches of this replica, by request id."""

    def __init__(
        self, controller: CacheController, storage: StorageOps, backup: BackupQueue, gate: CostGate, page_size: int,
        policy: str, lookup_timeout_s: float,
    ) -> None:
        self._controller = controller
        self._storage = storage
        self._backup = backup
        self.gate = gate
        self._page_size = page_size
        self._lookup_timeout_us = int(lookup_timeout_s * 1e6)
        self.policy = policy
        self.settings = PrefetchSettings()
        self._by_rid: dict[str, Prefetch] = {}
        #: Belongs to no request any more: kept until its op is closed, so that a store that hangs has one of them.
        self._probe: Prefetch | None = None
        #: What was decided for each request that waits in line and lacks something.
        self._decisions: dict[str, wire.FetchDecision] = {}
        self._occupied_pages = 0
        #: Of the reads that run.
        self._reading_pages = 0
        #: Leader's clock when it last saw what has arrived: now, or before the forward that has just ended.
        self._seen_us = 0
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

    @property
    def _is_gated(self) -> bool:
        """`wait_complete` waits whatever it costs, and under `best_effort` nobody waits."""
        return self.settings.cost_gate and self.policy == "timeout"

    def begin_tick(self, now_us: int, forward_us: int) -> None:
        """Before anything of a plan is applied."""
        self._seen_us = now_us - forward_us
        self.gate.forward_took(forward_us)
        probe = self._probe
        if probe is not None and probe.phase in RUNNING and self._seen_us >= (self._deadline_us(probe) or now_us):
            self._give_up(probe)

    def start(self, rid: str, seed: bytes, key: bytes, match: Match, tokens: list[int], now_us: int) -> None:
        """Look the missing span of a new request up, if storage is on, the span is long enough and it should pay."""
        tag = self._storage.tag
        if tag is None or self._controller.host is None:
            return
        start = (match.device_len + match.host_len) // self._page_size
        wanted = self._room(len(key) // (4 * self._page_size) - start)
        if not wanted:
            return
        self.gate.attached(tag[0])
        decision = self._decide(wanted * self._page_size, now_us)
        if decision.verdict == "recompute":
            self.counters["not_worth"] += decision.tokens
            self._decided(rid, decision)
            return
        is_probe = decision.verdict == "probe"
        op = self._storage.admit(OpKind.LOOKUP, wanted, now_us, "" if is_probe else rid)
        if op is None:
            self.counters["dropped"] += decision.tokens
            return
        self._decided(rid, decision)
        previous = self._controller.tree.last_key(match.host_node, seed)
        end = start + wanted
        keys = page_keys(tokens[start * self._page_size : end * self._page_size], self._page_size, previous)
        self._occupied_pages += wanted
        prefetch = Prefetch(
            rid, seed, key[: 4 * end * self._page_size], start, keys, op, now_us + self._lookup_timeout_us
        )
        if is_probe:
            prefetch.blocked_since_us = now_us
            self._probe = prefetch
            self.gate.probed(now_us)
        else:
            self._by_rid[rid] = prefetch
        self._storage.send(op, wire.LookupPages(op_id=op.id, keys=keys))

    def _room(self, wanted: int) -> int:
        """Pages of those wanted that are asked for; 0: too few are wanted, or there is too little room for them."""
        host = self._controller.host
        if host is None or wanted < self.threshold_pages:
            self.counters["below_threshold"] += max(wanted, 0) * self._page_size
            return 0
        if (self._occupied_pages + wanted) <= max(host.total * CAPACITY_SHARE, self.threshold_pages):
            return wanted
        room = int(host.total * CAPACITY_SHARE) - self._occupied_pages
        if room < self.threshold_pages:
            room = 0
        self.counters["host_capacity"] += (wanted - room) * self._page_size
        return room

    def _decide(self, tokens: int, now_us: int) -> wire.FetchDecision:
        if self._is_gated:
            ahead = self._reading_pages * self._page_size
            return self.gate.decide(tokens, ahead, now_us, may_probe=self._probe is None)
        why = "cost_gate is false" if self.policy == "timeout" else f"prefetch policy {self.policy}"
        return wire.FetchDecision(verdict="fetch", reason=why, tokens=tokens)

    def _decided(self, rid: str, decision: wire.FetchDecision | None) -> None:
        """Remember it; None: the request leaves the line.  Who does not fetch is in the way of those who compute."""
        before = self._decisions.pop(rid, None)
        if before is not None and before.verdict != "fetch":
            self.gate.waiting_tokens -= before.tokens
        if decision is not None:
            self._decisions[rid] = decision
            self.gate.waiting_tokens += decision.tokens if decision.verdict != "fetch" else 0

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
        if deadline_us is None or self._seen_us < deadline_us:
            return False
        self.counters["deadline"] += len(prefetch.keys) * self._page_size
        self._give_up(prefetch)
        return prefetch.phase is PrefetchPhase.OVER

    def _deadline_us(self, prefetch: Prefetch) -> int | None:
        """When waiting ends: of a look-up its own deadline, of a read the policy's budget; both when it stops to pay."""
        if self.policy == "best_effort":
            return 0
        if self.policy == "wait_complete":
            return None
        blocked_us, tokens = prefetch.blocked_since_us, len(prefetch.keys) * self._page_size
        is_lookup = prefetch.phase is PrefetchPhase.LOOKUP
        if blocked_us is None:
            return prefetch.lookup_deadline_us if is_lookup else None
        per_page_s = self._page_size / 1024 * self.settings.prefetch_timeout_per_ki_token
        policy_s = self.settings.prefetch_timeout_base + len(prefetch.keys) * per_page_s
        policy_us = blocked_us + int(policy_s * 1e6)
        if prefetch is self._probe:
            return policy_us
        loss_us = self.gate.budget_us(tokens) if self._is_gated else None
        if is_lookup:
            most_us = prefetch.lookup_deadline_us
            return most_us if loss_us is None else min(most_us, blocked_us + loss_us)
        if loss_us is None or prefetch.read_by_us is None:
            return policy_us
        return min(policy_us, max(blocked_us + loss_us, prefetch.read_by_us if self.gate.keeps_its_word else 0))

    def next_deadline_us(self) -> int | None:
        probe = [self._probe] if self._probe is not None else []
        deadlines = [self._deadline_us(p) for p in [*self._by_rid.values(), *probe] if p.phase in RUNNING]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def is_waiting(self, rid: str) -> bool:
        """The request has a prefetch that may still bring pages."""
        prefetch = self._by_rid.get(rid)
        return prefetch is not None and prefetch.phase is not PrefetchPhase.OVER

    def decision(self, rid: str, now_us: int) -> wire.FetchDecision | None:
        """What was decided for a request that waits in line, and what came of it; None: there was nothing to decide."""
        decision, prefetch = self._decisions.get(rid), self._by_rid.get(rid)
        if decision is None or prefetch is None or prefetch.blocked_since_us is None:
            return decision
        return msgspec.structs.replace(decision, waited_s=(now_us - prefetch.blocked_since_us) / 1e6)

    def _give_up(self, prefetch: Prefetch) -> None:
        """It takes longer than anybody waits."""
        if self.policy != "best_effort":  # there nobody waits, and it may have been quick
            prefetch.is_late = True
            if prefetch.phase is PrefetchPhase.LOOKUP:
                self.gate.lookup_given_up(prefetch.op.epoch, self._took_us(prefetch.op))
        self._stop(prefetch)

    def _stop(self, prefetch: Prefetch) -> None:
        reading = prefetch.phase is PrefetchPhase.READ
        self._move(prefetch, PrefetchPhase.STOPPING if reading else PrefetchPhase.OVER)
        self._storage.revoke(prefetch.op)

    def _move(self, prefetch: Prefetch, phase: PrefetchPhase) -> None:
        """Every change of phase."""
        pages = prefetch.op.pages
        self._reading_pages += pages * ((phase is PrefetchPhase.READ) - (prefetch.phase is PrefetchPhase.READ))
        prefetch.phase = phase

    def _took_us(self, op: Op) -> int:
        return max(0, self._seen_us - op.started_us)

    def stop_epoch(self, epoch: int) -> None:
        """The attachment drains or is lost: its requests go on with what has arrived."""
        probe = [self._probe] if self._probe is not None else []
        for prefetch in [*self._by_rid.values(), *probe]:
            if prefetch.op.epoch == epoch and prefetch.phase in RUNNING:
                self._stop(prefetch)

    def forget(self, rid: str) -> None:
        """The request leaves the waiting queue for good.  Where its prefetch still runs, stops it: pages go back
        when the op closes."""
        self._decided(rid, None)
        prefetch = self._by_rid.pop(rid, None)
        if prefetch is None:
            return
        self._occupied_pages -= len(prefetch.keys)
        if prefetch.phase in RUNNING:
            self._stop(prefetch)

    def stop_probe(self) -> None:
        """Somebody waits for storage to come to rest."""
        if self._probe is not None and self._probe.phase in RUNNING:
            self._stop(self._probe)

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
        self._missed(prefetch, op)
        if op.reason not in UNASKED:
            self.gate.looked_up(op.epoch, self._took_us(op), failed=bool(op.reason))
        if hit < self.threshold_pages:
            self.counters["miss"] += len(prefetch.keys) * self._page_size
            return
        if self._is_gated and prefetch is not self._probe:
            if objection := self.gate.objects_to_read(hit * self._page_size, self._reading_pages * self._page_size):
                self.counters["not_worth"] += hit * self._page_size
                decision = self._decisions[op.rid]
                self._decided(op.rid, msgspec.structs.replace(decision, verdict="recompute", reason=objection))
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
        expected_us = self.gate.read_us(hit * self._page_size, prefetch.ahead)
        prefetch.read_by_us = None if expected_us is None else now_us + PATIENCE * expected_us
        self.counters["hit"] += hit * self._page_size
        self._storage.send(read, wire.ReadPages(op_id=read.id, keys=prefetch.keys[:hit], host_pages=host_pages))

    def read_settled(self, op: Op, tick: int) -> None:
        """`op.done` pages are whole on every rank: publish them; the op keeps the rest until it is closed."""
        prefetch = self._of(op)
        if prefetch is None:
            return  # the request is gone; the pages go back when the op closes
        was_cut_off = prefetch.phase is PrefetchPhase.STOPPING
        self._move(prefetch, PrefetchPhase.OVER)
        if prefetch.is_late or op.reason not in UNASKED:
            asked, done = op.pages * self._page_size, op.done * self._page_size
            self.gate.read(op.epoch, self._took_us(op), prefetch.ahead, asked, done, given_up=prefetch.is_late)
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
        self._end_probe(op)

    def _end_probe(self, op: Op) -> None:
        """If this op was its last: the next one may begin."""
        if self._probe is not None and self._probe.op is op:
            self._occupied_pages -= len(self._probe.keys)
            self._probe = None

    def epoch_gone(self, op: Op) -> None:
        """The op went with its attachment, without an outcome of its own."""
        prefetch = self._of(op)
        if prefetch is not None:
            self._move(prefetch, PrefetchPhase.OVER)
        self._end_probe(op)
