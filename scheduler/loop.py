"""The calls of a tick, in order, and the sleep between ticks.  Nothing is decided here.

    collect     messages of the tokenizer, of the storage processes, of other ranks; finished copies
    plan        written (leader) or received (follower)
    apply       the core says what this rank's hands must do
    hands       new weights, copies out, copies in, storage instructions, storage messages, canaries, answers
    forward     if there is a batch; its ids go back into the core
    report      what this rank has seen, and that it has applied the plan

One thread, one object per rank.  A rank without work sleeps in the poller until something arrives or a deadline comes.
"""

from __future__ import annotations

import time

import msgspec

from sglang_hicache import wire
from sglang_hicache.errors import ProtocolError
from sglang_hicache.heartbeat import Heartbeat
from sglang_hicache.observe import learn_secrets
from sglang_hicache.scheduler.core import Effects, SchedulerCore
from sglang_hicache.scheduler.left_alone import left_alone
from sglang_hicache.scheduler.mailbox import Mailbox
from sglang_hicache.scheduler.probes import Key, Probes
from sglang_hicache.scheduler.status import merged
from sglang_hicache.scheduler.storage_driver import StorageDriver
from sglang_hicache.scheduler.weights_driver import WeightsDriver
from sglang_hicache.sockets import Poller, Pull, Push
from sglang_hicache.workers.batch import Worker

#: On a device, copies finish without a descriptor that could wake the poller: look this often while some are under way.
COPY_POLL_US = 1_000

#: A rank whose new weights are being read looks this often whether they are there: it takes seconds, or minutes.
STAGING_POLL_US = 20_000


def now_us() -> int:
    """The clock of one rank; only the leader's enters a plan."""
    return time.monotonic_ns() // 1_000


