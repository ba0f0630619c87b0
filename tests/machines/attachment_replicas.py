"""One rank's slot and pages, and every such replica that an exploration has met.

Nothing here decides: a plan is handed to the real `StorageSlot`, and the pages of operations follow the
instructions that come out, as the cache controller would keep them.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, replace
from typing import NamedTuple

from sglang_hicache.storage.attachment import StorageAttachment, StorageSlot
from sglang_hicache.storage.attachment_events import (
    Admitted,
    Answer,
    Attach,
    Cancel,
    Cleared,
    Detach,
    FreeOps,
    Instruction,
    OpClosed,
    QuarantineOps,
    ReleaseQuarantine,
    State,
    Switch,
    Verdict,
)
from sglang_hicache.wire import StorageOutcome

#: What happens, and the epoch, operation or command that it is about.
Plan = tuple[str, str | int]

#: How a command ends that sets no time for what it lets run on; the time of any other may be over at once.
PATIENTLY = " patiently"


class BrokenPromise(AssertionError):
    """The exploration found a run that the design forbids."""


#: States that a deadline can end.
WAITING = (State.ATTACHING, State.DRAINING, State.DETACHING)


def promise(holds: object, text: str) -> None:
    if not holds:
        raise BrokenPromise(text)


class NoDigest:
    """Replicas are compared whole here; the digest has its own test."""

    value = 0

    def mix(self, *numbers: int) -> None:
        pass


@dataclass
class Replica:
    """One rank's slot, and the pages of its operations as the cache controller would keep them."""

    slot: StorageSlot
    free: list[int]
    #: operation -> (epoch, page)
    ops: dict[int, tuple[int, int]] = field(default_factory=dict)
    #: epoch -> pages
    quarantine: dict[int, list[int]] = field(default_factory=dict)
    answers: dict[str, Verdict] = field(default_factory=dict)
    #: Commands that were cancelled in time.
    cancelled: tuple[str, ...] = ()
    #: Epochs for whose end a command has set a time.
    hurried: tuple[int, ...] = ()

    def freeze(self) -> tuple:
        """Everything that can make a difference later; texts only as present or absent."""
        slot = self.slot
        places = (slot.current, slot.candidate, slot.retiring)
        return (
            tuple(astuple(replace(a, error="killed" if a.error else "")) if a else None for a in places),
            tuple(slot.quarantined.items()),
            tuple(slot.waiters),
            (slot.last_epoch, slot.generation, bool(slot.last_error)),
            tuple(sorted(self.free)),
            tuple(sorted(self.ops.items())),
            tuple(sorted((epoch, tuple(pages)) for epoch, pages in self.quarantine.items())),
            (tuple(self.answers.items()), self.cancelled, self.hurried),
        )

    @classmethod
    def thaw(cls, frozen: tuple) -> Replica:
        places, quarantined, waiters, (last_epoch, generation, has_error), free, ops, quarantine, told = frozen
        slot = StorageSlot(NoDigest())
        slot.current, slot.candidate, slot.retiring = (
            StorageAttachment(*place) if place else None for place in places
        )
        slot.quarantined, slot.waiters = dict(quarantined), list(waiters)
        slot.last_epoch, slot.generation, slot.last_error = last_epoch, generation, "failed" if has_error else ""
        held = {epoch: list(pages) for epoch, pages in quarantine}
        answers, cancelled, hurried = told
        return cls(slot, list(free), dict(ops), held, dict(answers), cancelled, hurried)

    def apply(self, plan: Plan) -> list[Instruction]:
        """Do what `SchedulerCore` and the controller do with one plan."""
        kind, subject = plan
        self._note_hurry(kind, str(subject))
        if kind in ("attach", "switch", "detach"):
            event = _change(kind, subject)
        elif kind == "cancel":
            event = self._cancel(subject)
        elif kind == "clear":
            self.answers[subject] = Verdict.OK  # clearing is the storage processes' business
            event = Cleared()
        elif kind == "admit":
            epoch = self.slot.gate()
            self.ops[subject] = (epoch, self.free.pop(0))
            event = Admitted(epoch)
        elif kind == "closed":
            epoch, page = self.ops.pop(subject)
            self._give_back([page])
            event = OpClosed(epoch)
        else:
            event = StorageOutcome(kind, subject)
        instructions = self.slot.handle(event)
        for instruction in instructions:
            self._carry_out(instruction)
        self.hurried = tuple(epoch for epoch in self.hurried if self.slot.find(epoch))
        return instructions

    def _note_hurry(self, kind: str, subject: str) -> None:
        slot, ending = self.slot, []
        if kind == "detach" and not subject.endswith(PATIENTLY):
            ending = slot.places()
        elif kind == "commit" and slot.candidate and slot.current and not slot.candidate.command_id.endswith(PATIENTLY):
            ending = [slot.current]
        self.hurried += tuple(a.epoch for a in ending if a.epoch not in self.hurried)

    def waits_patiently(self) -> bool:
        """Something hangs, and nobody has said how long it may."""
        return any(a.due_us is None and a.state in WAITING for a in self.slot.places())

    def _cancel(self, subject: str) -> Cancel:
        self.answers[subject] = Verdict.OK  # whether it came in time or not
        target, candidate = subject.split(maxsplit=2)[2], self.slot.candidate
        if candidate is not None and candidate.command_id == target and candidate.state is State.ATTACHING:
            self.cancelled += (target,)
        return Cancel(target)

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case FreeOps(epoch):
                self._give_back(self._take_ops(epoch))
            case QuarantineOps(epoch):
                self.quarantine[epoch] = self._take_ops(epoch)
            case ReleaseQuarantine(epoch):
                self._give_back(self.quarantine.pop(epoch))
            case Answer(command_id, verdict, detail):
                promise(command_id not in self.answers, f"{command_id!r} answered twice")
                promise(verdict is Verdict.OK or detail, f"{command_id!r} answered {verdict.value} without a reason")
                promise(verdict is not Verdict.OK or command_id not in self.cancelled, "cancelled, and yet committed")
                self.answers[command_id] = verdict

    def _take_ops(self, epoch: int) -> list[int]:
        pages = [page for its_epoch, page in self.ops.values() if its_epoch == epoch]
        self.ops = {op: rest for op, rest in self.ops.items() if rest[0] != epoch}
        return pages

    def _give_back(self, pages: list[int]) -> None:
        promise(not set(pages) & set(self.free), "a page was freed twice")
        self.free += pages

    def check(self, pages: int) -> None:
        """Promises about one replica, whatever its processes do."""
        slot = self.slot
        owned = [*self.free, *(page for _, page in self.ops.values()), *sum(self.quarantine.values(), [])]
        promise(sorted(owned) == list(range(pages)), f"pages leaked or owned twice: {sorted(owned)}")
        promise(slot.quarantined.keys() == self.quarantine.keys(), "the slot and the pages disagree on quarantine")
        gate = slot.current.epoch if slot.current and slot.current.state is State.ATTACHED else None
        promise(slot.gate() == gate, "the gate is open without ATTACHED")
        for a in slot.places():
            promise(a.state is not State.DETACHED, "a detached epoch keeps a place")
            hurried = a.epoch in self.hurried and a.state in WAITING
            promise(not hurried or a.due_us is not None, "a command has set a time, and it does not end")
            # It would wake the leader for ever.
            promise(a.due_us is None or a.state in WAITING, "a deadline, and nothing that it could end")
            promise(a.epoch not in slot.quarantined, "an epoch has a place and is in quarantine")
            count = sum(epoch == a.epoch for epoch, _ in self.ops.values())
            promise(slot.in_flight(a.epoch) == count, "the slot miscounts the operations of an epoch")
            promise(a.state is not State.DRAINING or a.in_flight, "draining, with nothing left to wait for")
            promise(a.state is not State.DETACHING or not a.in_flight, "stopped before its operations were closed")
        promise(not slot.waiters or slot.places(), "a detach waits for nothing")


