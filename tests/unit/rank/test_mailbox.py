"""Leader's and followers' mailboxes over real sockets: order, acknowledgement, and the faults that stop a server."""

import contextlib

import msgspec
import pytest

from sglang_hicache import wire
from sglang_hicache.errors import IntegrityError, ProtocolError
from sglang_hicache.scheduler.core import SchedulerCore
from sglang_hicache.scheduler.mailbox import MOST_PLANS_AHEAD, FollowerMailbox, LeaderMailbox
from sglang_hicache.scheduler.storage_driver import Facts
from sglang_hicache.sockets import Poller, Push, ipc_address

#: Upper bound of every wait in this file: reached only when a test fails.
FAIL_MS = 60_000


class Pair:
    """A leader and a follower with real cores, in one thread."""

    def __init__(self, config, stack: contextlib.ExitStack) -> None:
        self.config = config
        self.pollers = Poller(), Poller()
        self.cores = SchedulerCore(config, 0), SchedulerCore(config, 1)
        self.leader = LeaderMailbox(config, self.cores[0], self.pollers[0])
        stack.callback(self.leader.close)
        self.follower = FollowerMailbox(config, 1, self.cores[1], self.pollers[1])
        stack.callback(self.follower.close)

    def lead(self, facts: Facts | None = None, forward_us: int = 0) -> wire.TickPlan | None:
        plan = self.leader.next_plan(facts or Facts(), 1)
        if plan is not None:
            self.cores[0].apply(plan)
            self.leader.applied(plan, forward_us)
        return plan

    def follow(self, facts: Facts | None = None) -> wire.TickPlan:
        while (plan := self.follower.next_plan(facts or Facts(), 1)) is None:
            assert self.pollers[1].wait(FAIL_MS), "no plan arrived"
        self.cores[1].apply(plan)
        self.follower.applied(plan)
        return plan

    def hear(self) -> None:
        """Wait for a report at the leader."""
        assert self.pollers[0].wait(FAIL_MS), "no report arrived"


@pytest.fixture
def pair(config):
    with contextlib.ExitStack() as stack:
        yield Pair(config, stack)


def abort(pair: Pair, rid: str = "x") -> None:
    pair.leader.receive(wire.AbortRequest(rid=rid), 1)


def test_a_plan_goes_to_the_follower_and_comes_back_acknowledged(pair):
    assert pair.lead() is None, "nothing has happened"
    abort(pair)
    assert pair.lead() == pair.follow()
    assert pair.leader.is_waiting
    pair.hear()
    pair.lead()
    assert not pair.leader.is_waiting


def test_the_next_plan_says_how_long_the_leaders_forward_took(pair):
    told = []
    for forward_us in (700, 0, 5):
        abort(pair)
        told.append(pair.lead(forward_us=forward_us).forward_us)
        assert pair.follow().forward_us == told[-1], "followers hear it from the plan, and measure nothing"
    assert told == [0, 700, 0]


def test_a_followers_facts_reach_the_plan_without_a_tick(pair):
    pair.follower.next_plan(Facts(storage=[wire.StorageFact("lost", 9, "gone")]), 1)
    pair.hear()
    assert pair.lead() is not None, "news wake the leader"


def test_the_leader_waits_for_a_slow_follower_instead_of_calling_it_dead(pair):
    for number in range(MOST_PLANS_AHEAD):
        abort(pair, str(number))
        assert pair.lead() is not None
    abort(pair)
    assert pair.lead() is None and pair.leader.wake_at_us() is None
    for _ in range(MOST_PLANS_AHEAD):
        pair.follow()
    pair.hear()
    while (plan := pair.lead()) is None:
        pair.hear()
    assert plan.number == MOST_PLANS_AHEAD + 1


def test_digests_that_differ_stop_the_server(pair):
    abort(pair)
    pair.lead()
    pair.cores[1]._digest.mix(99)
    pair.follow()
    pair.hear()
    with pytest.raises(IntegrityError, match="rank 1 disagrees after plan 1"):
        pair.lead()


def test_a_gap_in_the_plans_stops_the_follower(pair):
    push = Push(ipc_address(pair.config.run_dir, "plan_1"), wire.TickPlan)
    assert push.send(wire.TickPlan(number=2, now_us=1))
    with pytest.raises(IntegrityError, match="rank 1 was sent plan 2 after plan 0"):
        pair.follow()
    push.close()


def test_a_parked_command_counts_as_pending_until_its_plan_comes(pair):
    command = wire.FlushCache(id="f", deadline_s=1)
    pair.follower.receive(command, 1)
    assert pair.follower.is_waiting
    pair.leader.receive(command, 1)
    pair.lead()
    pair.follow()
    assert not pair.follower.is_waiting


def test_a_copy_that_comes_after_its_plan_is_not_parked_for_ever(pair):
    command = wire.FlushCache(id="f", deadline_s=1)
    pair.leader.receive(command, 1)
    pair.lead()
    pair.follow()
    pair.follower.receive(command, 1)
    assert not pair.follower.is_waiting


def test_requests_are_for_the_leader_only(pair):
    request = wire.NewRequest(rid="r", token_ids=[1], sampling=wire.SamplingParams())
    with pytest.raises(ProtocolError, match="rank 1"):
        pair.follower.receive(request, 1)


def test_a_single_rank_waits_for_nobody(config):
    config = msgspec.structs.replace(config, tp_size=1)
    poller = Poller()
    mailbox = LeaderMailbox(config, SchedulerCore(config, 0), poller)
    mailbox.receive(wire.AbortRequest(rid="x"), 1)
    assert mailbox.next_plan(Facts(), 1) is not None
    assert not mailbox.is_waiting
    mailbox.close()
