"""What the ops of the attached store say about its health.

Fed with the end of each op, judged once in a plan.  A failure is an op that the store was asked for and could not do;
no room, a miss and an op that was called off are none.  Slow is measured as the time for which ops held their lane, per
page, against a mean of ops of the same kind and size that slow ones do not move; the ends of one lane that one plan
brings together are one measurement, and only if they are of one kind.

Ends are noticed between two forwards.  A prefill of a second must not make a store look slow, so what the forwards of
the last two ticks took is taken off (two, for a follower's report may miss the plan after its own forward).  A look-up
that had to let a batch of a read finish says nothing of look-ups.

Replicated: the only clock is the plan's.  Where nothing is watched an end costs one comparison.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from sglang_hicache.cache.digest import StateDigest
from sglang_hicache.cache.op import WRITES, Op, OpKind
from sglang_hicache.cache.storage_ops import UNASKED
from sglang_hicache.storage.fault_tolerance import FaultTolerance

#: Reasons for which an op stops short although nothing is wrong with the store.
HARMLESS = frozenset({"", "no_space", "miss", "other_key", *UNASKED})

#: Kinds whose failures in a row are counted, each for itself, as people call them; uploads are writes.
NAMES = {OpKind.LOOKUP: "look-ups", OpKind.READ: "reads", OpKind.WRITE: "writes"}

#: Measurements that a mean is made of before it is trusted, and the share of a new one after that: slow enough that a
#: store which gets slower and slower over hours is followed, and one that stalls is not.
LEARNING, SHARE = 16, 64

#: Parts in which the window moves on.
_PARTS = 10


@dataclass(slots=True)
class _Mean:
    """Microseconds for a page."""

    value_us: int = 0
    count: int = 0

    def learn(self, page_us: int) -> None:
        self.count += 1
        self.value_us += (page_us - self.value_us) // min(self.count, SHARE)


class Paces:
    """How fast one store is when it is well: by kind of op and size, since a page of a long read costs less."""

    def __init__(self) -> None:
        self._means: dict[tuple[OpKind, int], _Mean] = {}

    def learn(self, kind: OpKind, pages: int, page_us: int) -> None:
        """A measurement of a store that is well."""
        self._means.setdefault((kind, pages.bit_length()), _Mean()).learn(page_us)

    def page_us(self, kind: OpKind, pages: int) -> int | None:
        """Microseconds for a page of such an op; None: too little is known."""
        mean = self._means.get((kind, pages.bit_length()))
        return mean.value_us if mean is not None and mean.count >= LEARNING else None

    def one_page_us(self) -> int | None:
        """At most how long one page took to be written and read: no op is faster than one of a single page."""
        fastest: dict[OpKind, int] = {}
        for (kind, size), mean in self._means.items():
            if kind is not OpKind.LOOKUP and mean.count >= LEARNING:
                op_us = mean.value_us << (size - 1)
                fastest[kind] = min(op_us, fastest.get(kind, op_us))
        return sum(fastest.values()) * 2 // len(fastest) if fastest else None


@dataclass(slots=True)
class _Part:
    """What happened in a part of the window."""

    began_us: int
    ops: int = 0
    failures: int = 0
    measured: int = 0
    slow: int = 0


@dataclass(slots=True)
class _Row:
    """One kind of op."""

    failures: int = 0
    reason: str = ""
    slow: int = 0
    #: Of the latest slow one: microseconds for a page, and what would have been slow at least.
    page_us: int = 0
    limit_us: int = 0


@dataclass(slots=True)
class _Watch:
    """The store that is watched."""

    epoch: int
    limits: FaultTolerance
    paces: Paces
    rows: dict[OpKind, _Row] = field(default_factory=lambda: {kind: _Row() for kind in NAMES})
    window: deque[_Part] = field(default_factory=deque)
    #: Leader's clock of the latest end in the lane of writes (True) and in the other.
    lane_end_us: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    #: The same for reads.
    read_end_us: int = 0


class Evidence:
    """Of one replica's attached store."""

    def __init__(self, digest: StateDigest) -> None:
        self._digest = digest
        self._watch: _Watch | None = None
        #: Ops that this plan has closed.
        self._ended: list[Op] = []
        #: How long the forward took that came before the latest plan.
        self._forward_us = 0

    def watch(self, epoch: int, limits: FaultTolerance, paces: Paces) -> None:
        """From now on this one; `paces` is what is known of the same store, and learns."""
        self._watch, self._ended = _Watch(epoch, limits, paces), []

    def rest(self) -> None:
        """Nothing is watched."""
        self._watch, self._ended = None, []

    def op_ended(self, op: Op) -> None:
        """Every rank has let go of an op."""
        if self._watch is not None and op.epoch == self._watch.epoch:
            self._ended.append(op)

    def judge(self, now_us: int, forward_us: int, reads: int, recompute_page_us: int) -> str:
        """Once in a plan: "" or what is wrong, beginning with a code.  `reads` are in flight; a page can be computed in
        `recompute_page_us` (0: nobody knows)."""
        computing_us, self._forward_us = forward_us + self._forward_us, forward_us
        watch, ended = self._watch, self._ended
        if watch is None:
            return ""
        if ended:
            self._ended = []
            part = _part_of(watch, now_us)
            for is_write in (False, True):
                lane = [op for op in ended if (op.kind in WRITES) is is_write]
                if lane:
                    self._measure(watch, part, lane, now_us, computing_us, reads, recompute_page_us)
                    watch.lane_end_us[is_write] = now_us
            for op in ended:
                _count(watch, part, op)
            self._digest.mix(71, part.ops, part.failures, part.measured, part.slow)
        return _complaint(watch, now_us)

    def _measure(
        self, watch: _Watch, part: _Part, lane: list[Op], now_us: int, computing_us: int, reads: int,
        recompute_page_us: int,
    ) -> None:
        """One measurement of the ops of one lane that have ended since the plan before."""
        kinds = {_kind(op) for op in lane}
        began_us = max(watch.lane_end_us[lane[0].kind in WRITES], min(op.started_us for op in lane))
        waited_for_read = reads or watch.read_end_us > began_us or OpKind.READ in kinds
        if OpKind.READ in kinds:
            watch.read_end_us = now_us
        if len(kinds) > 1 or any(op.reason not in HARMLESS for op in lane):
            return
        kind = _kind(lane[0])
        if kind is OpKind.LOOKUP and waited_for_read:
            return
        pages = sum(map(_pages, lane))
        page_us = max(0, now_us - began_us - computing_us) // pages
        known_us = watch.paces.page_us(kind, pages // len(lane) or 1)
        limit_us = None if known_us is None else _limit_us(watch.limits, kind, known_us, recompute_page_us)
        is_slow = limit_us is not None and page_us >= limit_us
        if not is_slow and any(op.reason in UNASKED and not op.done for op in lane):
            return  # most of these never had their turn
        row = watch.rows[kind]
        part.measured += 1
        if is_slow and limit_us is not None:
            part.slow += 1
            row.slow, row.page_us, row.limit_us = row.slow + 1, page_us, limit_us
        else:
            row.slow = 0
            watch.paces.learn(kind, pages // len(lane) or 1, page_us)


def _kind(op: Op) -> OpKind:
    return OpKind.WRITE if op.kind in WRITES else op.kind


def _pages(op: Op) -> int:
    """Pages that it may have worked on, at most."""
    return op.pages if op.reason in UNASKED else min(op.pages, op.done + 1)


def _limit_us(limits: FaultTolerance, kind: OpKind, known_us: int, recompute_page_us: int) -> int:
    """Microseconds for a page from which on an op is slow."""
    slow_us = int(known_us * limits.slow_factor)
    # A store that was never worth its while has not become worse; that it is left aside is up to the cost gate.
    if kind is OpKind.READ and 2 * known_us <= recompute_page_us:
        slow_us = min(slow_us, recompute_page_us)
    return max(slow_us, int(limits.slow_min_s * 1e6))


def _part_of(watch: _Watch, now_us: int) -> _Part:
    """The part of the window that is now; what is older than the window is forgotten."""
    window_us = int(watch.limits.window_s * 1e6)
    while watch.window and watch.window[0].began_us <= now_us - window_us:
        watch.window.popleft()
    if not watch.window or now_us - watch.window[-1].began_us >= window_us // _PARTS:
        watch.window.append(_Part(now_us))
    return watch.window[-1]


def _count(watch: _Watch, part: _Part, op: Op) -> None:
    """A success or a failure, if it is either."""
    if op.reason in UNASKED and not op.done:
        return
    row = watch.rows[_kind(op)]
    part.ops += 1
    if op.reason in HARMLESS:
        row.failures = 0
    else:
        part.failures += 1
        row.failures += 1
        row.reason = op.reason


def _complaint(watch: _Watch, now_us: int) -> str:
    """What is wrong with the store, "" if nothing is."""
    limits = watch.limits
    for kind, row in watch.rows.items():
        if row.failures >= limits.consecutive_errors:
            return f"tripped_errors: {row.failures} {NAMES[kind]} in a row failed, the last with {row.reason!r}"
        if row.slow >= limits.consecutive_errors:
            return (
                f"tripped_slow: {row.slow} {NAMES[kind]} in a row were slow, the last with {row.page_us / 1e6:.3f} s "
                f"for a page; from {row.limit_us / 1e6:.3f} s on it is slow"
            )
    alive_us = now_us - int(limits.window_s * 1e6)
    parts = [part for part in watch.window if part.began_us > alive_us]
    ops, failures = sum(part.ops for part in parts), sum(part.failures for part in parts)
    if ops >= limits.min_ops and failures >= limits.error_ratio * ops:
        return f"tripped_errors: {failures} of {ops} operations failed within {limits.window_s:g} s"
    measured, slow = sum(part.measured for part in parts), sum(part.slow for part in parts)
    if measured >= limits.min_ops and slow >= limits.error_ratio * measured:
        return f"tripped_slow: {slow} of {measured} measurements within {limits.window_s:g} s were slow"
    return ""
