"""Admin commands on one rank: the strict idle check, what each command starts, and each rank's own answer.

A command arrives in a plan, so every rank judges it in the same tick against the same state and answers for
itself; the desk merges the answers.  Idle is judged once, in the tick that starts the operation, and only where the
command's mode asks for it: what drains, or is forced, is bounded by its deadline instead.  The two commands that may
wait (a flush with a time-out, the detach of a shutdown) are looked at again in every tick until the leader's clock has
passed their deadline.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass

from sglang_hicache import wire
from sglang_hicache.cache.op import OpKind
from sglang_hicache.cache.tiers import Tiers
from sglang_hicache.config import PREFETCH_POLICIES, WRITE_POLICIES
from sglang_hicache.errors import UserError
from sglang_hicache.scheduler.failover import Failover
from sglang_hicache.storage import registry
from sglang_hicache.storage.attachment_events import (
    GIVEN_UP,
    Answer,
    Attach,
    Cancel,
    Cleared,
    Detach,
    State,
    Switch,
    Verdict,
)

log = logging.getLogger(__name__)

NOT_HIERARCHICAL = "Hierarchical cache is not enabled: restart with --enable-hierarchical-cache."


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A command that waits for idleness."""

    command: wire.FlushCache | wire.DetachStorage
    #: Leader's clock when it stops waiting for that.
    idle_by_us: int
    #: The same for what comes after that: the uploads that a flush has stopped, and what a detach lets run on.  A store
    #: that hangs must not keep them for ever.
    ends_us: int


