"""Pools that are smaller than anybody would choose, prompts that just fit them, and stores of every sort below.

Whatever the sizes: every request ends within a bounded number of ticks, a prompt that was served is served again once
the load is gone, nothing is left behind, and each text is that of a server without a cache.
"""

from __future__ import annotations

import pytest

from sglang_hicache import wire
from sglang_hicache.config import PREFETCH_POLICIES, WRITE_POLICIES
from tests.ranks.world import PAGE, PlayedStorage, World, server_config

#: Device and host pages.
SIZES = ((1, 1), (2, 1), (3, 2), (9, 4), (7, 40), (30, 6))
STORES = ("none", "works", "warm", "fails", "full", "hangs")
#: Ticks beyond one for every token: what waiting for a hung store, for copies and for retries takes.
SPARE_TICKS = 50

ATTACH = {"backend": "memory", "extra_config_json": '{"prefetch_threshold": 4, "prefetch_timeout_base": 0.02}'}


def prompts(device_pages: int) -> list[list[int]]:
    """Shorter than a page, whole pages, one more and one less, all of the pool; with shared beginnings."""
    longest = device_pages * PAGE - 1
    lengths = (1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, longest // 2, longest - PAGE, longest - 1, longest)
    return [
        [10 * family + i % 7 for i in range(length)]
        for family in (1, 2) for length in sorted({min(max(length, 1), longest) for length in lengths})
    ]


def world_with(store: str, device_pages: int, host_pages: int, write: str, prefetch: str) -> World:
    config = server_config(1, device_pages, host_pages, write_policy=write, load_back_threshold=PAGE)
    world = World(device_pages, 1, fault_rate=0.0, config=config)
    if store == "none":
        return world
    if store == "warm":  # by a server that had room for everything
        roomy = World(0, 1, fault_rate=0.0, config=server_config(1, 200, 200))
        roomy.command(wire.AttachStorage, **ATTACH)
        for tokens in prompts(device_pages):
            roomy.settle()
            roomy.submit(tokens)
        roomy.settle()
        world.store = roomy.store
    world.command(wire.AttachStorage, **ATTACH, prefetch_policy=prefetch)
    world.settle()
    (process,) = world.ranks[0].storage.values()
    spoil(process, store)
    return world


def spoil(process: PlayedStorage, store: str) -> None:
    """The store takes nothing, or gives nothing, or does nothing at all, from now on."""
    if store in ("fails", "full"):
        process.refuses = lambda message, at: "io" if store == "fails" else "no_space"
    if store == "hangs":
        process.state = "held"


def serve(world: World, several: list[list[int]], new_tokens: int) -> None:
    """All at once; every one of them is served, in time."""
    before = len(world.plans)
    rids = [world.submit(tokens, max_new_tokens=new_tokens) for tokens in several]
    world.settle()
    world.check()
    ends = {output.rid: output.finish.type for output in world.ranks[0].outputs if output.finish is not None}
    assert {ends[rid] for rid in rids} <= {"length", "stop"}, "a request that fits was refused"
    tokens = sum(len(tokens) + new_tokens for tokens in several)
    ticks = len(world.plans) - before
    assert ticks <= SPARE_TICKS + tokens, f"{ticks} ticks for {tokens} tokens"


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("write", WRITE_POLICIES)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{sizes[0]}-{sizes[1]}")
def test_everybody_is_served_and_nothing_is_left(sizes: tuple[int, int], write: str, store: str) -> None:
    for prefetch in PREFETCH_POLICIES if store != "none" else PREFETCH_POLICIES[:1]:
        world = world_with(store, *sizes, write, prefetch)
        everything = prompts(sizes[0])
        serve(world, everything, new_tokens=6)
        for tokens in everything[-2:]:  # alone, after the load
            serve(world, [tokens], new_tokens=1)


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{sizes[0]}-{sizes[1]}")
def test_a_prompt_that_no_pool_can_hold_is_refused_at_once_and_harms_nobody(sizes: tuple[int, int]) -> None:
    world = world_with("works", *sizes, "write_through", "wait_complete")
    too_long = world.submit([5] * sizes[0] * PAGE)
    fits = world.submit([5] * (sizes[0] * PAGE - 1))
    world.settle()
    world.check()
    ends = {output.rid: output.finish for output in world.ranks[0].outputs if output.finish is not None}
    assert (ends[too_long].type, ends[too_long].status_code) == ("abort", 400)
    assert f"between 1 and {sizes[0] * PAGE - 1} are allowed" in ends[too_long].message
    assert ends[fits].type != "abort"


@pytest.mark.parametrize("host_pages", [1, 2, 3, 6])
def test_a_prefix_longer_than_the_host_pool_is_fetched_as_far_as_there_is_room(host_pages: int) -> None:
    """The store has nine pages of the prompt; a prefetch may claim half of the host, and is not given up for it."""
    world = world_with("warm", 12, host_pages, "write_through", "wait_complete")
    longest = prompts(12)[-1]
    rid = world.submit(longest, max_new_tokens=1)
    world.settle()
    world.check()
    cached = next(output.cached for output in world.ranks[0].outputs if output.rid == rid)
    assert cached.storage == PAGE * (host_pages // 2)
