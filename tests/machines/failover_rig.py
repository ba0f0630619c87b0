"""The real `Failover` over the real `StorageSlot`, one event at a time, in a world of stores that are well or sick.

Ranks are left out: what they say becomes one outcome before anything here sees it.  Time is a number that jumps to the
next deadline.
"""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

from sglang_hicache import wire
from sglang_hicache.cache.breaker import Trust
from sglang_hicache.config import StorageConfig
from sglang_hicache.scheduler.failover import Failover
from sglang_hicache.storage.attachment import StorageSlot
from sglang_hicache.storage.attachment_events import (
    AUTOMATIC,
    Answer,
    Attach,
    Detach,
    Instruction,
    Spawn,
    State,
    Verdict,
)
from tests.machines.attachment_replicas import NoDigest, promise

S = 1_000_000
STORES = {"primary": "memory", "standby 1": "/a", "standby 2": "/b"}


class NoStory:
    """A slot that is copied for every step of an exploration has none."""

    def note(self, text: str) -> None:
        pass

    def attach_to(self, error: Exception) -> Exception:
        return error


class Tiers:
    """As much of the tiers as `Failover` sees."""

    page_size = 4

    def __init__(self) -> None:
        self.slot = StorageSlot(NoDigest())
        self.slot._story = NoStory()
        self.ops = SimpleNamespace(now_us=1)
        self.gate = SimpleNamespace()
        self.evidence = self
        self.complaint = ""
        self.instructions: list[Instruction] = []

    def __deepcopy__(self, memo: dict) -> Tiers:
        other = Tiers.__new__(Tiers)
        memo[id(self)] = other
        other.slot = copy.copy(self.slot)
        for name in ("current", "candidate", "retiring"):
            vars(other.slot)[name] = copy.copy(vars(self.slot)[name])
        other.slot.waiters, other.slot.quarantined = list(self.slot.waiters), dict(self.slot.quarantined)
        other.ops = SimpleNamespace(now_us=self.ops.now_us)
        other.bind(self.complaint)
        return other

    def bind(self, complaint: str) -> None:
        self.evidence, self.complaint, self.instructions = self, complaint, []
        self.ops.count = lambda _kind: 0
        self.gate = SimpleNamespace(compute_us=lambda _tokens: None)

    def carry_out(self, instructions: list[Instruction]) -> None:
        self.instructions += instructions

    # What `Evidence` is asked.

    def watch(self, epoch: int, _limits: object, _paces: object) -> None:
        promise(epoch == self.slot.gate(), "another epoch is watched than is attached")

    def rest(self) -> None:
        self.complaint = ""

    def judge(self, *_: object) -> str:
        return self.complaint


def extra_config(level: str, standbys: int = 2, **settings: object) -> str:
    others = [
        {"backend": "file", "extra_config": {"file_storage_path": path}} for path in list(STORES.values())[1:]
    ]
    return json.dumps({"fault_tolerance": {"level": level, "standby": others[:standbys]} | settings})


def name_of(backend: str, extra_config_json: str) -> str:
    path = json.loads(extra_config_json).get("file_storage_path", backend)
    return next((name for name, store in STORES.items() if store == path), path)