class Commands:
    """Commands of one replica, from the plan that brings them to the answer."""

    def __init__(
        self, rank: int, tiers: Tiers, failover: Failover, load: Callable[[], dict[str, int]], is_hierarchical: bool
    ) -> None:
        self._rank = rank
        self._tiers = tiers
        self._failover = failover
        self._load = load
        self._is_hierarchical = is_hierarchical
        #: Attaches and switches that the slot works on: their policies take effect with the commit.
        self._attaching: dict[str, wire.AttachStorage] = {}
        #: Clears that the storage processes work on, with their epoch.
        self._clearing: dict[str, int] = {}
        #: Those of them that are the second half of a flush.
        self._flushed: set[str] = set()
        #: Detach commands that the slot works on; for those of them that ended an attachment, the last error by then.
        self._detaching: dict[str, str | None] = {}
        self._waiting: dict[str, _Waiting] = {}
        #: Leader's clock when the waiting commands were looked at last.
        self._looked_us = 0
        self.answers: list[wire.CommandAnswer] = []

    def start(self, command: wire.Command, now_us: int) -> None:
        match command:
            case wire.AttachStorage():
                self._attach(command, now_us)
            case wire.DetachStorage():
                self._detach(command, now_us)
            case wire.ClearStorage():
                self._clear(command)
            case wire.FlushCache():
                self._flush(command, now_us)
            case wire.CancelCommand():
                self._cancel(command)
            case wire.Shutdown():
                pass  # the loop ends with this tick, and the end of the processes is the answer

    def blockers(self) -> dict[str, int]:
        """What keeps this rank from being idle, by name."""
        return {name: count for name, count in (self._load() | self._tiers.blockers()).items() if count}

    def _not_idle(self, is_patient: bool = False) -> str:
        """The refusal's second half, or "" when idle.  The two counts that clients parse come first.

        Backups that a sick or full store has refused are no reason to refuse for whoever does not want to wait: they
        may wait for minutes, every request brings new ones, and a detach is what helps against such a store.
        """
        found = self.blockers()
        if not is_patient and not self._tiers.writer.is_moving():
            found.pop("queued-backups", None)
        if not found:
            return ""
        counts = {"queue-req": 0, "running-req": 0} | found
        return " ".join(f"#{name}={count}" for name, count in counts.items())

    def _answer(self, command_id: str, success: bool, message: str) -> None:
        self.answers.append(wire.CommandAnswer(id=command_id, rank=self._rank, success=success, message=message))

    # ------------------------------------------------------------------------------------------- attach

    def _attach(self, command: wire.AttachStorage, now_us: int) -> None:
        slot = self._tiers.slot
        try:
            self._check_attach(command)
        except UserError as error:
            self._tiers.attach_failed(command.backend, str(error))
            self._answer(command.id, False, str(error))
            return
        is_attached = slot.face() is State.ATTACHED
        if is_attached and not command.switch:
            self._apply_policies(command)
            same = f"HiCache storage is already enabled with the same backend '{slot.backend}'; policies updated."
            self._answer(command.id, True, same)
            return
        self._attaching[command.id] = command
        if command.keeps_trying:
            self._apply_policies(command)  # whichever try succeeds, it is no longer this command that does
        config = command.extra_config_json or "{}"
        _, settings = registry.validate_extra_config(command.backend, config)
        late_io, due_us = registry.late_io(command.backend, settings), now_us + _us(command.deadline_s)
        if is_attached:
            drain_us = _us(command.drain_s)
            event = Switch(command.id, command.backend, config, late_io, due_us=due_us, drain_us=drain_us)
        else:
            event = Attach(command.id, command.backend, config, late_io, due_us=due_us)
        self._tiers.carry_out(slot.handle(event))

    def _check_attach(self, command: wire.AttachStorage) -> None:
        """Raise UserError unless the attach may start (or, for what is attached already, update policies)."""
        if not self._is_hierarchical:
            raise UserError(NOT_HIERARCHICAL)
        if command.mode == "idle" and (blockers := self._not_idle()):
            raise UserError(f"Reject attach: scheduler is not idle. {blockers}")
        for value, allowed, name in (
            (command.prefetch_policy, PREFETCH_POLICIES, "hicache_storage_prefetch_policy"),
            (command.write_policy, WRITE_POLICIES, "hicache_write_policy"),
        ):
            if value is not None and value not in allowed:
                raise UserError(f"Invalid {name} '{value}': expected one of {', '.join(allowed)}.")
        slot = self._tiers.slot
        if slot.face() is State.ATTACHED and not command.switch:
            if slot.backend != command.backend:
                raise UserError(
                    f"HiCache storage is already enabled with backend '{slot.backend}', cannot attach "
                    f"'{command.backend}': detach first, or ask for a switch (\"switch\": true)."
                )
            given = command.extra_config_json
            if given is not None and not _same_json(given, slot.extra_config_json):
                raise UserError(
                    f"HiCache storage is already enabled with backend '{slot.backend}' and another extra config, "
                    "which cannot be changed while it is attached: detach first, then attach with the new one, or ask "
                    'for a switch ("switch": true).'
                )
            return
        registry.validate_extra_config(command.backend, command.extra_config_json or "{}")

    def _apply_policies(self, command: wire.AttachStorage) -> None:
        tiers = self._tiers
        tiers.prefetcher.policy = command.prefetch_policy or tiers.prefetcher.policy
        # Any switch of the write policy is safe in a tree whose eviction copes with host-only nodes below
        # device-only ones, so unlike elsewhere none has to be refused until the cache is flushed.
        tiers.controller.write_policy = command.write_policy or tiers.controller.write_policy

    def slot_answered(self, answer: Answer) -> None:
        """The attachment machine has finished with a command."""
        command = self._attaching.pop(answer.command_id, None)
        if command is None:
            self._detached(answer)
            return
        name = command.backend
        if answer.verdict is Verdict.CONFLICT:
            by_itself = self._failover.under_way()
            who = f"the server {by_itself} by itself, and " if by_itself else ""
            busy = f"Another change of the storage is under way: {who}{answer.detail}. Try again when it has ended."
            self._answer(answer.command_id, False, busy)
            return
        if answer.verdict is Verdict.OK:
            self._apply_policies(command)
            self._answer(answer.command_id, True, f"Storage backend '{name}' attached successfully.{self._drains()}")
        else:
            why = f"Failed to attach storage backend '{name}': {answer.detail}"
            if answer.detail not in GIVEN_UP:
                self._tiers.attach_failed(name, why)
            self._answer(answer.command_id, False, why)
        self._failover.attach_ended(command, answer)

    def _drains(self) -> str:
        """After a switch: what becomes of the store that was attached before."""
        old = self._tiers.slot.retiring
        return f" It took over from '{old.backend}', which ends what it has begun." if old is not None else ""

    # ------------------------------------------------------------------------------------------- detach

    def _detach(self, command: wire.DetachStorage, now_us: int) -> None:
        if command.flush_timeout_s is not None:
            self._wait(command, command.flush_timeout_s, now_us)
            return
        if not self._is_hierarchical:
            self._answer(command.id, False, NOT_HIERARCHICAL)
        elif command.mode == "idle" and (blockers := self._not_idle()):
            self._answer(command.id, False, f"Reject detach: scheduler is not idle. {blockers}")
        else:
            self._start_detach(command.id, now_us + _us(command.deadline_s))

    def _start_detach(self, command_id: str, due_us: int) -> None:
        slot = self._tiers.slot
        self._detaching[command_id] = slot.last_error if slot.gate() is not None else None
        self._failover.detach_begins()
        self._tiers.incidents.given_up(slot.now_us)
        self._tiers.carry_out(slot.handle(Detach(command_id, due_us)))

    def _detached(self, answer: Answer) -> None:
        """Answer a detach; if it ended an attachment, say what became of the pages."""
        slot, message = self._tiers.slot, "HiCache storage detached successfully."
        error_before = self._detaching.pop(answer.command_id, None)
        if answer.detail:
            message += f" Pages held {answer.detail}."
        if error_before is not None:
            if slot.last_error != error_before:  # that one may be of the old store of a switch
                message += f" It did not end by itself: {slot.last_error}."
            if self._rank == 0:
                log.info("storage detached: %s", self._tiers.backup.books.since_attach(), extra={"epoch": slot.epoch})
        self._answer(answer.command_id, answer.verdict in (Verdict.OK, Verdict.PAGES_HELD), message)

    # ------------------------------------------------------------------------------------------- cancel

    def _cancel(self, command: wire.CancelCommand) -> None:
        """Give up what has changed nothing yet; say why of what has."""
        target, waiting = command.target, self._waiting.get(command.target)
        if target in self._attaching:
            self._tiers.carry_out(self._tiers.slot.handle(Cancel(target)))
        elif waiting is not None and isinstance(waiting.command, wire.FlushCache):
            del self._waiting[target]
            self._answer(target, False, "The flush was cancelled: nothing was flushed.")
        else:
            self._answer(command.id, False, self._not_cancelled(target))
            return
        self._answer(command.id, True, f"Operation {target} is given up.")

    def _not_cancelled(self, target: str) -> str:
        if target in self._detaching or target in self._waiting:
            return (
                f"Operation {target} cannot be cancelled: it takes the storage out, which nothing can undo; it ends by "
                "its deadline, or sooner with a detach by force."
            )
        if target in self._clearing:
            return f"Operation {target} cannot be cancelled: pages are being deleted."
        return f"Operation {target} cannot be cancelled: it has ended, or is none that can be given up half-way."

    # -------------------------------------------------------------------------------------------- clear

    def _clear(self, command: wire.ClearStorage | wire.FlushCache) -> None:
        tiers = self._tiers
        epoch = tiers.slot.gate()
        if isinstance(command, wire.FlushCache):
            self._flushed.add(command.id)
        if epoch is None:
            self._cleared(command.id, "No HiCache storage is attached: there is nothing to clear.")
            return
        tiers.carry_out(tiers.slot.handle(Cleared()))
        self._clearing[command.id] = epoch
        tiers.storage.messages.append((epoch, wire.ClearPages(command_id=command.id)))

    def clearing(self) -> dict[str, int]:
        """Clears under way: command id -> epoch.  The leader counts their facts."""
        return self._clearing

    def clear_ended(self, outcome: wire.ClearOutcome) -> None:
        slot = self._tiers.slot
        if self._clearing.pop(outcome.command_id, None) == slot.gate():
            # Once more: what this rank wrote after its own clear, another rank's slower clear has deleted again.
            self._tiers.carry_out(slot.handle(Cleared()))
        reason = outcome.reasons[self._rank]
        self._cleared(outcome.command_id, reason and f"rank {self._rank}: {reason}")

    def _cleared(self, command_id: str, reason: str) -> None:
        """Answer a clear, or a flush that ends with one: of the two halves only the second can have failed."""
        if command_id not in self._flushed:
            self._answer(command_id, not reason, reason or "HiCache storage cleared.")
            return
        self._flushed.discard(command_id)
        half = f"L1 and L2 were flushed, but the storage was not cleared: {reason}"
        self._answer(command_id, not reason, half if reason else "Cache flushed and HiCache storage cleared.")

    # -------------------------------------------------------------------------------------------- flush

    def _flush(self, command: wire.FlushCache, now_us: int) -> None:
        if any(isinstance(waiting.command, wire.FlushCache) for waiting in self._waiting.values()):
            self._answer(command.id, False, "Another flush is in progress.")
            return
        self._wait(command, command.timeout_s, now_us)

    def _wait(self, command: wire.FlushCache | wire.DetachStorage, timeout_s: float, now_us: int) -> None:
        self._waiting[command.id] = _Waiting(command, now_us + _us(timeout_s), now_us + _us(command.deadline_s))

    def look_again(self, now_us: int) -> None:
        """Commands that wait for idleness: has it come, or is their time over?"""
        self._looked_us = now_us
        for command_id, waiting in list(self._waiting.items()):
            if isinstance(waiting.command, wire.FlushCache):
                self._look_at_flush(waiting.command, waiting, now_us)
            elif now_us >= waiting.idle_by_us or not self._tiers.blockers():
                del self._waiting[command_id]
                self._tiers.server_ends()
                self._start_detach(command_id, waiting.ends_us)

    def _look_at_flush(self, command: wire.FlushCache, waiting: _Waiting, now_us: int) -> None:
        is_over = now_us >= waiting.idle_by_us
        blockers = self._not_idle(is_patient=not is_over)
        if blockers and not is_over:
            return
        if not blockers and not self._tiers.stop_uploads():  # nothing can be emptied under them
            if now_us < waiting.ends_us:
                return  # they end within a moment, but for a store that hangs
            blockers = f"#upload-ops={self._tiers.ops.count(OpKind.UPLOAD)}"
        del self._waiting[command.id]
        if not blockers:
            self._tiers.flush()
            if command.keep_storage:
                self._answer(command.id, True, "Cache flushed.")
            else:
                self._clear(command)
        elif command.timeout_s:
            self._answer(command.id, False, f"Timed out waiting for idle. {blockers}")
        else:
            self._answer(command.id, False, f"Flush cache failed: scheduler is not idle. {blockers}")

    def unanswered(self) -> set[str]:
        """Ids of the commands that wait here, for idleness or for the storage processes."""
        return {*self._waiting, *self._clearing}

    def next_deadline_us(self) -> int | None:
        """When a command stops waiting.  What was over at the last look and still waits does so for something else."""
        known = [at for waiting in self._waiting.values() for at in (waiting.idle_by_us, waiting.ends_us)]
        return min((at for at in known if at > self._looked_us), default=None)


def _us(seconds: float) -> int:
    return int(seconds * 1e6)


def _same_json(left: str, right: str) -> bool:
    """Equal as values: spaces and the order of keys say nothing."""
    try:
        return json.loads(left or "{}") == json.loads(right or "{}")
    except json.JSONDecodeError:
        return False