class TickLoop:
    """One rank at work."""

    def __init__(
        self,
        rank: int,
        core: SchedulerCore,
        worker: Worker,
        driver: StorageDriver,
        probes: Probes,
        weights: WeightsDriver,
        mailbox: Mailbox,
        inbox: Pull,
        to_tokenizer: Push,
        poller: Poller,
        heartbeat: Heartbeat,
    ) -> None:
        self._rank = rank
        self._core = core
        self._worker = worker
        self._driver = driver
        self._probes = probes
        self._weights = weights
        self._mailbox = mailbox
        self._inbox = inbox
        self._to_tokenizer = to_tokenizer
        self._poller = poller
        self._heartbeat = heartbeat
        self._copies_under_way = 0
        poller.register(inbox)

    def run_blocking(self) -> None:
        """Tick until a plan says to stop."""
        while True:
            now = now_us()
            self._collect(now)
            plan = self._mailbox.next_plan(self._driver.take_facts(), now)
            if plan is None:
                self._sleep_blocking()
            elif self._tick_blocking(plan):
                return

    # --------------------------------------------------------------------------------------------- collect

    def _collect(self, now: int) -> None:
        for message in self._inbox.receive_all():
            self._receive(message, now)
        self._driver.poll(now)
        for key, report in self._probes.poll(now):
            self._tried(key, report)
        finished = self._worker.finished_copies()
        self._copies_under_way -= len(finished)
        self._driver.copies_finished(finished)
        self._weights.poll()

    def _receive(self, message: wire.ToRank, now: int) -> None:
        """What this rank sees to by itself, outside the plan; the rest is the mailbox's."""
        if isinstance(message, wire.AttachStorage | wire.DryRunStorage):
            learn_secrets(message.extra_config_json)
        match message:
            case wire.QueryStatus():
                self._send(self._status(message.id, now))
            case wire.DryRunStorage():
                until_us = now + int(message.deadline_s * 1e6)
                self._probes.start(message.id, message.backend, message.extra_config_json, until_us)
            case wire.CancelCommand() if self._probes.knows(message.target):
                # Every rank was sent the dry run before this, so all of them come here and none waits for a plan.
                is_cancelled = self._probes.cancel(message.target)
                said = "The dry run was given up." if is_cancelled else "The dry run has ended already."
                self._send(wire.CommandAnswer(id=message.id, rank=self._rank, success=is_cancelled, message=said))
            case _:
                self._mailbox.receive(message, now)

    def _tried(self, key: Key, report: wire.DryRunReport) -> None:
        """A try of a backend has ended here: an operator's is answered, the leader's goes to the leader."""
        if isinstance(key, int):
            self._driver.canary_ended(key, report)
            return
        self._send(wire.CommandAnswer(
            id=key, rank=self._rank, success=not report.failed_step, message=report.reason, report=report
        ))

    def _status(self, query_id: str, now: int) -> wire.StatusAnswer:
        status, driver, update = self._core.status.answer(query_id, now), self._driver, self._core.update
        last_error, age_s = status.last_error, status.last_error_age_s
        failure, failed_us = driver.failure(status.epoch)
        stats = driver.stats(status.epoch)
        # The younger one: a switch that was refused an hour ago must not hide that the store which serves fails now.
        if failure and (not last_error or now - failed_us < age_s * 1e6):
            last_error, age_s = failure, (now - failed_us) / 1e6
        return msgspec.structs.replace(
            status,
            backend_info=driver.info(status.epoch),
            backend_stats=stats,
            why=[*left_alone(stats), *status.why],
            counters=status.counters | driver.counters.snapshot(),
            totals=merged(status.totals, driver.totals()),
            last_error=last_error,
            last_error_age_s=age_s,
            model_path=update.model_path,
            weight_version=update.weight_version,
            weights_digest=update.weights_digest,
        )

    # ------------------------------------------------------------------------------------------------ tick

    def _tick_blocking(self, plan: wire.TickPlan) -> bool:
        """One plan, start to end; True: it was the last one."""
        self._heartbeat.set_pending(self._rank, True)
        effects = self._core.apply(plan)
        self._carry_out(effects)
        self._send_outputs(effects.outputs)
        forward_us = 0
        if effects.batch is not None:
            began_us = now_us()
            token_ids = self._worker.forward_blocking(effects.batch)
            forward_us = max(1, now_us() - began_us)
            self._send_outputs(self._core.apply_results(token_ids))
        self._mailbox.applied(plan, forward_us)
        self._beat()
        return effects.stop

    def _carry_out(self, effects: Effects) -> None:
        for weights in effects.weights:
            self._weights.carry_out_blocking(weights)
        for copy in effects.copies_out:
            self._worker.copy_out(copy.op_id, copy.device_pages, copy.host_pages)
        for copy in effects.copies_in:
            self._worker.copy_in(copy.op_id, copy.device_pages, copy.host_pages)
        self._copies_under_way += len(effects.copies_out) + len(effects.copies_in)
        for instruction in effects.storage:
            self._driver.carry_out(instruction, now_us())
        for epoch, message in effects.to_storage:
            self._driver.send(epoch, message)
        for canary in effects.canaries:
            until_us = now_us() + int(canary.deadline_s * 1e6)
            self._probes.start(canary.number, canary.backend, canary.extra_config_json, until_us)
        # Before the answer to whoever made the change: he may be told once what is kept of it is kept.
        for news in effects.news if self._rank == 0 else []:
            self._send(news)
        for answer in effects.answers:
            self._send(answer)

    def _send_outputs(self, outputs: list[wire.RequestOutput]) -> None:
        """All ranks have the same; the leader speaks for them."""
        if outputs and self._rank == 0:
            self._send(wire.OutputBatch(outputs=outputs, weight_version=self._core.update.weight_version))

    def _send(self, message: wire.FromRank) -> None:
        if not self._to_tokenizer.send(message):
            raise ProtocolError(
                "the tokenizer has stopped reading; a lost answer would leave its client waiting for ever"
            )

    def _beat(self) -> None:
        pending = self._core.has_work() or self._mailbox.is_waiting
        self._heartbeat.tick(self._rank, pending, now_us())

    # ----------------------------------------------------------------------------------------------- sleep

    def _sleep_blocking(self) -> None:
        self._heartbeat.set_pending(self._rank, self._mailbox.is_waiting)
        known = [self._mailbox.wake_at_us(), self._driver.wake_at_us(), self._probes.wake_at_us()]
        now = now_us()
        if self._copies_under_way:
            known.append(now + COPY_POLL_US)
        if self._weights.is_staging:
            known.append(now + STAGING_POLL_US)
        wake_at = min((at for at in known if at is not None), default=None)
        # Rounded up: waking a moment before the deadline would only spin until it comes.
        self._poller.wait(None if wake_at is None else max(0, -(-(wake_at - now) // 1_000)))