class Rig:
    """One server.  Every method but the questions is one plan."""

    def __init__(self) -> None:
        self.tiers = Tiers()
        self.tiers.bind("")
        self.is_busy = False
        self.failover = self._failover()
        #: Of each store, whether its latest canary was good and has not been used yet.
        self.proven: set[str] = set()
        self.canary: tuple[int, str] | None = None
        #: Every change of the gate: leader's clock.
        self.changes: list[int] = []
        #: A command has detached, and none has attached since.
        self.is_over = True
        self.commands = 0
        self._gate: int | None = None

    def _failover(self) -> Failover:
        return Failover(1, self.tiers, StorageConfig(), lambda: self.is_busy, NoDigest())

    def fork(self) -> Rig:
        other = copy.deepcopy(self)
        other.failover._is_busy = lambda: other.is_busy
        return other

    # -------------------------------------------------------------------------------------------- questions

    @property
    def slot(self) -> StorageSlot:
        return self.tiers.slot

    @property
    def now_us(self) -> int:
        return self.tiers.ops.now_us

    @property
    def serving(self) -> str:
        current = self.slot.current
        return name_of(current.backend, current.extra_config_json) if self.slot.gate() and current else ""

    @property
    def opening(self) -> str:
        candidate = self.slot.candidate
        is_opening = candidate is not None and candidate.state is State.ATTACHING
        return name_of(candidate.backend, candidate.extra_config_json) if is_opening and candidate else ""

    def next_us(self) -> int | None:
        """When the leader looks again: at a deadline of the failover, of its canary, or of the slot."""
        known = [self.failover.next_deadline_us(), self.slot.next_deadline_us(), *self.failover.canaries().values()]
        return min((at for at in known if at is not None), default=None)

    # ----------------------------------------------------------------------------------------------- plans

    def outcome(self, event: wire.StorageEvent, epoch: int) -> None:
        detail = "" if event in ("commit", "reaped") else f"crashed: {event}"
        self._do(self.slot.handle(wire.StorageOutcome(event, epoch, detail)))
        self._end()

    def canary_ends(self, failure: str = "", page_s: float = 0.0) -> None:
        promise(self.canary is not None, "no canary is under way")
        number, name = self.canary or (0, "")
        self.canary = None
        self.proven -= {name}
        self.failover.canary_ended(wire.CanaryOutcome(number, failure, page_s))
        if not failure:
            self.proven |= {name}
        self._end()

    def complain(self) -> None:
        self.tiers.complaint = "tripped_errors: 5 reads in a row failed"
        self._end()
        self.tiers.complaint = ""

    def attach(self, config: str = "", keeps_trying: bool = False) -> None:
        self.commands += 1
        self._command = wire.AttachStorage(
            id=f"c{self.commands}", deadline_s=30.0, backend="memory", extra_config_json=config or "{}",
            keeps_trying=keeps_trying,
        )  # fmt: skip
        self._do(self.slot.handle(Attach(self._command.id, "memory", config or "{}")))
        self._end()

    def detach(self) -> None:
        self.commands += 1
        self.is_over = True
        self.canary, self.proven = None, set()
        self.failover.detach_begins()
        self._do(self.slot.handle(Detach(f"c{self.commands}", self.now_us + S)))
        self._end()

    def jump(self, to_us: int | None = None) -> None:
        at = self.next_us() if to_us is None else to_us
        promise(at is not None, "there is nothing to wait for")
        self.tiers.ops.now_us = max(self.now_us, at or 0)
        self.slot.now_us = self.now_us
        self._end()

    def _do(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Answer):
                if instruction.command_id.startswith(AUTOMATIC):
                    self.failover.slot_answered(instruction)
                elif instruction.command_id == self._command.id and instruction.verdict is not Verdict.CONFLICT:
                    if instruction.verdict is Verdict.OK:
                        self.canary, self.proven, self.is_over = None, set(), False
                    self.failover.attach_ended(self._command, instruction)

    def _end(self) -> None:
        """What the rest of a plan does, and what must hold then."""
        before = self.slot.last_epoch
        self.failover.advance(self.now_us, 0)
        instructions, self.tiers.instructions = self.tiers.instructions, []
        started, self.failover.started = self.failover.started, []
        for canary in started:
            promise(self.canary is None, "two canaries at once")
            promise(not self.is_busy, "a canary while the weights change")
            self.canary = (canary.number, name_of(canary.backend, canary.extra_config_json))
        for instruction in instructions:
            if isinstance(instruction, Spawn):
                promise(not self.is_busy, "an attach while the weights change")
                promise(instruction.epoch == before + 1, "two attaches in one plan")
                promise(self.opening in self.proven, f"{self.opening} is attached without a good canary")
                self.proven -= {self.opening}
        self._do(instructions)
        if self.slot.gate() != self._gate:
            self._gate = self.slot.gate()
            self.changes.append(self.now_us)
        self.check()

    def check(self) -> None:
        failover, gate = self.failover, self.slot.gate()
        trust, level = failover.breaker.state, failover.status(self.now_us).level
        promise(level == "off" or (gate is not None) == (trust is Trust.CLOSED), f"the gate says {gate}, {trust}")
        if self.is_over:
            promise(not failover.canaries() or self.commands == 1, "a canary after a detach by a command")
            promise(gate is None, "attached after a detach by a command")
        is_tried = bool(self.canary or self.proven or self.slot.candidate)
        promise(trust is not Trust.HALF_OPEN or is_tried, "half open, and nothing is tried")
        told = failover.status(self.now_us)
        promise(told.serving == self.serving, f"{self.serving} serves, and {told.serving} is told")
