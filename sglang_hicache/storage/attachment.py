"""The attachment machine: which storage is attached, and who owns the memory of its unfinished operations.

A `StorageAttachment` is one epoch of one backend on all ranks.  A rank's `StorageSlot` has three places for
them: `current` takes operations once it is ATTACHED, `candidate` is opening, `retiring` is the old one of a
switch.  `SchedulerCore.apply` hands the slot every event of the plan, on the scheduler thread, and carries out
the instructions that come back; "is storage on?" is asked of `gate()` and of nothing else.

The slot is replicated: it moves only by events of the plan, so all ranks hold equal slots.  It never starts,
signals or waits for anything, reads no clock and touches no page: the storage driver does the first, the
leader the second, the cache controller the third.  What it counts is the operations of each epoch, and what it
remembers is by when each must have ended (`due_us`); that the time has come is an event like any other.

Every pair of state and event stands in `TABLE`, with the handler or with the reason why it cannot come.  The
leader plans from its own replica, which is the newest, hence a pair that "cannot come" is a defect and raises.
The leader plans at most one outcome per epoch in one plan, and no outcome of an operation together with the
end of its epoch: either would find the state that the other has just left.

              attach              commit              detach, switch          all closed
    DETACHED ────────▶ ATTACHING ────────▶ ATTACHED ────────────────▶ DRAINING ────────▶ DETACHING ──reaped──▶ DETACHED
                           │                   │                          │                  │
  open_failed, lost, deadline, detach, cancel  │ lost       lost, deadline │         deadline │
                           └───────────────────┴────▶ FAILED ◀────────────┴──────────────────┘
                                                        └──reaped, reap_timeout──▶ DETACHED
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    FreeOps,
    Instruction,
    Kill,
    Kind,
    OpClosed,
    QuarantineOps,
    ReleaseQuarantine,
    RevokeOps,
    Spawn,
    State,
    Stop,
    Switch,
    Verdict,
    kind_of,
)
from sglang_hicache.story import Story
from sglang_hicache.wire import StorageOutcome

if TYPE_CHECKING:
    from sglang_hicache.cache.digest import StateDigest


# ------------------------------------------------------------------------------------------- the machine


@dataclass(slots=True, repr=False)
class StorageAttachment:
    """One epoch of one backend."""

    epoch: int
    backend: str
    extra_config_json: str
    late_io: bool
    #: The attach or switch that this attachment will answer; "" once it has.
    command_id: str
    state: State = State.ATTACHING
    #: Operations admitted and not closed.
    in_flight: int = 0
    #: Leader's clock at which the patience with an opening, draining or detaching one ends; None: it does not, or
    #: there is nothing to wait for but the reap.
    due_us: int | None = None
    #: Of one that is opening: how long the one before it may drain after the commit; None: as long as it takes.
    drain_us: int | None = None
    #: Why it was killed.
    error: str = ""

    def __repr__(self) -> str:
        return f"<StorageAttachment {self}>"

    def __str__(self) -> str:
        return f"{self.state.name} {self.backend} epoch={self.epoch} in_flight={self.in_flight}"


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
        #: Why the latest attachment failed or was killed; "" after a commit.
        self.last_error = ""
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

# -------------------------------------------------------------------------------------------- handlers


def _open(slot: StorageSlot, _: StorageAttachment | None, event: Attach | Switch) -> Iterator[Instruction]:
    slot.last_epoch += 1
    slot.candidate = StorageAttachment(
        slot.last_epoch, event.backend, event.extra_config_json, event.late_io, event.command_id, due_us=event.due_us,
        drain_us=event.drain_us if isinstance(event, Switch) else None,
    )
    yield Spawn(slot.last_epoch, event.backend, event.extra_config_json)


def _refuse(slot: StorageSlot, _: StorageAttachment | None, event: Attach | Switch) -> Iterator[Instruction]:
    now = f"storage is {slot.face().value}" + (f" ({slot.backend}, epoch {slot.epoch})" if slot.backend else "")
    yield Answer(event.command_id, Verdict.CONFLICT, now)


def _commit(slot: StorageSlot, candidate: StorageAttachment, event: StorageOutcome) -> Iterator[Instruction]:
    old, command_id = slot.current, candidate.command_id
    candidate.state, candidate.command_id, candidate.due_us = State.ATTACHED, "", None
    # The old one of a switch may be FAILED here: it was lost while the new one was opening.
    slot.current, slot.candidate, slot.retiring = candidate, None, old
    slot.last_error = ""
    yield Answer(command_id, Verdict.OK, event.detail)
    if old is not None and old.state is State.ATTACHED:
        yield from _drain(old, None if candidate.drain_us is None else slot.now_us + candidate.drain_us)


def _wait(slot: StorageSlot, _: StorageAttachment | None, event: Detach) -> Iterator[Instruction]:
    if event.command_id not in slot.waiters:
        slot.waiters.append(event.command_id)
    yield from ()


def _hurry(slot: StorageSlot, attachment: StorageAttachment, event: Detach) -> Iterator[Instruction]:
    """The one that ends already has no longer than this detach gives it: who forces one that drains wants it out."""
    attachment.due_us = min((at for at in (attachment.due_us, event.due_us) if at is not None), default=None)
    yield from _wait(slot, attachment, event)


def _detach_attached(slot: StorageSlot, attachment: StorageAttachment, event: Detach) -> Iterator[Instruction]:
    yield from _wait(slot, attachment, event)
    yield from _drain(attachment, event.due_us)


def _detach_opening(slot: StorageSlot, attachment: StorageAttachment, event: Detach) -> Iterator[Instruction]:
    yield from _wait(slot, attachment, event)
    yield from _give_up(attachment, "given up by a detach")


def _cancel_opening(_: StorageSlot, attachment: StorageAttachment, __: Cancel) -> Iterator[Instruction]:
    yield from _give_up(attachment, "cancelled")


def _nothing_to_cancel(_: StorageSlot, __: StorageAttachment | None, ___: Cancel) -> Iterator[Instruction]:
    """It has ended, or fails already, and is answered as it would be anyway."""
    yield from ()


def _give_up(attachment: StorageAttachment, why: str) -> Iterator[Instruction]:
    """An opening one is not wanted any more: no error of the storage."""
    attachment.state, attachment.error, attachment.due_us = State.FAILED, why, None
    yield Kill(attachment.epoch)


def _drain(attachment: StorageAttachment, due_us: int | None) -> Iterator[Instruction]:
    attachment.state, attachment.due_us = State.DRAINING, due_us
    if attachment.in_flight:
        yield RevokeOps(attachment.epoch)
    else:
        yield from _stop(attachment)


def _stop(attachment: StorageAttachment) -> Iterator[Instruction]:
    attachment.state = State.DETACHING
    yield Stop(attachment.epoch)


def _kill(slot: StorageSlot, attachment: StorageAttachment, event: StorageOutcome) -> Iterator[Instruction]:
    """Every unhappy end but that of an opening one that somebody gave up goes this way."""
    attachment.state, attachment.due_us = State.FAILED, None
    attachment.error = slot.last_error = event.detail or f"{event.event} ({attachment.backend}, epoch {event.epoch})"
    yield Kill(attachment.epoch)


def _admit(slot: StorageSlot, attachment: StorageAttachment, _: Event) -> Iterator[Instruction]:
    attachment.in_flight += 1
    yield from ()


def _close_op(slot: StorageSlot, attachment: StorageAttachment, event: OpClosed) -> Iterator[Instruction]:
    if attachment.in_flight == 0:
        slot.broken("an operation was closed, but none is in flight", event)
    attachment.in_flight -= 1
    if attachment.in_flight == 0 and attachment.state is State.DRAINING:
        yield from _stop(attachment)


def _finish(slot: StorageSlot, attachment: StorageAttachment, _: Event) -> Iterator[Instruction]:
    if attachment.in_flight and attachment.late_io:
        yield from _set_aside(slot, attachment)
    elif attachment.in_flight:
        yield FreeOps(attachment.epoch)
    yield from _end(slot, attachment)


def _write_off(slot: StorageSlot, attachment: StorageAttachment, event: StorageOutcome) -> Iterator[Instruction]:
    slot.last_error = event.detail or f"not reaped after the kill ({attachment.backend}, epoch {attachment.epoch})"
    # Also without operations: the epoch keeps a name until its process is proven gone.
    yield from _set_aside(slot, attachment)
    yield from _end(slot, attachment)


def _set_aside(slot: StorageSlot, attachment: StorageAttachment) -> Iterator[Instruction]:
    slot.quarantined[attachment.epoch] = attachment.in_flight
    yield QuarantineOps(attachment.epoch)


def _end(slot: StorageSlot, attachment: StorageAttachment) -> Iterator[Instruction]:
    slot.leave(attachment)
    if attachment.command_id:  # it was never attached; what was there before still is
        yield Answer(attachment.command_id, Verdict.FAILED, attachment.error)


def _release(slot: StorageSlot, _: StorageAttachment | None, event: StorageOutcome) -> Iterator[Instruction]:
    if event.epoch not in slot.quarantined:
        slot.broken("quiet for an epoch that holds no pages", event)
    del slot.quarantined[event.epoch]
    yield ReleaseQuarantine(event.epoch)


def _renew(slot: StorageSlot, _: StorageAttachment | None, __: Event) -> Iterator[Instruction]:
    slot.generation += 1
    yield from ()


# ----------------------------------------------------------------------------------------------- the table

Handler = Callable[..., Iterator[Instruction]]


class Never(msgspec.Struct, frozen=True):
    """A cell that cannot come, and why."""

    reason: str


def _row(kind: Kind, reason: str, handlers: dict[State, Handler]) -> dict[tuple[State, Kind], Handler | Never]:
    return {(state, kind): handlers.get(state, Never(reason)) for state in State}


_EVERYWHERE = "every state has a handler"
_UNHAPPY: dict[State, Handler] = {State.ATTACHING: _kill, State.ATTACHED: _kill, State.DRAINING: _kill}

#: The whole machine: state of the attachment meant x kind of event.
TABLE: dict[tuple[State, Kind], Handler | Never] = {
    **_row(Kind.ATTACH, _EVERYWHERE, dict.fromkeys(State, _refuse) | {State.DETACHED: _open}),
    **_row(Kind.SWITCH, _EVERYWHERE, dict.fromkeys(State, _refuse) | {State.ATTACHED: _open}),
    **_row(
        Kind.DETACH,
        _EVERYWHERE,
        dict.fromkeys(State, _wait) | {State.ATTACHING: _detach_opening, State.ATTACHED: _detach_attached}
        | dict.fromkeys((State.DRAINING, State.DETACHING), _hurry),
    ),
    **_row(
        Kind.CANCEL,
        "it has answered its command, so that no cancel can mean it",
        {State.DETACHED: _nothing_to_cancel, State.ATTACHING: _cancel_opening, State.FAILED: _nothing_to_cancel},
    ),
    **_row(Kind.ADMITTED, "only the epoch that the gate names takes operations", {State.ATTACHED: _admit}),
    **_row(
        Kind.OP_CLOSED,
        "this epoch has no operations: none admitted yet, all closed, or all taken at its end",
        {State.ATTACHED: _close_op, State.DRAINING: _close_op, State.FAILED: _close_op},
    ),
    **_row(Kind.CLEARED, _EVERYWHERE, dict.fromkeys(State, _renew)),
    **_row(Kind.COMMIT, "only an epoch that is opening can be committed", {State.ATTACHING: _commit}),
    **_row(Kind.OPEN_FAILED, "only an epoch that is opening can fail to open", {State.ATTACHING: _kill}),
    **_row(Kind.LOST, "stopped, killed or gone: its end is reported as reaped, its hang as deadline", _UNHAPPY),
    **_row(
        Kind.DEADLINE,
        "nothing with a deadline is under way",
        {State.ATTACHING: _kill, State.DRAINING: _kill, State.DETACHING: _kill},
    ),
    **_row(
        Kind.REAPED,
        "nobody stopped or killed this epoch: a process that ends by itself is lost or failed to open",
        {State.DETACHING: _finish, State.FAILED: _finish},
    ),
    **_row(Kind.REAP_TIMEOUT, "only a killed epoch waits to be reaped", {State.FAILED: _write_off}),
    **_row(Kind.QUIET, "an epoch that still has a place holds its pages itself", {State.DETACHED: _release}),
}
