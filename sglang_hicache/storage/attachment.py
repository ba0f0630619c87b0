"""The attachment machine: which storage is attached, and who owns the memory of its unfinished operations.

A `StorageAttachment` is one epoch of one backend on all ranks.  A rank's `StorageSlot` has three places for
them: `current` takes operations once it is ATTACHED, `candidate` is opening, `retiring` is the old one of a
switch.  `SchedulerCore.apply` hands the slot every event of the plan, on the scheduler thread, and carries out
the instructions that come back; "is storage on?" is asked of `gate()` and of nothing else.

The slot is replicated: it moves only by events of the plan, so all ranks hold equal slots.  It never starts,
signals or waits for anything, reads no clock and touches no page: the storage driver does the first, the
leader the second, the cache controller the third.  What it counts is the operations of each epoch, and what it
remembers is by when each must have ended (`due_us`); that the time has come is an event like any other.

The leader plans at most one outcome per epoch in one plan, and no outcome of an operation together with the
end of its epoch: either would find the state that the other has just left.

What each state makes of each event is the table in `attachment_table.py`.
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

import msgspec

from sglang_hicache.errors import IntegrityError
from sglang_hicache.storage.attachment_events import (
    Answer,
    Attach,
    Cancel,
    Cleared,
    Detach,
    Event,
    Instruction,
    Kind,
    State,
    Switch,
    Verdict,
    kind_of,
)
from sglang_hicache.storage.attachment_table import TABLE, Never, StorageAttachment
from sglang_hicache.story import Story

if TYPE_CHECKING:
    from sglang_hicache.cache.digest import StateDigest


class StorageSlot:
    """The storage of one rank: one truth, replicated on all ranks."""

    def __init__(self, digest: StateDigest) -> None:
        self.current: StorageAttachment | None = None
        self.candidate: StorageAttachment | None = None
        self.retiring: StorageAttachment | None = None
        #: Epochs without a place whose pages are set aside, each with the number of its operations.
        self.quarantined: dict[int, int] = {}
        #: Detach commands: answered when all three places are empty.
        self.waiters: list[str] = []
        self.last_epoch = 0
        #: Leader's clock of the plan that is being applied.
        self.now_us = 0
        #: Counts clears; nodes tag "stored" with (epoch, generation).
        self.generation = 0
        self._last_error = ""
        #: Leader's clock when it was set.
        self.failed_us = 0
        self._digest = digest
        #: Without the operations, which would soon push the attachments out of it.
        self._story = Story("the storage slot")

    def __repr__(self) -> str:
        places = (("current", self.current), ("candidate", self.candidate), ("retiring", self.retiring))
        parts = [f"{name}: {attachment}" for name, attachment in places if attachment] or [State.DETACHED.name]
        parts += [f"quarantined: {sorted(self.quarantined)}"] if self.quarantined else []
        return f"<StorageSlot {' | '.join(parts)}>"

    def places(self) -> list[StorageAttachment]:
        """The attachments that exist."""
        return [a for a in (self.current, self.candidate, self.retiring) if a is not None]

    def find(self, epoch: int) -> StorageAttachment | None:
        """The attachment of an epoch, or None when it has no place (any more)."""
        return next((a for a in self.places() if a.epoch == epoch), None)

    def foremost(self) -> StorageAttachment | None:
        """What a command or a status meets: unfinished business first, so only one change is ever under way."""
        return self.candidate or self.retiring or self.current

    def face(self) -> State:
        """State of the foremost attachment."""
        foremost = self.foremost()
        return foremost.state if foremost else State.DETACHED

    def gate(self) -> int | None:
        """Epoch that takes new operations, if one does."""
        if self.current is not None and self.current.state is State.ATTACHED:
            return self.current.epoch
        return None

    def serving(self) -> str:
        """Backend that takes new operations, "" if none does."""
        return self.current.backend if self.current is not None and self.gate() is not None else ""

    def next_deadline_us(self) -> int | None:
        """When the patience with one of the attachments ends."""
        return min((a.due_us for a in self.places() if a.due_us is not None), default=None)

    def in_flight(self, epoch: int) -> int:
        """Operations of an epoch that are admitted and not closed."""
        attachment = self.find(epoch)
        return attachment.in_flight if attachment else 0

    @property
    def last_error(self) -> str:
        """Why the latest attachment failed or was killed; "" after a commit."""
        return self._last_error

    @last_error.setter
    def last_error(self, why: str) -> None:
        self._last_error, self.failed_us = why, self.now_us

    @property
    def epoch(self) -> int:
        """Epoch that `face()` speaks of; when detached the last one, 0 before the first."""
        foremost = self.foremost()
        return foremost.epoch if foremost else self.last_epoch

    @property
    def backend(self) -> str:
        """Backend that `face()` speaks of, "" when detached."""
        foremost = self.foremost()
        return foremost.backend if foremost else ""

    @property
    def extra_config_json(self) -> str:
        """Extra config of the backend that `face()` speaks of, "" when detached."""
        foremost = self.foremost()
        return foremost.extra_config_json if foremost else ""

    def expects(self, outcome: str, epoch: int) -> bool:
        """Whether an outcome has a handler now: the leader drops facts that came too late to matter."""
        attachment = self.find(epoch)
        if outcome == Kind.QUIET.value:
            return attachment is None and epoch in self.quarantined
        state = attachment.state if attachment else State.DETACHED
        return not isinstance(TABLE[state, Kind(outcome)], Never)

    def handle(self, event: Event) -> list[Instruction]:
        """Take one event of the plan; return what this rank must do now, in order."""
        kind = kind_of(event)
        instructions: list[Instruction] = []
        for state, attachment in self._subjects(event):
            cell = TABLE[state, kind]
            if isinstance(cell, Never):
                self.broken(f"{kind.value} met {state.value}: {cell.reason}", event)
            instructions += cell(self, attachment, event)
        instructions += self._answer_waiters()
        self._mix(kind, event)
        if kind not in (Kind.ADMITTED, Kind.OP_CLOSED):
            self._story.note(f"{event} -> {self!r}")
        return instructions

    def leave(self, attachment: StorageAttachment) -> None:
        """Empty the place of an attachment."""
        places = (self.current, self.candidate, self.retiring)
        self.current, self.candidate, self.retiring = (None if place is attachment else place for place in places)

    def broken(self, what: str, event: Event) -> NoReturn:
        """Fail loudly, with what led here."""
        error = IntegrityError(f"storage attachment: {what}\n  event: {event}\n  slot: {self!r}")
        raise self._story.attach_to(error)

    def _subjects(self, event: Event) -> list[tuple[State, StorageAttachment | None]]:
        """The attachments that an event is about, each with its state; DETACHED where there is none."""
        if isinstance(event, Attach | Switch | Cleared):
            return [(self.face(), self.foremost())]
        found: list[StorageAttachment | None]
        match event:
            case Detach():
                found = [*self.places()]
            case Cancel(command_id):
                found = [a for a in self.places() if command_id and a.command_id == command_id]
            case _:
                found = [self.find(event.epoch)]
        return [(a.state if a else State.DETACHED, a) for a in found or [None]]

    def _answer_waiters(self) -> Iterator[Instruction]:
        if self.places():
            return
        verdict, detail = Verdict.OK, ""
        if self.quarantined:
            verdict, detail = Verdict.PAGES_HELD, f"in quarantine: epoch {', '.join(map(str, self.quarantined))}"
        for command_id in self.waiters:
            yield Answer(command_id, verdict, detail)
        self.waiters = []

    def _mix(self, kind: Kind, event: Event) -> None:
        """Everything that an event can change, so that no handler can forget to."""
        text = zlib.crc32(msgspec.msgpack.encode(event))
        numbers = [_CODE[kind], text, self.last_epoch, self.generation, len(self.waiters)]
        for place in (self.current, self.candidate, self.retiring):
            numbers += (place.epoch, _CODE[place.state], place.in_flight, place.due_us or 0) if place else (0,)
        self._digest.mix(*numbers, *self.quarantined)


_CODE: dict[enum.Enum, int] = {member: number for group in (State, Kind) for number, member in enumerate(group)}
