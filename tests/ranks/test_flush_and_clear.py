"""A flush that clears the storage too: one command with two halves, and an answer for each way they can end."""

from __future__ import annotations

import pytest

from sglang_hicache import wire
from tests.ranks.reads import PROMPT, cached, process, tick, world_with_storage
from tests.ranks.world import World

HALF = "L1 and L2 were flushed, but the storage was not cleared: "


@pytest.fixture
def world() -> World:
    """Storage is attached, and a prompt is on every tier."""
    world = world_with_storage()
    world.submit(PROMPT)
    world.settle()
    assert world.store
    return world


def hits(world: World) -> tuple[int, int, int]:
    rid = world.submit(PROMPT)
    world.settle()
    found = cached(world, rid)
    return found.device, found.host, found.storage


def answers(world: World, command: str) -> list[wire.CommandAnswer]:
    """Of all ranks, in rank order."""
    return [answer for rank in world.ranks for answer in rank.answers if answer.id == command]


def test_by_default_the_storage_keeps_its_pages(world: World) -> None:
    command = world.command(wire.FlushCache)
    world.settle()
    assert world.answer(command).success
    assert hits(world) == (0, 0, 24)
    world.check()


def test_all_three_tiers_are_empty_and_fill_again(world: World) -> None:
    command = world.command(wire.FlushCache, keep_storage=False)
    world.settle()
    assert [answer.success for answer in answers(world, command)] == [True, True]
    assert not world.store
    assert hits(world) == (0, 0, 0)
    assert world.store, "what is computed is stored again"
    world.check()


def test_without_storage_half_of_it_was_done() -> None:
    world = World(0, 2, fault_rate=0.0)
    world.submit(PROMPT)
    world.settle()
    command = world.command(wire.FlushCache, keep_storage=False)
    world.settle()
    for answer in answers(world, command):
        assert not answer.success and answer.message.startswith(HALF) and "No HiCache storage" in answer.message
    assert hits(world) == (0, 0, 0)
    world.check()


def test_a_rank_whose_store_cannot_clear_says_which_half_failed(world: World) -> None:
    command = world.command(wire.FlushCache, keep_storage=False)
    store = process(world, 1)

    def fail(message: wire.ClearPages) -> None:
        store.queue.popleft()
        world.ranks[1].clear_facts.append(wire.ClearFact(message.command_id, "busy"))

    store.work = fail
    world.settle()
    first, second = answers(world, command)
    assert first.success and not second.success
    assert second.message == f"{HALF}rank 1: busy"
    world.check()


def test_a_store_that_never_clears_is_told_at_the_deadline(world: World) -> None:
    stores = [process(world, rank) for rank in (0, 1)]
    for store in stores:
        store.state = "held"
    command = world.command(wire.FlushCache, keep_storage=False, deadline_s=1.0)
    tick(world)
    assert not answers(world, command)
    world.now_us += 1_000_001
    tick(world)
    assert [answer.message for answer in answers(world, command)] == [
        f"{HALF}rank {rank}: not cleared in time" for rank in (0, 1)
    ]
    for store in stores:
        store.state = "open"
    world.settle()
    world.check()


def test_a_server_that_is_busy_clears_nothing(world: World) -> None:
    world.submit([9] * 20, max_new_tokens=50)
    tick(world)
    command = world.command(wire.FlushCache, keep_storage=False)
    tick(world)
    assert "not idle" in world.answer(command).message
    world.settle()
    assert world.store
    world.check()
