"""One moving span of pages: an id, an epoch, and what must be given back when it ends.

The op table is the count of obligations: whoever asks "is anything in flight?" asks it, and an obligation is
entered where it is created, so no list of conditions has to remember it.  Replicated on every rank; changed
only by `SchedulerCore.apply`.  Pure: no thread, clock, socket or torch.

Life of an op: added -> settled (`done` pages are whole on every rank and may be published) -> closed (no rank
touches its pages again; slots and locks go back).  A revoked op keeps its slots until it is closed, because the
process that was told to stop may still be writing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

from sglang_hicache.cache.digest import StateDigest
from sglang_hicache.cache.tree import Node
from sglang_hicache.errors import IntegrityError


class OpKind(IntEnum):
    """What moves, and in which direction."""

    WRITE_THROUGH = 1  # device -> host; the device copy stays
    DEMOTE = 2  # device -> host; the device copy is given up (write_back)
    LOAD_BACK = 3  # host -> device
    LOOKUP = 4  # asks storage; moves nothing
    READ = 5  # storage -> host (prefetch)
    WRITE = 6  # host -> storage (backup)
    UPLOAD = 7  # the same in the background: of what was cached before the storage was attached


COPIES = frozenset({OpKind.WRITE_THROUGH, OpKind.DEMOTE, OpKind.LOAD_BACK})
WRITES = frozenset({OpKind.WRITE, OpKind.UPLOAD})


class OpPhase(IntEnum):
    """How far an op has come, as all ranks agreed."""

    RUNNING = 1
    REVOKED = 2  # told to stop; what is whole by now counts, and nothing later
    SETTLED = 3  # `done` is final


@dataclass(slots=True, eq=False)
class Op:
    """One entry of the op table."""

    id: int
    kind: OpKind
    #: Number of the attachment it runs in; 0 for copies between device and host.
    epoch: int
    #: Pages asked for.
    pages: int
    #: Host slots that the op owns (READ, WRITE_THROUGH) or reads (DEMOTE, LOAD_BACK, WRITE, UPLOAD).
    host_pages: list[int] = field(default_factory=list)
    #: Bottom node of the span it moves (None for LOOKUP and READ, whose span is not in the tree yet).
    node: Node | None = None
    #: Request it works for, or "".
    rid: str = ""
    #: Store generation when it started: a write that ends after a clear proves nothing.
    generation: int = 0
    #: Leader's clock when it started.
    started_us: int = 0
    #: Leader's clock: neither closed by then nor any op of its lane means that the lane is lost.  0: no deadline.
    deadline_us: int = 0
    phase: OpPhase = OpPhase.RUNNING
    done: int = 0
    #: Why `done` is short: "" or a code such as "io" or "no_space".
    reason: str = ""
    #: Microseconds that the slowest store worked on it; 0: not known.
    took_us: int = 0

    def __repr__(self) -> str:
        return f"<Op {self.id} {self.kind.name} epoch={self.epoch} {self.done}/{self.pages} {self.phase.name}>"


class OpTable:
    """All ops in flight on this replica, in the order in which they started."""

    def __init__(self, digest: StateDigest) -> None:
        self._digest = digest
        self._ops: dict[int, Op] = {}
        self._last_id = 0
        #: Leader's clock of this tick.
        self.now_us = 0
        self._count = dict.fromkeys(OpKind, 0)
        #: By epoch and kind.
        self._count_in: Counter[tuple[int, OpKind]] = Counter()

    def __len__(self) -> int:
        return len(self._ops)

    def __iter__(self) -> Iterator[Op]:
        return iter(self._ops.values())

    def get(self, op_id: int) -> Op | None:
        return self._ops.get(op_id)

    def count(self, kind: OpKind) -> int:
        return self._count[kind]

    def count_in(self, epoch: int, kind: OpKind) -> int:
        """Ops of one attachment in flight."""
        return self._count_in[epoch, kind]

    def counts(self) -> dict[str, int]:
        """Ops in flight by lower-case kind, kinds without any left out."""
        return {kind.name.lower(): n for kind, n in self._count.items() if n}

    def of_epoch(self, epoch: int) -> list[Op]:
        return [op for op in self._ops.values() if op.epoch == epoch and op.kind not in COPIES]

    def add(self, kind: OpKind, pages: int, epoch: int = 0) -> Op:
        self._last_id += 1
        op = Op(self._last_id, kind, epoch, pages, started_us=self.now_us)
        self._ops[op.id] = op
        self._count[kind] += 1
        self._count_in[epoch, kind] += 1
        self._digest.mix(51, op.id, kind, pages, epoch)
        return op

    def settle(self, op: Op, done: int) -> None:
        """All ranks hold the first `done` pages; later answers add nothing."""
        if op.phase is OpPhase.SETTLED or not 0 <= done <= op.pages:
            raise IntegrityError(f"{op!r} cannot settle at {done} pages")
        op.phase, op.done = OpPhase.SETTLED, done
        self._digest.mix(52, op.id, done)

    def revoke(self, op: Op) -> bool:
        """True if the op was running: the caller then tells its storage process."""
        if op.phase is not OpPhase.RUNNING:
            return False
        op.phase = OpPhase.REVOKED
        self._digest.mix(53, op.id)
        return True

    def remove(self, op: Op) -> None:
        """The op is closed, or its epoch is reaped: the caller gives back what it held."""
        if self._ops.pop(op.id, None) is not op:
            raise IntegrityError(f"{op!r} is removed twice")
        self._count[op.kind] -= 1
        self._count_in[op.epoch, op.kind] -= 1
        if not self._count_in[op.epoch, op.kind]:
            del self._count_in[op.epoch, op.kind]
        self._digest.mix(54, op.id)

    def next_deadline_us(self) -> int | None:
        return min((op.deadline_us for op in self._ops.values() if op.deadline_us), default=None)
