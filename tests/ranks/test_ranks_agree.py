"""Leader decides, ranks replay: N real cores under delays, failures, tiny pools and admin commands at any moment.

Each run draws everything from one seed.  After every tick: equal digests, tree and pools intact, one owner for
every page; the played worker refuses to compute on a page with other bytes than its tokens demand.  At rest: every
request and every command ended exactly once on every rank, all ranks in one state, no lock, op or page left, and
each text as without a cache.
"""

from __future__ import annotations

import functools

import pytest

from sglang_hicache import wire
from tests.ranks.world import World, server_config

POLICIES = ("write_through", "write_back", "write_through_selective")
EVICTIONS = ("lru", "lfu", "slru", "priority")
#: (device pages, host pages): host larger, host smaller than the device, both tiny.
SIZES = ((24, 40), (60, 20), (30, 12))
US_PER_TOKEN = (0, 300)
FAULT_RATES = (0.0, 0.005, 0.03)

#: A budget of a few steps, so that reads are often cut off in the middle.
ATTACH = {"backend": "memory", "extra_config_json": '{"prefetch_threshold": 4, "prefetch_timeout_base": 0.02}'}


def traffic(world: World, steps: int) -> None:
    """Requests, aborts and commands at random moments."""
    chance = world.random
    for _ in range(steps):
        draw = chance.random()
        if draw < 0.04:
            world.submit(world.some_tokens(), priority=chance.randrange(3))
        elif draw < 0.043 and world.submitted:
            world.leader.add_abort(chance.choice(list(world.submitted)))
        elif draw < 0.045:
            policy = chance.choice(("timeout", "wait_complete", "best_effort"))
            world.command(wire.AttachStorage, **ATTACH, prefetch_policy=policy)
        elif draw < 0.047:
            world.command(wire.DetachStorage)
        elif draw < 0.049:
            world.command(wire.FlushCache, timeout_s=chance.choice((0.0, 0.5)))
        elif draw < 0.0498:
            world.command(wire.ClearStorage)
        elif draw < 0.0501:
            world.command(wire.DetachStorage, flush_timeout_s=0.05)
        for _ in world.ranks[1:]:  # more ranks need more steps to come as far
            world.happen()


def play(seed: int, rounds: int, steps: int) -> World:
    """A life of `rounds` bursts with rest in between, where everything is checked."""
    ranks = 2 + seed % 3
    device_pages, host_pages = SIZES[seed // 3 % 3]
    config = server_config(
        ranks, device_pages, host_pages, write_policy=POLICIES[seed % 3], eviction_policy=EVICTIONS[seed % 4]
    )
    fault_rate = FAULT_RATES[seed // 2 % 3]
    world = World(seed, ranks, fault_rate, config=config)
    world.us_per_token = US_PER_TOKEN[seed // 2 % 2]  # known rates: the cost gate decides
    for _ in range(rounds):
        world.command(wire.DetachStorage)
        if world.random.random() < 0.5:
            world.command(wire.FlushCache)  # else the next store gets what is cached
        world.settle()
        world.fault_rate = fault_rate * 10
        world.command(wire.AttachStorage, **ATTACH, prefetch_policy=("timeout", "wait_complete")[seed % 2])
        for _ in range(20):
            world.happen()
        world.settle()
        world.fault_rate = fault_rate
        for rank in world.ranks:
            for process in rank.storage.values():
                process.fault_rate = fault_rate
        traffic(world, steps)
        world.settle()
        world.check()
    return world


@functools.cache
def played(seed: int) -> World:
    """The life that two tests look at."""
    return play(seed, rounds=8, steps=400)


@pytest.mark.parametrize("seed", range(14))
def test_ranks_agree_after_every_tick(seed: int) -> None:
    world = played(seed)
    assert len(world.plans) > 400  # 14 runs of 2-4 ranks: some 11,000 plans, 33,000 ticks


def test_the_world_reaches_what_it_is_meant_to_test() -> None:
    """A simulator that never fetches, retracts, loses or refuses anything would prove nothing."""
    counters: dict[str, int] = {}
    answers: list[str] = []
    retractions = 0
    for seed in (1, 4, 5, 6):
        world = played(seed)
        core = world.ranks[0].core
        for room in (core.tiers.prefetcher, core.tiers.backup.books, core.tiers.controller):
            for name, tokens in room.counters.items():
                counters[name] = counters.get(name, 0) + tokens
        answers += [answer.message for answer in world.ranks[0].answers]
        retractions += sum(output.num_retractions for output in world.ranks[0].outputs if output.finish)
    for reached in ("hit", "miss", "prefetched", "backuped", "failed", "load_back", "backup", "evicted", "not_worth"):
        assert counters.get(reached), f"no run counted {reached}: {counters}"
    for sense in ("attached successfully", "detached successfully", "not idle", "cleared", "Failed to attach"):
        assert any(sense in answer for answer in answers), f"nobody was ever told '{sense}'"
    assert retractions


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 130))
def test_ranks_agree_after_every_tick_long(seed: int) -> None:
    play(seed, rounds=4, steps=3000)
