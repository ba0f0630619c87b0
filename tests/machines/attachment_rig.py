"""A slot for tests that go step by step, and how to bring one into each state."""

from __future__ import annotations

from sglang_hicache.storage.attachment import StorageSlot
from sglang_hicache.storage.attachment_events import Admitted, Attach, Detach, Instruction, State
from sglang_hicache.wire import StorageEvent, StorageOutcome

SECRET = '{"password": "hunter2"}'


class RecordingDigest:
    """Keeps what was mixed in."""

    def __init__(self) -> None:
        self.mixed: list[tuple[int, ...]] = []

    def mix(self, *numbers: int) -> None:
        self.mixed.append(numbers)


class Rig:
    """A slot, and events by their short names."""

    def __init__(self) -> None:
        self.digest = RecordingDigest()
        self.slot = StorageSlot(self.digest)

    def outcome(self, event: StorageEvent, epoch: int = 1, detail: str = "") -> list[Instruction]:
        return self.slot.handle(StorageOutcome(event, epoch, detail))

    def attach(self, *, late_io: bool = False) -> None:
        """Attach the next epoch completely."""
        self.slot.handle(Attach(f"attach {self.slot.last_epoch + 1}", "file", SECRET, late_io))
        self.outcome("commit", self.slot.last_epoch)

    def admit(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.slot.handle(Admitted(self.slot.gate())) == []


def in_state(state: State, *, ops: int = 0, late_io: bool = False) -> Rig:
    """A slot whose epoch 1 is in the given state (DETACHED: was, and is gone)."""
    rig = Rig()
    if state is State.ATTACHING:
        rig.slot.handle(Attach("attach 1", "file", SECRET, late_io))
        return rig
    rig.attach(late_io=late_io)
    match state:
        case State.DETACHED:
            rig.slot.handle(Detach("detach 1"))
            rig.outcome("reaped")
        case State.ATTACHED:
            rig.admit(ops)
        case State.DRAINING:
            rig.admit(max(ops, 1))
            rig.slot.handle(Detach("detach 1"))
        case State.DETACHING:
            rig.slot.handle(Detach("detach 1"))
        case State.FAILED:
            rig.admit(max(ops, 1))
            rig.outcome("lost")
    assert rig.slot.face() is state
    return rig
