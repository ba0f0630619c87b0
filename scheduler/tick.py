"""The leader: turns what all ranks report, and its own clock, into the plan of the next tick.

The only place that decides when something has happened for everybody.  `Ledger` holds what each rank said of each
op and each attachment; an outcome enters a plan when every rank (or, for bad news, any rank) has said so.  The
leader plans from its own replica, which has applied every plan and so is the newest: what a late fact speaks of is
looked up there, and dropped if it is gone.  Runs on rank 0, on the scheduler thread.  Pure: the loop brings the
facts and the time.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Collection, Sequence

import msgspec

from sglang_hicache import wire
from sglang_hicache.cache.op import COPIES, Op, OpPhase
from sglang_hicache.config import ServerConfig
from sglang_hicache.errors import IntegrityError
from sglang_hicache.scheduler import endings
from sglang_hicache.scheduler.core import SchedulerCore
from sglang_hicache.storage.attachment import StorageAttachment, StorageSlot
from sglang_hicache.storage.attachment_events import State

log = logging.getLogger(__name__)

#: Code of an op whose storage process has said what cannot be.
CONTRACT = "contract"


class Ledger:
    """What each rank said, until all have."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._ops: dict[int, dict[int, wire.OpFact]] = {}
        self._storage: dict[tuple[str, int], dict[int, str]] = {}
        self._clears: dict[str, dict[int, str]] = {}
        self._weights: dict[str, dict[int, str]] = {}
        self._canaries: dict[int, dict[int, wire.CanaryFact]] = {}

    def add(
        self, rank: int, ops: list[wire.OpFact], storage: list[wire.StorageFact], clears: list[wire.ClearFact]
    ) -> None:
        for fact in ops:
            self._ops.setdefault(fact.op_id, {})[rank] = fact
        for said in storage:
            self._storage.setdefault((said.kind, said.epoch), {})[rank] = said.detail
        for cleared in clears:
            self._clears.setdefault(cleared.command_id, {})[rank] = cleared.reason

    def add_weights(self, rank: int, facts: Sequence[wire.WeightsFact]) -> None:
        """A rank has read the weights of a command, or could not."""
        for fact in facts:
            self._weights.setdefault(fact.command_id, {})[rank] = fact.reason

    def add_canaries(self, rank: int, facts: Sequence[wire.CanaryFact]) -> None:
        """A rank has tried a backend that is not attached."""
        for fact in facts:
            self._canaries.setdefault(fact.number, {})[rank] = fact

    def said(self, kind: str, epoch: int) -> dict[int, str]:
        """Who reported this of an epoch, with the details."""
        return self._storage.get((kind, epoch), {})

    def by_all(self, kind: str, epoch: int) -> bool:
        return len(self.said(kind, epoch)) == self._ranks

    def closed_by(self, op_id: int) -> set[int]:
        """Ranks that have let go of an op."""
        return {rank for rank, fact in self._ops.get(op_id, {}).items() if fact.closed}

    def op_outcomes(self, core: SchedulerCore, ending: set[int]) -> list[wire.OpOutcome]:
        """Ops on which all ranks agree now; those of an epoch that ends in this plan go with it."""
        outcomes, ops = [], core.tiers.ops
        for op_id in [op_id for op_id in self._ops if ops.get(op_id) is None]:
            del self._ops[op_id]
        for op in ops:
            facts = self._ops.get(op.id, {})
            if op.epoch in ending or (not facts and op.phase is not OpPhase.REVOKED):
                continue
            pages, reason = self._least(op, facts) if len(facts) == self._ranks else (0, "")
            closed = len(facts) == self._ranks and all(f.closed for f in facts.values())
            settled = len(facts) == self._ranks and all(f.settled for f in facts.values())
            # A revoked op is settled at once, with what has been reported: its request must not wait for a
            # process that may hang.
            is_news = op.phase is not OpPhase.SETTLED and (settled or op.phase is OpPhase.REVOKED)
            if closed or is_news:
                took_us = max(f.took_us for f in facts.values()) if closed or settled else 0
                outcomes.append(wire.OpOutcome(op.id, pages, closed, reason, took_us))
        return outcomes

    @staticmethod
    def _least(op: Op, facts: dict[int, wire.OpFact]) -> tuple[int, str]:
        """The fewest pages that any rank has, and why: the lowest of those ranks speaks for all of them."""
        said = {rank: (fact.pages, fact.reason) for rank, fact in facts.items()}
        for rank, (pages, _) in said.items():
            if pages > op.pages and op.kind not in COPIES:
                # Not believed in any page.  Taken at its word it would end every rank: no op can settle beyond its end.
                log.warning("rank %d claims %d of %d pages", rank, pages, op.pages, extra={"op": op.id})
                said[rank] = 0, CONTRACT
        rank = min(said, key=lambda rank: (said[rank][0], rank))
        return said[rank]

    def clear_outcomes(self, core: SchedulerCore, overdue: set[str]) -> list[wire.ClearOutcome]:
        """Clears that every rank has finished, or that will not be finished."""
        outcomes, clearing = [], core.commands.clearing()
        for command_id, epoch in clearing.items():
            said = self._clears.get(command_id, {})
            is_over = command_id in overdue or core.tiers.slot.gate() != epoch
            if len(said) == self._ranks or is_over:
                gone = "the storage was lost, detached or switched meanwhile"
                why = "not cleared in time" if command_id in overdue else gone
                reasons = tuple(said.get(rank, why) for rank in range(self._ranks))
                outcomes.append(wire.ClearOutcome(command_id, reasons))
        self._clears = {k: v for k, v in self._clears.items() if k in clearing}
        return outcomes

    def weights_outcomes(self, core: SchedulerCore, overdue: set[str]) -> list[wire.WeightsOutcome]:
        """The vote on new weights, once it is unanimous, or cannot be any more."""
        command_id = core.update.staging()
        said = self._weights.get(command_id, {}) if command_id else {}
        self._weights = {k: v for k, v in self._weights.items() if k == command_id}
        refusals = "; ".join(f"rank {rank}: {reason}" for rank, reason in sorted(said.items()) if reason)
        if command_id is None:
            return []
        if refusals or len(said) == self._ranks:
            return [wire.WeightsOutcome(command_id, refusals)]
        if command_id in overdue:
            late = ", ".join(str(rank) for rank in range(self._ranks) if rank not in said)
            return [wire.WeightsOutcome(command_id, f"not read in time on rank {late}")]
        return []

    def canary_outcomes(self, core: SchedulerCore, now_us: int) -> list[wire.CanaryOutcome]:
        """Canaries that ended well on every rank, or badly on any, or that have had their time."""
        outcomes, under_way = [], core.failover.canaries()
        self._canaries = {number: said for number, said in self._canaries.items() if number in under_way}
        for number, deadline_us in under_way.items():
            said = self._canaries.get(number, {})
            failure = endings.reported({rank: fact.reason for rank, fact in said.items() if fact.reason})
            if not failure and len(said) < self._ranks:
                if now_us < deadline_us:
                    continue
                late = ", ".join(str(rank) for rank in range(self._ranks) if rank not in said)
                failure = f"hung: the store was not tried to the end in time on rank {late}"
            page_s = max((fact.page_s for fact in said.values()), default=0.0)
            outcomes.append(wire.CanaryOutcome(number, failure, page_s))
        return outcomes

    def forget(self, slot: StorageSlot) -> None:
        """Drop what was said of epochs that are gone."""
        alive = {a.epoch for a in slot.places()} | set(slot.quarantined)
        self._storage = {key: said for key, said in self._storage.items() if key[1] in alive}


