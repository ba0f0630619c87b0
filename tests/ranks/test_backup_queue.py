"""Backups that had to wait leave promptly once they may: bounded by round trips, not by a timer."""

from __future__ import annotations

from sglang_hicache import wire
from sglang_hicache.cache.backup_pace import MAX_WRITES
from tests.ranks.world import PAGE, World, server_config

NODES = 1000


def test_a_thousand_queued_backups_drain_in_as_few_ticks_as_their_batches() -> None:
    world = World(0, 2, fault_rate=0.0, check_each_tick=False, config=server_config(2, 4 * NODES, 4 * NODES))
    world.command(wire.AttachStorage, backend="memory", extra_config_json='{"prefetch_threshold": 100}')
    world.settle()
    for rank in world.ranks:  # storage holds its breath
        rank.storage[1].state = "held"
    for i in range(NODES):
        world.submit([1000 + i] * (PAGE + 1), max_new_tokens=1)
    tiers = world.ranks[0].core.tiers
    while len(tiers.backup) + tiers.ops.counts().get("write", 0) < NODES:
        for rank in world.ranks:
            while rank.copies:
                rank.finish_copy()
            world.deliver(rank)
        world.lead()
        for rank in world.ranks[1:]:
            while rank.inbox:
                world.follow(rank)
        world.now_us += 100
    for rank in world.ranks:
        rank.storage[1].state = "open"
    ticks = len(world.plans)
    while tiers.backup or tiers.ops.counts():
        for rank in world.ranks:
            while rank.inbox:
                world.follow(rank)
            while rank.storage[1].queue:
                rank.storage[1].step()
            world.deliver(rank)
        world.lead()
    assert len({key for rank, key in world.store if rank == 0}) == NODES
    assert len(world.plans) - ticks <= NODES // MAX_WRITES + 3