def _change(kind: str, subject: str) -> Attach | Switch | Detach:
    due_us = None if subject.endswith(PATIENTLY) else 0
    if kind == "detach":
        return Detach(subject, due_us)
    backend = subject.split()[2]
    if kind == "switch":
        return Switch(subject, backend, "{}", backend == "late", due_us=0, drain_us=due_us)
    return Attach(subject, backend, "{}", backend == "late", due_us=0)


class Step(NamedTuple):
    """What a plan makes of a replica."""

    after: int
    instructions: list[Instruction]


class Replicas:
    """Every replica met so far, each with a number; the machine runs once for each (replica, plan)."""

    def __init__(self, pages: int) -> None:
        self._pages = pages
        self._numbers: dict[tuple, int] = {}
        self._known: list[Replica] = []
        self._steps: dict[tuple[int, Plan], Step] = {}
        self.first = self._number(Replica(StorageSlot(NoDigest()), list(range(pages))))

    def __getitem__(self, number: int) -> Replica:
        """For reading only."""
        return self._known[number]

    def apply(self, number: int, plan: Plan) -> Step:
        step = self._steps.get((number, plan))
        if step is None:
            replica = Replica.thaw(self._known[number].freeze())
            instructions = replica.apply(plan)
            step = self._steps[number, plan] = Step(self._number(replica), instructions)
        return step

    def _number(self, replica: Replica) -> int:
        replica.check(self._pages)
        number = self._numbers.setdefault(replica.freeze(), len(self._known))
        if number == len(self._known):
            self._known.append(replica)
        return number
