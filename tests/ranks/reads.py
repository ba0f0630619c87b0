"""What the tests of reads ask of a simulated server: a warm store, single ticks, where prompts came from."""

from __future__ import annotations

from sglang_hicache import wire
from tests.ranks.world import PlayedStorage, World, server_config

PROMPT = [5, 3, 1] * 9  # 27 tokens: 6 whole pages and a rest
ATTACH = {"backend": "memory", "extra_config_json": '{"prefetch_threshold": 4}'}


def world_with_storage(ranks: int = 2, policy: str = "wait_complete", store: dict | None = None, **sizes: int) -> World:
    """A quiet world whose storage is attached."""
    world = World(0, ranks, fault_rate=0.0, config=server_config(ranks, **sizes))
    if store is not None:
        world.store = store
    command = world.command(wire.AttachStorage, **ATTACH, prefetch_policy=policy)
    world.settle()
    assert world.answer(command).success
    return world


def warm_store(prompt: list[int] = PROMPT, ranks: int = 2) -> dict:
    """What a server leaves in storage after one request."""
    world = world_with_storage(ranks)
    world.submit(prompt)
    world.settle()
    assert world.store
    return world.store


def tick(world: World) -> None:
    """One tick on every rank, with what the ranks have told the leader so far."""
    for rank in world.ranks:
        world.deliver(rank)
    world.lead()
    for rank in world.ranks[1:]:
        while rank.inbox:
            world.follow(rank)


def process(world: World, rank: int) -> PlayedStorage:
    return next(p for p in world.ranks[rank].storage.values() if p.state == "open")


def cached(world: World, rid: str) -> wire.CachedTokens:
    return next(o.cached for o in world.ranks[0].outputs if o.rid == rid and o.finish is not None)
