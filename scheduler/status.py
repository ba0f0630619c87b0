"""What one rank says of itself: its storage slot, its counters, its load.

Asked by the loop, outside the plan: nothing here changes anything, and nothing that decides reads it.  What every
rank must have alike comes from the replicated parts; what only this rank's hands know (its storage process) the loop
adds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sglang_hicache import wire
from sglang_hicache.cache.op import COPIES
from sglang_hicache.cache.tiers import Tiers
from sglang_hicache.cache.why import why
from sglang_hicache.scheduler.admission import Admission
from sglang_hicache.scheduler.failover import Failover
from sglang_hicache.scheduler.request import RequestState
from sglang_hicache.scheduler.served import Served
from sglang_hicache.scheduler.waiting import WaitingQueue
from sglang_hicache.storage.attachment_events import State

#: Ops between the host and the store, by the names that the status uses.
_STORAGE_OPS = ("lookup", "read", "write", "upload")

#: Counters of what an op has moved, or failed to: whoever attached the store meanwhile.
_MOVED = (
    "prefetch_prefetched_tokens", "prefetch_storage_transfer_tokens", "prefetch_anchor_lost_tokens",
    "backup_backuped_tokens", "backup_failed_tokens",
)  # fmt: skip


class RankStatus:
    """Reads the parts of one core."""

    def __init__(
        self, rank: int, tiers: Tiers, waiting: WaitingQueue, admission: Admission, served: Served, failover: Failover
    ) -> None:
        self._rank = rank
        self._tiers = tiers
        self._waiting = waiting
        self._admission = admission
        self._served = served
        self._failover = failover
        self._tick = 0
        self._now_us = 0
        #: Backend that was attached last, "" before the first; and what was counted up to its attach.
        self._backend = ""
        self._told: Counter[str] = Counter()
        #: By backend: what was counted while it was the last one.
        self._totals: dict[str, Counter[str]] = {}
        #: By backend: what has ended in it since then although another one serves.
        self._late: dict[str, Counter[str]] = {}

    def begin(self, plan: wire.TickPlan) -> None:
        """Before a plan is applied.  Its outcomes may attach another backend: what was counted until now is not its
        own."""
        self._tick, self._now_us = plan.number, plan.now_us
        if plan.storage:
            self._backend, self._totals = self._attached(), self._by_backend()
            self._told, self._late = self._storage_counters(), {}

    @contextmanager
    def credited(self, op_id: int) -> Iterator[None]:
        """An outcome is applied.  What an op moved that ends in the old store of a switch is not the new store's."""
        op = self._tiers.ops.get(op_id)
        if op is None or op.kind in COPIES or self._tiers.storage.is_present(op):
            yield
            return
        backend, before = self._tiers.storage.backend_of(op), self._storage_counters()
        yield
        moved = self._storage_counters() - before
        self._late.setdefault(backend, Counter()).update({name: n for name, n in moved.items() if name in _MOVED})

    def _attached(self) -> str:
        """The backend that counters speak of now: also after its end, for what it leaves behind is counted late."""
        current = self._tiers.slot.current
        return current.backend if current is not None else self._backend

    def _by_backend(self) -> dict[str, Counter[str]]:
        totals = {backend: Counter(counts) for backend, counts in self._totals.items()}
        if attached := self._attached():
            counted = self._storage_counters() - self._told
            for backend, late in self._late.items():
                counted -= late
                totals.setdefault(backend, Counter()).update(late)
            totals.setdefault(attached, Counter()).update(counted)
        return totals

    def requests(self) -> dict[str, int]:
        """Requests by stage; health probes are nobody's load."""
        running = [r for r in self._admission.running if not r.is_probe]
        return {
            "queue-req": sum(not r.is_probe for r in self._waiting),
            "running-req": len(running),
            "chunked-req": sum(r.state is RequestState.EXTENDING for r in running),
        }

    def answer(self, query_id: str, now_us: int = 0) -> wire.StatusAnswer:
        """This rank's storage slot and load; a rank without work has applied no plan for a while, and its own clock is
        the better one for people."""
        tiers, slot, controller = self._tiers, self._tiers.slot, self._tiers.controller
        now_us = max(now_us, self._now_us)
        breaker = self._failover.status(now_us)
        # During a switch one store serves from begin to end: who watches must not take that for an outage.
        shown = slot.current if slot.gate() is not None else slot.foremost()
        return wire.StatusAnswer(
            id=query_id,
            rank=self._rank,
            state=(shown.state if shown else State.DETACHED).value,
            epoch=shown.epoch if shown else slot.last_epoch,
            backend=shown.backend if shown else "",
            in_flight={kind: n for kind, n in tiers.ops.counts().items() if kind in _STORAGE_OPS},
            queued_backups=len(tiers.backup),
            quarantined_pages=tiers.quarantine.pages,
            extra_config_json=shown.extra_config_json if shown else "",
            last_error=slot.last_error,
            last_error_age_s=(now_us - slot.failed_us) / 1e6,
            prefetch_policy=tiers.prefetcher.policy,
            write_policy=controller.write_policy,
            counters=self._counters(),
            totals=self._by_backend(),
            lost_tokens={str(reason): tokens for reason, tokens in tiers.backup.books.lost.items()},
            why=why(tiers, now_us, breaker),
            breaker=breaker,
            incidents=tiers.incidents.snapshot(now_us),
            histograms=self._tiers.measures.snapshot() | self._served.histograms(),
            load=self._load(),
            places=self._places(),
        )

    def _places(self) -> list[wire.Place]:
        slot = self._tiers.slot
        by_role = {"current": slot.current, "candidate": slot.candidate, "retiring": slot.retiring}
        return [
            wire.Place(role=role, state=a.state.value, epoch=a.epoch, backend=a.backend, in_flight=a.in_flight)
            for role, a in by_role.items()
            if a is not None
        ]

    def _storage_counters(self) -> Counter[str]:
        """In tokens: what a backend has to do with."""
        prefetcher, books = self._tiers.prefetcher, self._tiers.backup.books
        found = Counter({f"prefetch_{name}_tokens": n for name, n in prefetcher.counters.items()})
        found.update({f"backup_{name}_tokens": n for name, n in books.counters.items()})
        found.update({f"lost_{reason}_tokens": n for reason, n in books.lost.items()})
        found["lost_tokens"] = books.lost.total()
        return found

    def _counters(self) -> dict[str, int]:
        cache = {f"cache_{name}_tokens": n for name, n in self._tiers.controller.counters.items()}
        found = self._storage_counters() | cache | self._served.counters() | self._tiers.incidents.counters
        return found | {"ticks": self._tick}

    def _load(self) -> dict[str, int]:
        ops, controller = self._tiers.ops, self._tiers.controller
        load = self.requests() | {"copy-ops": sum(ops.count(kind) for kind in COPIES)}
        for pool in (controller.device, controller.host):
            if pool is not None:
                load |= {f"{pool.name}_pages_free": pool.free_count, f"{pool.name}_pages": pool.total}
        evictable = controller.tree.device_tokens_evictable // self._tiers.page_size
        sizes = {"device_pages_evictable": evictable, "page_bytes": self._tiers.measures.page_bytes}
        return load | sizes | self._served.load()


def merged(one: Mapping[str, Mapping[str, int]], other: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Counters by backend of two that count different things."""
    return {backend: {**one.get(backend, {}), **other.get(backend, {})} for backend in sorted({*one, *other})}
