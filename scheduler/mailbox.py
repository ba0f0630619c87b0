"""How a rank comes by its next plan: the leader writes it from its mailbox, a follower receives it.

The two kinds of rank differ in nothing else; the loop sees the one protocol below.  Used on the scheduler thread.
Sends never block: a socket that is full belongs to a peer that has stopped reading, and that stops the server.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from sglang_hicache import wire
from sglang_hicache.config import ServerConfig
from sglang_hicache.errors import IntegrityError, ProtocolError
from sglang_hicache.scheduler.core import SchedulerCore
from sglang_hicache.scheduler.storage_driver import Facts
from sglang_hicache.scheduler.tick import Leader
from sglang_hicache.sockets import Poller, Pull, Push, ipc_address

#: The leader plans no further than this ahead of the slowest follower: a follower that merely lost its core for a
#: moment must not come to look dead.
MOST_PLANS_AHEAD = 32

#: Ids of planned commands that a follower remembers, for copies from the desk that come after the plan.
REMEMBERED_COMMANDS = 1024


class Mailbox(Protocol):
    """Where plans come from, and where facts go."""

    def receive(self, message: wire.ToRank, now_us: int) -> None:
        """A message of the tokenizer, other than a question about the status."""
        ...

    def next_plan(self, facts: Facts, now_us: int) -> wire.TickPlan | None:
        """Hand over what this rank has seen; the plan to apply now, if there is one."""
        ...

    def applied(self, plan: wire.TickPlan, forward_us: int = 0) -> None:
        """The plan has been applied here, and its forward took so long; 0: it had none."""
        ...

    def wake_at_us(self) -> int | None:
        """When to ask again although nothing has arrived."""
        ...

    @property
    def is_waiting(self) -> bool:
        """Something is due from another rank: if it never comes, the watchdog must see it."""
        ...


class LeaderMailbox:
    """Rank 0: collects what everybody reports, writes the plan and sends it to the followers."""

    def __init__(self, config: ServerConfig, core: SchedulerCore, poller: Poller) -> None:
        self._core = core
        self._leader = Leader(config, config.tp_size)
        followers = range(1, config.tp_size)
        self._plans = {
            rank: Push(ipc_address(config.run_dir, f"plan_{rank}"), wire.TickPlan, bind=False) for rank in followers
        }
        self._acknowledged = dict.fromkeys(followers, 0)
        self._last = 0
        self._reports = Pull(ipc_address(config.run_dir, "reports"), wire.RankReport, bind=True)
        poller.register(self._reports)

    def receive(self, message: wire.ToRank, now_us: int) -> None:
        """Into the next plan."""
        match message:
            case wire.NewRequest():
                self._leader.add_request(message)
            case wire.AbortRequest():
                self._leader.add_abort(message.rid)
            case wire.QueryStatus() | wire.DryRunStorage():
                raise ProtocolError(f"{type(message).__name__} is not for the plan")
            case _:
                self._leader.add_command(message, now_us)

    def next_plan(self, facts: Facts, now_us: int) -> wire.TickPlan | None:
        """Write the next plan and send it, unless some follower is too far behind."""
        for report in self._reports.receive_all():
            self._acknowledged[report.rank] = report.applied
            self._leader.add_report(report)
        self._leader.add_own_facts(
            list(facts.ops.values()), facts.storage, facts.clears, facts.weights, facts.canaries
        )
        if self._plans_ahead() >= MOST_PLANS_AHEAD:
            return None
        plan = self._leader.next_plan(now_us, self._core)
        if plan is None:
            return None
        self._last = plan.number
        for rank, push in self._plans.items():
            if not push.send(plan):
                raise IntegrityError(f"rank {rank} is dead: it does not take plan {plan.number}")
        return plan

    def applied(self, plan: wire.TickPlan, forward_us: int = 0) -> None:
        """Keep the digest for the followers' reports, and the time of the forward for the next plan."""
        self._leader.applied(self._core.digest, forward_us)

    def wake_at_us(self) -> int | None:
        """The next deadline; none while a follower must catch up first, since its report wakes the loop."""
        return None if self._plans_ahead() >= MOST_PLANS_AHEAD else self._leader.wake_at_us(self._core)

    @property
    def is_waiting(self) -> bool:
        """A follower has not acknowledged every plan."""
        return self._plans_ahead() > 0

    def _plans_ahead(self) -> int:
        return self._last - min(self._acknowledged.values(), default=self._last)

    def close(self) -> None:
        """Give the sockets back; the last plan still leaves."""
        for push in self._plans.values():
            push.close()
        self._reports.close()


class FollowerMailbox:
    """Every other rank: applies exactly the plans it is sent, and reports."""

    def __init__(self, config: ServerConfig, rank: int, core: SchedulerCore, poller: Poller) -> None:
        self._rank = rank
        self._core = core
        self._check_digests = config.scheduler.check_digests
        self._plans = Pull(ipc_address(config.run_dir, f"plan_{rank}"), wire.TickPlan, bind=True)
        self._reports = Push(ipc_address(config.run_dir, "reports"), wire.RankReport, bind=False)
        self._arrived: deque[wire.TickPlan] = deque()
        self._last = 0
        #: Commands that the desk sent here and no plan has brought yet, and the other way round.
        self._parked: set[str] = set()
        self._planned: deque[str] = deque(maxlen=REMEMBERED_COMMANDS)
        poller.register(self._plans)

    def receive(self, message: wire.ToRank, now_us: int) -> None:
        """Park a command by its id: the plan will bring the command itself."""
        if isinstance(message, wire.NewRequest | wire.AbortRequest | wire.QueryStatus | wire.DryRunStorage):
            raise ProtocolError(f"{type(message).__name__} was sent to rank {self._rank}, which does not lead")
        if message.id not in self._planned:
            self._parked.add(message.id)

    def next_plan(self, facts: Facts, now_us: int) -> wire.TickPlan | None:
        """The oldest plan that has arrived.  Facts that no plan waits for are reported by themselves."""
        if facts:
            self._report(facts)
        self._arrived.extend(self._plans.receive_all())
        if not self._arrived:
            return None
        plan = self._arrived.popleft()
        if plan.number != self._last + 1:
            raise IntegrityError(f"rank {self._rank} was sent plan {plan.number} after plan {self._last}")
        return plan

    def applied(self, plan: wire.TickPlan, forward_us: int = 0) -> None:
        """Acknowledge.  How long the forward took is for the leader to say, who speaks for all."""
        self._last = plan.number
        for command in plan.commands:
            self._parked.discard(command.id)
            self._planned.append(command.id)
        self._report(Facts())

    def _report(self, facts: Facts) -> None:
        report = wire.RankReport(
            rank=self._rank,
            applied=self._last,
            digest=self._core.digest if self._check_digests else 0,
            ops=list(facts.ops.values()),
            storage=facts.storage,
            clears=facts.clears,
            weights=facts.weights,
            canaries=facts.canaries,
        )
        if not self._reports.send(report):
            raise IntegrityError("the leader is dead: it does not take reports")

    def wake_at_us(self) -> int | None:
        """Only what arrives moves a follower."""
        return 0 if self._arrived else None

    @property
    def is_waiting(self) -> bool:
        """A command has not come back in a plan."""
        return bool(self._parked or self._arrived)

    def close(self) -> None:
        """Give the sockets back; the last report still leaves."""
        self._plans.close()
        self._reports.close()
