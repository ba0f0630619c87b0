"""New weights for a server that serves: read by all ranks, taken by all in one tick, or by none.

    STAGING    every rank reads the new weights beside the old ones, and serving goes on
    HOLDING    all have them: what runs finishes, the line stands still, nothing new is read from or written to storage
    commit     nothing runs and no op is in flight: weights and namespace change, device and host are emptied

Only between two forwards with no page on its way anywhere can no page of one weights end up under the name of the
other.  The commit is no message of its own: every rank sees the same rest in the same tick.  A rank that cannot read
the weights, and the deadline, end an update before the commit; then nothing has changed.  Replicated; changed only
by `SchedulerCore.apply`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from enum import IntEnum

from sglang_hicache import wire
from sglang_hicache.cache.digest import StateDigest
from sglang_hicache.cache.tiers import Tiers
from sglang_hicache.config import ModelConfig
from sglang_hicache.errors import IntegrityError
from sglang_hicache.scheduler.admission import Admission
from sglang_hicache.scheduler.waiting import WaitingQueue
from sglang_hicache.storage.attachment_events import Cleared


class UpdatePhase(IntEnum):
    """How far an update has come."""

    STAGING = 1
    HOLDING = 2


@dataclass(frozen=True, slots=True)
class StageWeights:
    """Begin to read new weights."""

    command: wire.UpdateWeights


@dataclass(frozen=True, slots=True)
class CommitWeights:
    """Compute with the weights that were read, and call the pages after them."""

    weights_digest: str


@dataclass(frozen=True, slots=True)
class DropWeights:
    """Forget what was read, or is being read."""


WeightsInstruction = StageWeights | CommitWeights | DropWeights


class Advance(IntEnum):
    """What a tick changed for the requests."""

    NOTHING = 0
    #: All ranks have the weights; the line stands still from now on.
    HELD = 1
    #: The line moves again: with new weights, or with the old ones after all.
    RELEASED = 2


@dataclass(slots=True)
class _Update:
    """The one that is under way."""

    command: wire.UpdateWeights
    deadline_us: int
    phase: UpdatePhase = UpdatePhase.STAGING


@dataclass(slots=True)
class WeightsEffects:
    """What one tick asks of other hands."""

    instructions: list[WeightsInstruction] = field(default_factory=list)
    answers: list[wire.CommandAnswer] = field(default_factory=list)


class WeightsUpdate:
    """At most one update at a time, and what the present weights are called."""

    def __init__(
        self,
        rank: int,
        model: ModelConfig,
        tiers: Tiers,
        waiting: WaitingQueue,
        admission: Admission,
        digest: StateDigest,
    ) -> None:
        self._rank = rank
        self._tiers = tiers
        self._waiting = waiting
        self._admission = admission
        self._digest = digest
        self._update: _Update | None = None
        self._effects = WeightsEffects()
        self.model_path = model.place
        self.weights_digest = model.weights_digest
        self.weight_version = wire.FIRST_WEIGHT_VERSION

    def __repr__(self) -> str:
        phase = self._update.phase.name if self._update else "idle"
        return f"<WeightsUpdate {phase} version={self.weight_version} {self.weights_digest[:8]}>"

    @property
    def is_holding(self) -> bool:
        """The line stands still: nothing may be started for a request that waits in it."""
        return self._update is not None and self._update.phase is UpdatePhase.HOLDING

    @property
    def aborts_requests(self) -> bool:
        """The one that is under way does not wait for requests."""
        return self._update is not None and self._update.command.aborts_requests

    def blockers(self) -> dict[str, int]:
        """Keeps the server from being idle, for whoever wants to attach, detach or flush."""
        return {"weights-update": 1} if self._update else {}

    def begin(self, command: wire.UpdateWeights, now_us: int) -> None:
        """The command has come: every rank begins to read."""
        if self._update is not None:
            busy = "another update of the weights is under way; try again when it has ended"
            self._answer(command, False, f"Conflict: {busy}.")
            return
        self._update = _Update(command, now_us + int(command.deadline_s * 1e6))
        self._effects.instructions.append(StageWeights(command))
        self._mix()

    def voted(self, outcome: wire.WeightsOutcome) -> Advance:
        """All ranks have the weights, or the update is over."""
        update = self._update
        if update is None or update.command.id != outcome.command_id or update.phase is not UpdatePhase.STAGING:
            raise IntegrityError(f"{outcome} is about no update that is being read: {self!r}")
        if outcome.failure:
            self._give_up(update, outcome.failure)
            return Advance.NOTHING
        update.phase = UpdatePhase.HOLDING
        self._hold(True)
        self._mix()
        return Advance.HELD

    def advance(self, now_us: int) -> Advance:
        """Is everything at rest, or the time over?"""
        update = self._update
        if update is None or update.phase is not UpdatePhase.HOLDING:
            return Advance.NOTHING
        obstacles = self._obstacles()
        if not obstacles:
            self._commit(update)
        elif now_us >= update.deadline_us:
            named = " ".join(f"#{name}={count}" for name, count in obstacles.items())
            self._give_up(update, f"the server did not come to rest in time: {named}")
        else:
            return Advance.NOTHING
        self._hold(False)
        return Advance.RELEASED

    def _obstacles(self) -> dict[str, int]:
        """What still belongs to the old weights, by name."""
        begun = sum(request.num_retractions > 0 for request in self._waiting)
        counts = {
            "running-req": len(self._admission.running),
            "retracted-req": begun,  # its text began with the old weights, and ends with them
            "opening-storage": int(self._tiers.slot.candidate is not None),  # could not be told the new namespace yet
        } | {f"{kind}-ops": count for kind, count in self._tiers.ops.counts().items()}
        return {name: count for name, count in counts.items() if count}

    def _commit(self, update: _Update) -> None:
        command = update.command
        self._tiers.flush()
        # What is stored under the old name proves nothing about the new one.
        self._tiers.carry_out(self._tiers.slot.handle(Cleared()))
        self.model_path, self.weights_digest = command.model_path, command.weights_digest
        self.weight_version = command.weight_version or self.weight_version
        self._effects.instructions.append(CommitWeights(command.weights_digest))
        self._update = None
        self._answer(command, True, "Model weights updated.", paused=len(self._waiting))
        self._mix()

    def _give_up(self, update: _Update, why: str) -> None:
        self._update = None
        self._effects.instructions.append(DropWeights())
        self._answer(update.command, False, f"The weights were not updated: {why}")
        self._mix()

    def _hold(self, held: bool) -> None:
        self._admission.is_held = held
        self._tiers.backup.is_held = held

    def _answer(self, command: wire.UpdateWeights, success: bool, message: str, paused: int = 0) -> None:
        self._effects.answers.append(
            wire.CommandAnswer(
                id=command.id, rank=self._rank, success=success, message=message, paused_requests=paused
            )
        )

    def _mix(self) -> None:
        phase = self._update.phase if self._update else 0
        self._digest.mix(61, phase, zlib.crc32(self.weights_digest.encode()))

    # ------------------------------------------------------------------------------------- asked by others

    def take_effects(self) -> WeightsEffects:
        """Everything this tick asks for."""
        effects, self._effects = self._effects, WeightsEffects()
        return effects

    def staging(self) -> str | None:
        """Id of the command whose weights are being read: the leader counts the votes."""
        if self._update is None or self._update.phase is not UpdatePhase.STAGING:
            return None
        return self._update.command.id

    def next_deadline_us(self) -> int | None:
        """When the clock ends an update by itself."""
        return self._update.deadline_us if self.is_holding else None
