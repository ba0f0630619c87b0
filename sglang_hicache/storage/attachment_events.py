"""The words of the attachment machine: its states, what it is told and what it asks for.

`SchedulerCore.apply` makes the events, from the commands of a plan, from what the controller did, and hands on
the `wire.StorageOutcome`s as they are; the storage driver, the controller and the core carry out the
instructions.  Pure records: nothing here decides.
"""

from __future__ import annotations

import enum

import msgspec

from sglang_hicache.wire import StorageOutcome


class State(enum.Enum):
    """Where one attachment stands; of a slot: where its unfinished business stands."""

    DETACHED = "detached"
    #: Processes start, open the backend and test it.
    ATTACHING = "attaching"
    #: Open on every rank; the only state that takes new operations.
    ATTACHED = "attached"
    #: Takes no new operations; the running ones may finish.
    DRAINING = "draining"
    #: No operation is left and the processes were asked to go.
    DETACHING = "detaching"
    #: Killed, and neither reaped everywhere nor written off: who owns the memory is not proven, nothing else.
    FAILED = "failed"


class Kind(enum.Enum):
    """Kinds of events; the values of the last seven are `wire.StorageEvent`."""

    ATTACH = "attach"
    SWITCH = "switch"
    DETACH = "detach"
    CANCEL = "cancel"
    ADMITTED = "admitted"
    OP_CLOSED = "op_closed"
    CLEARED = "cleared"
    COMMIT = "commit"
    OPEN_FAILED = "open_failed"
    LOST = "lost"
    DEADLINE = "deadline"
    REAPED = "reaped"
    REAP_TIMEOUT = "reap_timeout"
    QUIET = "quiet"


class Verdict(enum.Enum):
    """How a command ended."""

    OK = "ok"
    FAILED = "failed"
    #: Refused: another change is under way, or it does not fit what is attached.
    CONFLICT = "conflict"
    #: Detached, but host pages wait in quarantine for a process or its hardware to let go.
    PAGES_HELD = "pages_held"


#: With this begins the id of every change that no command has brought, but the server itself.
AUTOMATIC = "auto-"

#: Why an attachment did not come to be that somebody has given up: no failure of anything.
GIVEN_UP = (DETACHED, CANCELLED) = ("given up by a detach", "cancelled")

# ------------------------------------------------------------------------------------------------ events


class _Opening(msgspec.Struct, frozen=True):
    """Which backend to open, for which command."""

    command_id: str
    backend: str
    extra_config_json: str
    #: The end of its process does not prove the end of its writes.
    late_io: bool = False
    #: Leader's clock by which it is open on every rank, or given up; None: there is no hurry.
    due_us: int | None = None

    def __repr__(self) -> str:
        # Without the config: it may hold a key, and this text reaches logs and errors.
        return f"{type(self).__name__}({self.command_id!r}, {self.backend!r})"


class Attach(_Opening, frozen=True):
    """Open a backend in an empty slot."""


class Switch(_Opening, frozen=True):
    """Open a backend beside the attached one and let it take over; if it fails nothing has changed."""

    #: Microseconds from the commit on in which the attached one may end what it does; None: as long as it takes.
    drain_us: int | None = None


class Detach(msgspec.Struct, frozen=True):
    """Empty all three places."""

    command_id: str
    #: Leader's clock at which whatever still runs is cut off, also what an earlier detach, or a switch, gave more time.
    due_us: int | None = None


class Cancel(msgspec.Struct, frozen=True):
    """Give up the backend that is opening for this command; if it is open by now, nothing happens."""

    command_id: str


class Admitted(msgspec.Struct, frozen=True):
    """The controller gave an operation to this epoch."""

    epoch: int


class OpClosed(msgspec.Struct, frozen=True):
    """Every rank said of one operation of this epoch that it will not touch it again."""

    epoch: int


class Cleared(msgspec.Struct, frozen=True):
    """The store was emptied: what nodes remember of being stored is no longer true."""


Event = Attach | Switch | Detach | Cancel | Admitted | OpClosed | Cleared | StorageOutcome

_KIND_OF: dict[type, Kind] = {
    Attach: Kind.ATTACH,
    Switch: Kind.SWITCH,
    Detach: Kind.DETACH,
    Cancel: Kind.CANCEL,
    Admitted: Kind.ADMITTED,
    OpClosed: Kind.OP_CLOSED,
    Cleared: Kind.CLEARED,
}


def kind_of(event: Event) -> Kind:
    """The kind under which the table lists an event."""
    return Kind(event.event) if isinstance(event, StorageOutcome) else _KIND_OF[type(event)]


# ------------------------------------------------------------------------------------------ instructions


class Spawn(msgspec.Struct, frozen=True):
    """Start this rank's storage process of the epoch."""

    epoch: int
    backend: str
    extra_config_json: str

    def __repr__(self) -> str:
        return f"Spawn(epoch={self.epoch}, {self.backend!r})"  # without the config: it may hold a key


class Stop(msgspec.Struct, frozen=True):
    """Ask the storage process to close its backend and go."""

    epoch: int


class Kill(msgspec.Struct, frozen=True):
    """Kill the storage process; nothing to do where it is gone already."""

    epoch: int


class RevokeOps(msgspec.Struct, frozen=True):
    """Start no more work of these operations; they settle with what is whole, then close."""

    epoch: int


class FreeOps(msgspec.Struct, frozen=True):
    """Nobody can touch the unfinished operations any more: their host pages are free."""

    epoch: int


class QuarantineOps(msgspec.Struct, frozen=True):
    """The host pages of the unfinished operations may still be written: set them aside."""

    epoch: int


class ReleaseQuarantine(msgspec.Struct, frozen=True):
    """The pages set aside for the epoch are free."""

    epoch: int


class Answer(msgspec.Struct, frozen=True):
    """Answer a command, once."""

    command_id: str
    verdict: Verdict
    detail: str = ""


Instruction = Spawn | Stop | Kill | RevokeOps | FreeOps | QuarantineOps | ReleaseQuarantine | Answer
