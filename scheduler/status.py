"""What one rank says of itself: its storage slot, its counters, its load.

Asked by the loop, outside the plan: nothing here changes anything, and nothing that decides reads it.  What every
rank must have alike comes from the replicated parts; what only this rank's hands know (its storage process) the loop
adds.
"""

from __future__ import annotations

from sglang_hicache import wire
from sglang_hicache.cache.op import COPIES
from sglang_hicache.cache.tiers import Tiers
from sglang_hicache.scheduler.admission import Admission
from sglang_hicache.scheduler.request import RequestState
from sglang_hicache.scheduler.waiting import WaitingQueue

#: Ops between the host and the store, by the names that the status uses.
_STORAGE_OPS = ("lookup", "read", "write")


class RankStatus:
    """Reads the parts of one core."""

    def __init__(self, rank: int, tiers: Tiers, waiting: WaitingQueue, admission: Admission) -> None:
        self._rank = rank
        self._tiers = tiers
        self._waiting = waiting
        self._admission = admission

    def requests(self) -> dict[str, int]:
        """Requests by stage; health probes are nobody's load."""
        running = [r for r in self._admission.running if not r.is_probe]
        return {
            "queue-req": sum(not r.is_probe for r in self._waiting),
            "running-req": len(running),
            "chunked-req": sum(r.state is RequestState.EXTENDING for r in running),
        }

    def answer(self, query_id: str) -> wire.StatusAnswer:
        """This rank's storage slot and load."""
        tiers, slot, controller = self._tiers, self._tiers.slot, self._tiers.controller
        return wire.StatusAnswer(
            id=query_id,
            rank=self._rank,
            state=slot.face().value,
            epoch=slot.epoch,
            backend=slot.backend,
            in_flight={kind: n for kind, n in tiers.ops.counts().items() if kind in _STORAGE_OPS},
            queued_backups=len(tiers.backup),
            quarantined_pages=tiers.quarantine.pages,
            extra_config_json=slot.extra_config_json,
            last_error=slot.last_error,
            prefetch_policy=tiers.prefetcher.policy,
            write_policy=controller.write_policy,
            counters=self._counters(),
            load=self._load(),
        )

    def _counters(self) -> dict[str, int]:
        tiers = self._tiers
        counters = {f"prefetch_{name}_tokens": n for name, n in tiers.prefetcher.counters.items()}
        counters |= {f"backup_{name}_tokens": n for name, n in tiers.backup.counters.items()}
        return counters | {f"cache_{name}_tokens": n for name, n in tiers.controller.counters.items()}

    def _load(self) -> dict[str, int]:
        ops, controller = self._tiers.ops, self._tiers.controller
        load = self.requests() | {"copy-ops": sum(ops.count(kind) for kind in COPIES)}
        for pool in (controller.device, controller.host):
            if pool is not None:
                load |= {f"{pool.name}_pages_free": pool.free_count, f"{pool.name}_pages": pool.total}
        return load
