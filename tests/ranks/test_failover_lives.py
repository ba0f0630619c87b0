"""Stores fall sick and get well, and commands come, at random moments: ranks never differ, and all that began ends."""

from __future__ import annotations

import functools

import pytest

from sglang_hicache import wire
from tests.ranks.failover import A, B, attach, failover, news
from tests.ranks.world import World, server_config

LEVELS = ("auto_detach", "auto_reconnect", "failover")
HASTY = {"min_ops": 4, "window_s": 0.5, "backoff_initial_s": 0.02, "backoff_max_s": 0.2, "healthy_s": 0.3}


@functools.cache
def life(seed: int, steps: int) -> World:
    """Requests, commands, and stores that fall sick and get well, at random moments."""
    ranks, level = 2 + seed % 2, ("off", "auto_detach", "auto_reconnect", "failover")[seed % 4]
    world = World(seed, ranks, fault_rate=0.002, config=server_config(ranks, device_pages=60, host_pages=80))
    chance = world.random
    names = [(name, rank) for name in ("memory", "file/a", "file/b") for rank in (None, 0, 1)]
    world.check_each_tick = seed % 4 == 1
    attach(world, level, A, B, **HASTY)
    for _ in range(steps):
        draw = chance.random()
        if draw < 0.05:
            world.submit(world.some_tokens())
        elif draw < 0.054:
            sick = chance.choice(names)
            world.sick ^= {sick}
        elif draw < 0.055:
            world.command(wire.DetachStorage, mode=chance.choice(("idle", "drain", "force")), deadline_s=0.3)
        elif draw < 0.0565:
            fields = {"switch": chance.random() < 0.5, "keeps_trying": chance.random() < 0.5}
            attach(world, chance.choice(LEVELS), A, B, fields=fields, **HASTY)
        elif draw < 0.057:
            world.command(wire.FlushCache, timeout_s=0.2)
        elif draw < 0.0573:
            world.command(wire.UpdateWeights, weights_digest=f"{chance.randrange(3)}" * 64)
        for _ in world.ranks:
            world.happen()
    world.settle()
    world.check()
    return world


SEEDS, STEPS = (2, 3, 5, 6, 7, 11), 900


@pytest.mark.parametrize("seed", SEEDS)
def test_sick_stores_and_commands_at_random_moments_part_no_ranks(seed: int) -> None:
    first, *others = (rank.news for rank in life(seed, STEPS).ranks)
    assert all(other == first for other in others)


def test_random_lives_reach_what_they_are_meant_to_test() -> None:
    """The same lives: a world in which no store ever came back would prove nothing."""
    worlds = [life(seed, STEPS) for seed in SEEDS]
    causes = {cause.split()[0] for world in worlds for cause, *_ in news(world)}
    assert causes == {"command", "breaker", "reconnect", "failover", "failback"}
    assert sum(failover(world).breaker.trips for world in worlds) > 3


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 140))
def test_sick_stores_and_commands_at_random_moments_long(seed: int) -> None:
    life(seed, steps=6000)
