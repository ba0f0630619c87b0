"""Stores that fall sick in a simulated server, and how time goes by meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from sglang_hicache import wire
from sglang_hicache.cache.breaker import Trust
from sglang_hicache.scheduler.failover import Failover
from tests.ranks.reads import tick
from tests.ranks.world import World, server_config

S = 1_000_000
#: Of the plan's clock, from one tick to the next while something goes on.
STEP_US = 20_000

#: Short, so that a test sees the longest wait.
TOLERANCE = {
    "backoff_initial_s": 0.5, "backoff_max_s": 4, "consecutive_errors": 3, "min_ops": 10, "window_s": 5,
    "healthy_s": 2, "canary_timeout_s": 1,
}  # fmt: skip
A, B = "/a", "/b"


def extra_config(level: str, *standbys: str, **tolerance: object) -> str:
    """Extra config of the memory store; the standbys are file stores in these folders."""
    others = [
        {"backend": "file", "extra_config": {"file_storage_path": path, "prefetch_threshold": 4}} for path in standbys
    ]
    ft = {"level": level, "standby": others} | TOLERANCE | tolerance
    return json.dumps({"prefetch_threshold": 4, "fault_tolerance": ft})


def attached(level: str, *standbys: str, ranks: int = 2, **tolerance: object) -> World:
    """A quiet world whose memory store is attached.  Its pages are checked at the end: what matters here is time."""
    config = server_config(ranks, device_pages=200, host_pages=200)
    world = World(0, ranks, fault_rate=0.0, config=config, check_each_tick=False)
    command = attach(world, level, *standbys, **tolerance)
    until(world, lambda: all(rank.answers for rank in world.ranks))
    assert world.answer(command).success
    return world


def attach(world: World, level: str, *standbys: str, fields: Mapping[str, object] | None = None, **ft: object) -> str:
    """The command that attaches the memory store."""
    return world.command(
        wire.AttachStorage, backend="memory", extra_config_json=extra_config(level, *standbys, **ft), mode="drain",
        prefetch_policy="wait_complete", **(fields or {}),
    )  # fmt: skip


def failover(world: World) -> Failover:
    """Of rank 0; the others have the same."""
    return world.ranks[0].core.failover


def breaker(world: World) -> wire.BreakerStatus:
    return failover(world).status(world.now_us)


def state(world: World) -> Trust:
    return failover(world).breaker.state


def serving(world: World) -> str:
    """Name of the store that takes operations, the same on every rank that has caught up."""
    (name,) = {
        rank.core.failover.status(world.now_us).serving if rank.core.tiers.slot.gate() else "" for rank in world.ranks
    }
    return name


def news(world: World) -> list[tuple[str, str, str]]:
    """Cause, before and after of every change, as every rank would tell it."""
    first, *others = ([(n.cause, n.before, n.after) for n in rank.news] for rank in world.ranks)
    assert all(other == first for other in others)
    return first


def step(world: World, end_us: int | None = None) -> None:
    """Every process does a thing, and the leader looks; where nothing goes on, time jumps to the next deadline."""
    before = len(world.plans)
    for rank in world.ranks:
        while rank.copies:
            rank.finish_copy()
        rank.end_canary()
        for process in list(rank.storage.values()):
            process.step()
    tick(world)
    for rank in world.ranks:
        assert rank.core.digest == world.ranks[0].core.digest, f"rank {rank.number} differs"
    works = any(p.queue and p.state == "open" for rank in world.ranks for p in rank.storage.values())
    if len(world.plans) > before or works or any(rank.has_facts() for rank in world.ranks):
        world.now_us += STEP_US
    else:
        known = [at for at in (world.leader.wake_at_us(world.ranks[0].core), end_us) if at is not None]
        world.now_us = max(world.now_us + 1, min(known, default=world.now_us + STEP_US))


def until(world: World, holds: Callable[[], bool], limit: int = 4000) -> float:
    """Let time go by until something holds; seconds of the plan's clock that it took."""
    began_us = world.now_us
    for _ in range(limit):
        if holds():
            return (world.now_us - began_us) / S
        step(world)
    raise AssertionError(f"never: {failover(world)!r} {world.ranks[0].core.tiers.slot!r}")


def elapse(world: World, seconds: float) -> None:
    """So much time goes by."""
    end_us = world.now_us + int(seconds * S)
    while world.now_us < end_us:
        step(world, end_us)


def ask(world: World, count: int = 1, tokens: int = 24) -> None:
    """New prompts, each a look-up and, as it is computed, a write."""
    for _ in range(count):
        number = len(world.submitted)
        world.submit([number % 50 + 8, number // 50] + list(range(100, 100 + tokens)), max_new_tokens=1)


def trip(world: World) -> None:
    """Let the store that serves fail until the breaker opens."""
    slot = world.ranks[0].core.tiers.slot
    name = next(p.name for epoch, p in world.ranks[0].storage.items() if epoch == slot.gate())
    world.sick.add((name, None))
    trips = failover(world).breaker.trips
    for _ in range(200):
        if failover(world).breaker.trips > trips:
            return
        ask(world)
        step(world)
    raise AssertionError(f"{name} is sick, and nobody notices")


def finish(world: World) -> World:
    """Everything comes to rest, and every promise was kept."""
    world.settle()
    world.check()
    return world


def fail_three_times(world: World) -> None:
    """On all ranks in one tick, whatever else the store does."""
    for rank in world.ranks:
        for row in rank.core.tiers.evidence._watch.rows.values():
            row.failures = 3
    ask(world)


def stalled(world: World) -> None:
    """What opens does not come to an end on rank 1."""
    rank = world.ranks[1]
    rank.storage[rank.core.tiers.slot.last_epoch].state = "stalled"


def lose(world: World, rank: int = 0) -> None:
    """The storage process of one rank dies."""
    epoch = world.ranks[rank].core.tiers.slot.gate()
    process = world.ranks[rank].storage[epoch]
    process.tell("lost", "crashed: it has ended by itself")
    process.end()
    until(world, lambda: world.ranks[0].core.tiers.slot.gate() != epoch)


def status(world: World) -> wire.StatusAnswer:
    return world.ranks[0].core.status.answer("q", world.now_us)
