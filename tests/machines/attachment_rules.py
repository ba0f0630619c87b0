"""What a rank consists of besides its replica, and the rules by which leader and ranks act.

The rules are a class of small decisions, so that a mutant can get one of them wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from sglang_hicache.storage.attachment import StorageAttachment, StorageSlot
from sglang_hicache.storage.attachment_events import State
from tests.machines.attachment_replicas import Plan, Replica

#: (kind, epoch or operation, rank)
Fact = tuple[str, int, int]


class Life(StrEnum):
    """Of a storage process; one that is reaped and quiet is no longer listed."""

    STARTING = "starting"
    OPEN = "open"
    LEAVING = "leaving"
    #: Does not answer, and does not go by itself.
    HUNG = "hung"
    #: Killed; the pidfd has not fired yet.
    DYING = "dying"
    #: Killed, but in an uninterruptible call.
    STUCK = "stuck"
    #: Reaped, but its hardware still writes.
    LINGERING = "lingering"


class Process(NamedTuple):
    epoch: int
    late_io: bool
    life: Life
    #: (operation, page): pages that this process may write at any moment.
    jobs: tuple[tuple[int, int], ...] = ()


class Rank(NamedTuple):
    replica: int
    #: Plans sent and not applied yet: ordered, never lost.
    plans: tuple[Plan, ...] = ()
    processes: tuple[Process, ...] = ()

    def process(self, epoch: int) -> Process | None:
        return next((p for p in self.processes if p.epoch == epoch), None)

    def put(self, process: Process) -> Rank:
        return self._replace(processes=tuple(process if p.epoch == process.epoch else p for p in self.processes))

    def without(self, epoch: int) -> Rank:
        return self._replace(processes=tuple(p for p in self.processes if p.epoch != epoch))


class Rules:
    """How the leader decides, and what a rank may do by itself (nothing)."""

    def votes_suffice(self, said: int, ranks: int) -> bool:
        return said == ranks

    def reaps_suffice(self, said: int, ranks: int) -> bool:
        return said == ranks

    def closes_suffice(self, said: int, ranks: int) -> bool:
        return said == ranks

    def quarantine_may_end(self, reaped: int, quiet: int, ranks: int) -> bool:
        return reaped == quiet == ranks

    def writes_off(self) -> bool:
        return True

    def own_decisions(self, rank: Rank, slot: StorageSlot) -> Iterator[Plan]:
        """Outcomes that a follower would take from what it sees itself."""
        yield from ()

    def outcomes(self, replica: Replica, facts: frozenset[Fact], ranks: int) -> Iterator[Plan]:
        """Every outcome that the leader may plan now."""
        said: dict[tuple[str, int], int] = {}
        for kind, number, _ in facts:
            said[kind, number] = said.get((kind, number), 0) + 1
        for a in replica.slot.places():
            yield from self._outcomes_of(a, said, ranks)
        for op in replica.ops:
            if self.closes_suffice(said.get(("closed", op), 0), ranks):
                yield "closed", op
        for epoch in replica.quarantine:
            if self.quarantine_may_end(said.get(("reaped", epoch), 0), said.get(("quiet", epoch), 0), ranks):
                yield "quiet", epoch

    def _outcomes_of(self, a: StorageAttachment, said: dict[tuple[str, int], int], ranks: int) -> Iterator[Plan]:
        epoch, state = a.epoch, a.state
        reaped = self.reaps_suffice(said.get(("reaped", epoch), 0), ranks)
        bad = next((kind for kind in ("open_failed", "lost") if (kind, epoch) in said), None)
        if state in (State.ATTACHING, State.ATTACHED, State.DRAINING) and bad:
            yield bad, epoch  # one rank's loss is everybody's
        elif state is State.ATTACHING and self.votes_suffice(said.get(("opened", epoch), 0), ranks):
            yield "commit", epoch
        if a.due_us is not None and not (state is State.DETACHING and reaped):
            yield "deadline", epoch
        if state in (State.DETACHING, State.FAILED) and reaped:
            yield "reaped", epoch
        elif state is State.FAILED and ("reap_timeout", epoch) in said and self.writes_off():
            yield "reap_timeout", epoch