class Leader:
    """Rank 0's mailbox and clock, and the plans they become."""

    def __init__(self, config: ServerConfig, ranks: int) -> None:
        self._config = config
        self._ranks = ranks
        self._ledger = Ledger(ranks)
        self._seeds = random.Random(config.model.random_seed)
        self._requests: list[wire.NewRequest] = []
        self._aborts: list[str] = []
        self._commands: list[wire.Command] = []
        #: Leader's clock when a command that the ranks vote on has had its time; what it asked of the storage slot is
        #: remembered there.
        self._deadlines: dict[str, int] = {}
        self._number = 0
        self._applied = [0] * ranks
        #: Own digest after each plan that some follower has not acknowledged.
        self._digests: dict[int, int] = {}
        self._has_news = False
        #: How long the forward of the latest plan took here; 0: it had none.
        self._forward_us = 0

    # ------------------------------------------------------------------------------------------ mailbox

    def add_request(self, request: wire.NewRequest) -> None:
        if request.sampling.seed is None:  # chosen once, here: a retracted request must repeat itself
            sampling = msgspec.structs.replace(request.sampling, seed=self._seeds.getrandbits(31))
            request = msgspec.structs.replace(request, sampling=sampling)
        self._requests.append(request)

    def add_abort(self, rid: str) -> None:
        self._aborts.append(rid)

    def add_command(self, command: wire.Command, now_us: int) -> None:
        self._commands.append(command)
        if not isinstance(command, wire.Shutdown):
            self._deadlines[command.id] = now_us + int(command.deadline_s * 1e6)

    def add_own_facts(
        self,
        ops: list[wire.OpFact],
        storage: list[wire.StorageFact],
        clears: list[wire.ClearFact],
        weights: Sequence[wire.WeightsFact] = (),
        canaries: Sequence[wire.CanaryFact] = (),
    ) -> None:
        self._ledger.add(0, ops, storage, clears)
        self._ledger.add_weights(0, weights)
        self._ledger.add_canaries(0, canaries)
        self._has_news |= bool(ops or storage or clears or weights or canaries)

    def add_report(self, report: wire.RankReport) -> None:
        """A follower's facts and acknowledgement.  A digest that differs means that ranks disagree: a defect."""
        self._ledger.add(report.rank, report.ops, report.storage, report.clears)
        self._ledger.add_weights(report.rank, report.weights)
        self._ledger.add_canaries(report.rank, report.canaries)
        self._has_news |= bool(report.ops or report.storage or report.clears or report.weights or report.canaries)
        self._applied[report.rank] = max(self._applied[report.rank], report.applied)
        own = self._digests.get(report.applied)
        if report.digest and own is not None and own != report.digest:
            raise IntegrityError(
                f"rank {report.rank} disagrees after plan {report.applied}: digest {report.digest:x}, leader {own:x}"
            )
        behind = min(self._applied[1:], default=self._number)
        for number in [n for n in self._digests if n <= behind]:
            del self._digests[number]

    def applied(self, digest: int, forward_us: int = 0) -> None:
        """The leader's own replica has applied the latest plan, and its forward took so long."""
        self._forward_us = forward_us
        self._applied[0] = self._number
        if self._ranks > 1 and self._config.scheduler.check_digests:
            self._digests[self._number] = digest

    # -------------------------------------------------------------------------------------------- plans

    def next_plan(self, now_us: int, core: SchedulerCore) -> wire.TickPlan | None:
        """The plan of the next tick, or None when nothing has happened and nothing is to do."""
        wake_us = self.wake_at_us(core)
        due = wake_us is not None and now_us >= wake_us
        inputs = self._requests or self._aborts or self._commands
        if not (inputs or self._has_news or due or core.has_work() or self._has_revoked(core)):
            return None
        storage = self._storage_outcomes(now_us, core)
        # Of several facts about an epoch one plan takes the first: a process that was lost and is reaped already must
        # not stay FAILED until somebody else brings news.
        self._has_news = bool(storage)
        ending = {o.epoch for o in storage if o.event in ("reaped", "reap_timeout", "quiet")}
        overdue = {i for i, at in self._deadlines.items() if now_us >= at}
        self._number += 1
        plan = wire.TickPlan(
            number=self._number, now_us=now_us, forward_us=self._forward_us, storage=storage,
            ops=self._ledger.op_outcomes(core, ending),
            clears=self._ledger.clear_outcomes(core, overdue),
            weights=self._ledger.weights_outcomes(core, overdue),
            canaries=self._ledger.canary_outcomes(core, now_us), commands=self._commands, aborts=self._aborts,
            requests=self._requests,
        )
        self._commands, self._aborts, self._requests = [], [], []
        self._ledger.forget(core.tiers.slot)
        return plan

    def _has_revoked(self, core: SchedulerCore) -> bool:
        return any(op.phase is OpPhase.REVOKED for op in core.tiers.ops)

    def _storage_outcomes(self, now_us: int, core: SchedulerCore) -> list[wire.StorageOutcome]:
        """At most one outcome per epoch: a second would find the state that the first has just left."""
        slot, ledger = core.tiers.slot, self._ledger
        outcomes = []
        for attachment in slot.places():
            event, detail = self._event(attachment, now_us, core)
            if event and slot.expects(event, attachment.epoch):
                if event in ("lost", "deadline"):
                    log.warning("the storage is given up: %s", detail, extra={"epoch": attachment.epoch})
                outcomes.append(wire.StorageOutcome(event, attachment.epoch, detail))
        for epoch in slot.quarantined:
            # A driver reports quiet with the reap, or, for a backend with late_io, when its fence has proven it.
            if ledger.by_all("quiet", epoch):
                outcomes.append(wire.StorageOutcome("quiet", epoch))
        return outcomes

    def _event(self, attachment: StorageAttachment, now_us: int, core: SchedulerCore) -> tuple[str, str]:
        """What has happened to one attachment, or ("", "")."""
        ledger, epoch, state = self._ledger, attachment.epoch, attachment.state
        if state in (State.DETACHING, State.FAILED) and ledger.by_all("reaped", epoch):
            return "reaped", ""
        if state is State.FAILED and ledger.said("reap_timeout", epoch):
            return "reap_timeout", endings.unreaped(ledger.said("reap_timeout", epoch))
        for bad in ("open_failed", "lost"):  # one rank's loss is everybody's
            if ledger.said(bad, epoch) and core.tiers.slot.expects(bad, epoch):
                return bad, endings.reported(ledger.said(bad, epoch))
        if state is State.ATTACHING and ledger.by_all("opened", epoch):
            return "commit", ledger.said("opened", epoch).get(0, "")
        if state in (State.ATTACHED, State.DRAINING):
            stuck = [op for op in core.tiers.ops.of_epoch(epoch) if op.deadline_us and now_us >= op.deadline_us]
            if stuck:
                late = self._others(ledger.closed_by(stuck[0].id))
                return "lost", endings.hung(attachment, stuck[0], self._config.storage.op_timeout_s, late)
        if attachment.due_us is not None and now_us >= attachment.due_us:
            heard = "opened" if state is State.ATTACHING else "reaped"
            return "deadline", endings.overdue(attachment, self._others(ledger.said(heard, epoch)))
        return "", ""

    def _others(self, ranks: Collection[int]) -> str:
        """All ranks but these, as text."""
        return endings.named([rank for rank in range(self._ranks) if rank not in ranks])

    def wake_at_us(self, core: SchedulerCore) -> int | None:
        """When the leader must look at the clock again although nothing has arrived."""
        alive = core.unanswered() | {command.id for command in self._commands}
        self._deadlines = {i: at for i, at in self._deadlines.items() if i in alive}
        known = [core.next_deadline_us(), *self._deadlines.values()]
        known += core.failover.canaries().values()
        return min((at for at in known if at is not None), default=None)
