"""What every state of an attachment makes of every event: the handlers, and the table that names them.

Every pair of state and event stands in `TABLE`, with the handler or with the reason why it cannot come.  The
leader plans from its own replica, which is the newest, hence a pair that "cannot come" is a defect and raises.
A handler changes the slot and the attachment that the event is about, and yields what the rank must do, in order.

              attach              commit              detach, switch          all closed
    DETACHED ────────▶ ATTACHING ────────▶ ATTACHED ────────────────▶ DRAINING ────────▶ DETACHING ──reaped──▶ DETACHED
                           │                   │                          │                  │
  open_failed, lost, deadline, detach, cancel  │ lost       lost, deadline │         deadline │
                           └───────────────────┴────▶ FAILED ◀────────────┴──────────────────┘
                                                        └──reaped, reap_timeout──▶ DETACHED
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from sglang_hicache.storage.attachment_events import (
    CANCELLED,
    DETACHED,
    Answer,
    Attach,
    Cancel,
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
)
from sglang_hicache.wire import StorageOutcome

if TYPE_CHECKING:
    from sglang_hicache.storage.attachment import StorageSlot


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
    yield from _give_up(attachment, DETACHED)


def _cancel_opening(_: StorageSlot, attachment: StorageAttachment, __: Cancel) -> Iterator[Instruction]:
    yield from _give_up(attachment, CANCELLED)


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
