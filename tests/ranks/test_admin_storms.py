"""Admin commands of every kind at random moments, over each other, under load, with stores that fail and hang.

Some stores are watched, so that the server changes them by itself in between.

What must hold is what always must: `World.check`, equal digests after each plan, one owner for every page after each
tick.  And what live control promises: every command is answered exactly once and in time, no request fails, and none
waits for a store that is being taken out.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import pytest

from sglang_hicache import wire
from sglang_hicache.cache.backup import BackupQueue
from sglang_hicache.cache.prefetch import Prefetcher
from sglang_hicache.errors import IntegrityError
from sglang_hicache.scheduler.commands import Commands
from sglang_hicache.storage import attachment_table
from sglang_hicache.storage.attachment import StorageSlot
from sglang_hicache.storage.attachment_events import Kind, State
from tests.ranks.control import attach, detach
from tests.ranks.world import SimRank, World, server_config

PATHS = ("", "/b", "/c")
DEADLINES_S = (0.0, 0.05, 0.5, 3.0)
#: What the server does by itself in between.
STANDBY = {"backend": "file", "extra_config": {"file_storage_path": "/standby"}}
HASTY = {"backoff_initial_s": 0.05, "backoff_max_s": 0.2, "consecutive_errors": 2, "healthy_s": 0.1}
TOLERANCES = (
    None, None, {"level": "auto_detach"}, {"level": "auto_reconnect", **HASTY},
    {"level": "failover", "standby": [STANDBY], **HASTY},
)  # fmt: skip
#: From the deadline of a command on: time in which a killed process is given up, and a few ticks of a busy leader.
GRACE_S = 1.0


class Watch:
    """Looks at every rank after every plan."""

    def __init__(self, world: World) -> None:
        self.world = world
        #: By rank: requests whose prefetch was being stopped at the plan before.
        self.stopping: list[set[str]] = [set() for _ in world.ranks]
        self.places: Counter[tuple[State, ...]] = Counter()
        #: By id of a command that is not answered yet: the plan's clock by which it must be.
        self.open_us: dict[str, int] = {}

    def __call__(self, rank: SimRank) -> None:
        if rank.number == 0:
            self._look_at_the_clock(rank)
        tiers = rank.core.tiers
        gate = tiers.slot.gate()
        stopping = set()
        for rid, prefetch in tiers.prefetcher._by_rid.items():
            phase = prefetch.phase.value
            assert phase in ("stopping", "over") or prefetch.op.epoch == gate, f"{rid} waits for a store that goes"
            if phase == "stopping":
                stopping.add(rid)
        assert not stopping & self.stopping[rank.number] or rank.number, "a request waits for more than one plan"
        self.stopping[rank.number] = stopping
        self.places[tuple(a.state for a in tiers.slot.places())] += 1


    def _look_at_the_clock(self, leader: SimRank) -> None:
        plan = self.world.plans[-1]
        for command in plan.commands:
            self.open_us[command.id] = plan.now_us + int((command.deadline_s + GRACE_S) * 1e6)
        answered = {answer.id for answer in leader.answers}
        self.open_us = {i: at for i, at in self.open_us.items() if i not in answered}
        late = [i for i, at in self.open_us.items() if plan.now_us > at]
        assert not late, f"{late} not answered in time: {leader.core.tiers.slot!r}"


def command(world: World) -> None:
    """One of any kind."""
    chance = world.random
    mode, deadline_s = chance.choice(("idle", "drain", "force")), chance.choice(DEADLINES_S)
    draw = chance.random()
    if draw < 0.4:
        policy = chance.choice(("timeout", "wait_complete", "best_effort", None))
        attach(
            world, chance.choice(PATHS), switch=chance.random() < 0.7, mode=mode, prefetch_policy=policy,
            deadline_s=chance.choice((0.1, 3.0, 3.0)), drain_s=chance.choice(DEADLINES_S),
            tolerance=chance.choice(TOLERANCES),
        )  # fmt: skip
    elif draw < 0.55:
        detach(world, mode, deadline_s)
    elif draw < 0.75 and world.commands:
        world.command(wire.CancelCommand, target=chance.choice(world.commands[-3:]))
    elif draw < 0.83:
        world.command(wire.ClearStorage, deadline_s=deadline_s)
    elif draw < 0.92:
        timeout_s = chance.choice((0.0, 0.1))
        world.command(wire.FlushCache, timeout_s=timeout_s, deadline_s=3.0, keep_storage=chance.random() < 0.5)
    else:
        world.command(wire.UpdateWeights, weights_digest=chance.choice(("", "w1")), deadline_s=deadline_s)


def storm(world: World, steps: int, rate: float) -> None:
    chance = world.random
    for _ in range(steps):
        draw = chance.random()
        if draw < 0.05:
            world.submit(world.some_tokens())
        elif draw < 0.05 + rate:
            command(world)
            while chance.random() < 0.4:  # one on top of the other
                for _ in range(chance.randrange(8)):
                    world.happen()
                command(world)
        elif draw < 0.07 + rate:
            rank = chance.choice(world.ranks)
            alive = [p for p in rank.storage.values() if p.state in ("opening", "open", "stopping")]
            if alive:
                chance.choice(alive).state = "held"
        for _ in range(4 * len(world.ranks)):
            world.happen()


def play(seed: int, rounds: int, steps: int) -> World:
    ranks = 1 + seed % 4
    device_pages, host_pages = ((24, 40), (60, 20), (200, 200))[seed % 3]
    policy = ("write_through", "write_back", "write_through_selective")[seed % 3]
    world = World(seed, ranks, config=server_config(ranks, device_pages, host_pages, write_policy=policy))
    world.watch = Watch(world)
    for number in range(rounds):
        fault_rate = (0.0, 0.01, 0.05)[(seed + number) % 3]
        world.fault_rate = fault_rate
        for rank in world.ranks:
            for process in rank.storage.values():
                process.fault_rate = fault_rate
        storm(world, steps, rate=0.1)
        world.settle()
        world.check()
        failed = [o.finish.message for o in world.ranks[0].outputs if o.finish and o.finish.type == "abort"]
        assert not failed, f"a change of the storage cost somebody an answer: {failed}"
    return world


#: One life is looked at by two tests.
played = functools.cache(play)


@pytest.mark.parametrize("seed", range(10))
def test_commands_at_random_moments_leave_all_ranks_alike_and_fail_nobody(seed: int) -> None:
    played(seed, 4, 100)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 130))
def test_commands_at_random_moments_long(seed: int) -> None:
    play(seed, 8, 600)


def test_the_storms_reach_what_they_are_meant_to_test() -> None:
    told, places, causes = "", Counter(), set()
    for seed in range(10):
        world = played(seed, 4, 100)
        told += " ".join(answer.message for answer in world.ranks[0].answers)
        places += world.watch.places
        causes |= {news.cause.split()[0] for news in world.ranks[0].news}
    for sense in (
        "attached successfully", "took over from", "detached successfully", "did not end by itself", "cancelled",
        "given up by a detach", "is given up", "cannot be cancelled", "Another change", "not idle", "timeout: not open",
        "no such host", "policies updated", "cleared", "flushed", "weights updated",
    ):  # fmt: skip
        assert sense in told, f"nobody was ever told '{sense}'"
    assert causes >= {"command", "breaker", "failover", "failback"}
    for state in (State.DRAINING, State.FAILED, State.ATTACHING):
        assert places[State.ATTACHED, state], f"never {state} beside another that serves"


# ------------------------------------------------------------------------------- mistakes that must be noticed


def a_switch_leaves_the_parents_of_those_who_wait_behind(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BackupQueue, "_offer_parents_again", lambda self, is_another: None)


def requests_wait_for_a_store_that_drains(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Prefetcher, "stop_epoch", lambda self, epoch: None)


def a_detach_by_force_waits_as_long_as_the_one_before(patch: pytest.MonkeyPatch) -> None:
    wait = attachment_table._wait
    for state in (State.DRAINING, State.DETACHING):
        patch.setitem(attachment_table.TABLE, (state, Kind.DETACH), wait)


def a_write_that_ends_late_is_stored_in_the_new_store(patch: pytest.MonkeyPatch) -> None:
    real = BackupQueue.written
    patch.setattr(BackupQueue, "written", lambda self, entry, tag: real(self, entry, self.tag or tag))


def a_cancel_answers_what_it_gives_up(patch: pytest.MonkeyPatch) -> None:
    real = Commands._cancel

    def cancel(self: Commands, command: wire.CancelCommand) -> None:
        if command.target in self._attaching:
            self._answer(command.target, False, "cancelled")
        real(self, command)

    patch.setattr(Commands, "_cancel", cancel)


def one_rank_ignores_a_cancel(patch: pytest.MonkeyPatch) -> None:
    real = Commands._cancel
    patch.setattr(Commands, "_cancel", lambda self, command: self._rank == 1 or real(self, command))


def the_gate_stays_open_while_it_drains(patch: pytest.MonkeyPatch) -> None:
    def gate(slot: StorageSlot) -> int | None:
        current = slot.current
        return current.epoch if current and current.state in (State.ATTACHED, State.DRAINING) else None

    patch.setattr(StorageSlot, "gate", gate)


MUTANTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    a_switch_leaves_the_parents_of_those_who_wait_behind, requests_wait_for_a_store_that_drains,
    a_detach_by_force_waits_as_long_as_the_one_before, a_write_that_ends_late_is_stored_in_the_new_store,
    a_cancel_answers_what_it_gives_up, one_rank_ignores_a_cancel, the_gate_stays_open_while_it_drains,
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_storms_notice(mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises((IntegrityError, AssertionError)):
        for seed in (5, 4, 12, 0, 11, 15, 17, *range(18, 48)):  # first those that have noticed it so far
            play(seed, 4, 100)
