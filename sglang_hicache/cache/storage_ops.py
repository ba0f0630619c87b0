"""The one door through which ops enter and leave storage: the slot's gate in front, the op table behind.

Prefetch and backup both use it, so "is storage on?" is asked in one place and every op that storage holds is
counted by the attachment it runs in.  Messages and instructions are collected for the loop; nothing is sent
here.  Replicated; changed only by `apply`.
"""

from __future__ import annotations

from sglang_hicache import wire
from sglang_hicache.cache.op import WRITES, Op, OpKind, OpTable
from sglang_hicache.storage.attachment import StorageSlot
from sglang_hicache.storage.attachment_events import Admitted, Instruction, OpClosed

#: Ops of one kind.  The storage process bounds its queues too; this bound is the one that all ranks agree on.
MAX_IN_FLIGHT = 256

#: Codes that say nothing of the page at which an op stopped: the store was not asked for it.
UNASKED = ("revoked", "queue_full", "gone")


class StorageOps:
    """Ops of the attached storage."""

    def __init__(self, slot: StorageSlot, ops: OpTable, op_timeout_s: float) -> None:
        self._slot = slot
        self._ops = ops
        self._op_timeout_us = int(op_timeout_s * 1e6)
        self.messages: list[tuple[int, wire.ToStorage]] = []
        self.instructions: list[Instruction] = []

    @property
    def tag(self) -> tuple[int, int] | None:
        """What a node that is stored now is marked with: (epoch, store generation); None: storage is off."""
        epoch = self._slot.gate()
        return None if epoch is None else (epoch, self._slot.generation)

    def is_present(self, op: Op) -> bool:
        """Does the op run in what is attached now?  What one of a store that drains has seen, or not seen, says nothing
        of the store that has taken over."""
        return op.epoch == self._slot.gate()

    def backend_of(self, op: Op) -> str:
        """Name of the backend that an op in flight is with."""
        attachment = self._slot.find(op.epoch)
        return attachment.backend if attachment is not None else ""

    def count(self, kind: OpKind) -> int:
        """Ops of a kind in flight in what is attached.  Those that a hanging store still holds while it drains, or in
        quarantine, take no place from those of the store after it."""
        epoch = self._slot.gate()
        return 0 if epoch is None else self._ops.count_in(epoch, kind)

    def admit(self, kind: OpKind, pages: int, now_us: int, rid: str = "") -> Op | None:
        """Enter an op, or None when the gate is closed or storage has enough to do."""
        tag = self.tag
        if tag is None or self.count(kind) >= MAX_IN_FLIGHT:
            return None
        op = self._ops.add(kind, pages, tag[0])
        op.rid, op.generation = rid, tag[1]
        op.deadline_us = now_us + self._op_timeout_us
        self.instructions += self._slot.handle(Admitted(tag[0]))
        return op

    def send(self, op: Op, message: wire.ToStorage) -> None:
        self.messages.append((op.epoch, message))

    def revoke(self, op: Op) -> None:
        if self._ops.revoke(op):
            self.send(op, wire.RevokeOp(op_id=op.id))

    def lane_moved(self, ended: Op, now_us: int) -> None:
        """An op has ended on every rank: those behind it in the lane get their time from now on.

        Sixteen large writes to a slow store take longer than one may; only a lane that stands still is lost.  An op
        that was revoked in the queue says nothing of the lane: under load a look-up that hangs is followed by many
        that are, and would never be noticed.
        """
        if ended.reason in UNASKED and not ended.done:
            return
        is_write = ended.kind in WRITES
        for op in self._ops.of_epoch(ended.epoch):
            if op.deadline_us and (op.kind in WRITES) == is_write:
                op.deadline_us = now_us + self._op_timeout_us

    def close(self, op: Op) -> None:
        """Every rank has let go of it."""
        self._ops.remove(op)
        self.instructions += self._slot.handle(OpClosed(op.epoch))

    def has_unsent(self) -> bool:
        return bool(self.messages or self.instructions)

    def take(self) -> tuple[list[tuple[int, wire.ToStorage]], list[Instruction]]:
        messages, instructions = self.messages, self.instructions
        self.messages, self.instructions = [], []
        return messages, instructions
