"""How long ops took and how much they moved, in buckets.

`Measures` belongs to the tiers of one replica and is fed at the end of each op.  Its only clock is the plan's: a
duration reaches from the plan that started an op to the plan that says that it has ended on every rank, so that all
replicas count alike and the clocks of two machines are never compared.  Nothing that decides reads it.
"""

from __future__ import annotations

from bisect import bisect_left

from sglang_hicache import wire
from sglang_hicache.cache.op import COPIES, Op, OpKind

#: Upper bounds of the buckets, in seconds: of every kind of op, and of the two that other servers tell as well.
OP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
LOAD_BACK_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
BACKUP_SECONDS = OP_SECONDS
#: Pages of one op, and GB (1e9 bytes) per second of one rank.
PAGES = (1.0, 5.0, 10.0, 50.0, 100.0)
GB_PER_S = (0.1, 0.5, 1.0, 5.0, 10.0, 50.0, 100.0)
#: Tokens of one prompt.
PROMPT_TOKENS = (16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0)

#: Direction of an op between host and storage, in the names of its measures.
_DIRECTION = {OpKind.READ: "prefetch", OpKind.WRITE: "backup", OpKind.UPLOAD: "backup"}


class Histogram:
    """Observations of one kind, by size."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        """Count a value in the first bucket whose bound it does not exceed."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def snapshot(self) -> wire.Histogram:
        """A copy."""
        return wire.Histogram(bounds=self._bounds, counts=tuple(self._counts), total=self._total)


class Measures:
    """All histograms of one replica's ops, by name; a name with a slash ends in the kind of op or the backend."""

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self._histograms: dict[str, Histogram] = {}

    def op_ended(self, op: Op, now_us: int, backend: str = "") -> None:
        """Every rank has let go of an op; `backend` is the name of the one that it used."""
        seconds = (now_us - op.started_us) / 1e6
        self._observe(f"op_duration_seconds/{op.kind.name.lower()}", OP_SECONDS, seconds)
        if op.kind is OpKind.LOAD_BACK:
            self._observe("load_back_duration_seconds", LOAD_BACK_SECONDS, seconds)
        elif op.kind in COPIES:
            self._observe("hicache_backup_duration_seconds", BACKUP_SECONDS, seconds)
        elif op.kind in _DIRECTION and op.done:  # an op that moved nothing says nothing about how fast things move
            direction = _DIRECTION[op.kind]
            self._observe(f"{direction}_pgs/{backend}", PAGES, op.done)
            if seconds > 0:
                self._observe(f"{direction}_bandwidth/{backend}", GB_PER_S, op.done * self.page_bytes / 1e9 / seconds)

    def _observe(self, name: str, bounds: tuple[float, ...], value: float) -> None:
        histogram = self._histograms.get(name)
        if histogram is None:
            histogram = self._histograms[name] = Histogram(bounds)
        histogram.observe(value)

    def snapshot(self) -> dict[str, wire.Histogram]:
        """All of them by name; what has never happened may be missing."""
        return {name: histogram.snapshot() for name, histogram in sorted(self._histograms.items())}
