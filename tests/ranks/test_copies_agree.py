"""Copies between device and host end at different times on different ranks; what follows from them does not."""

from __future__ import annotations

from sglang_hicache import wire
from sglang_hicache.cache.op import OpKind
from sglang_hicache.workers.batch import ForwardBatch
from tests.ranks.reads import tick, world_with_storage
from tests.ranks.world import SimRank, World, server_config

PROMPT = [5, 3, 1] * 9


def host_pages(rank: SimRank) -> tuple[int, list[list[int] | None]]:
    """Free host pages, and what the tree holds on the host."""
    controller = rank.core.tiers.controller
    return controller.host.free_count, [node.host_pages for node in controller.tree.nodes()]


def test_fm02_a_rank_without_copies_in_flight_waits_for_nobody_and_decides_nothing() -> None:
    """Rank 0 is done with its copies long before rank 1: they count in the tick that says so to both."""
    world = World(0, 2, fault_rate=0.0, config=server_config(2))
    rid = world.submit(PROMPT)
    for _ in range(30):
        while world.ranks[0].copies:
            world.ranks[0].finish_copy()
        tick(world)
    assert world.ranks[1].copies, "rank 1 must be late"
    assert not world.ranks[0].copies
    assert any(o.rid == rid and o.finish for o in world.ranks[0].outputs), "requests go on meanwhile"
    for rank in world.ranks:
        assert len(rank.core.tiers.ops), "a copy that one rank has not finished has not ended"
    assert host_pages(world.ranks[0]) == host_pages(world.ranks[1])
    world.settle()
    world.check()
    assert host_pages(world.ranks[0]) == host_pages(world.ranks[1])


def test_fm04_every_rank_loads_back_and_computes_the_same_span() -> None:
    """A device pool too small for all, copies that end in any order: equal batches in every tick."""
    batches: list[list[ForwardBatch]] = [[], []]
    world = world_with_storage(device_pages=20, host_pages=60)
    for rank, seen in zip(world.ranks, batches, strict=True):
        forward = rank.worker.forward

        def recording(batch: ForwardBatch, whole: dict, forward=forward, seen=seen) -> list[int]:
            seen.append(batch)
            return forward(batch, whole)

        rank.worker.forward = recording
    for round_ in range(12):
        world.submit([round_ % 4] * 30)
        for _ in range(60):
            world.happen()
    world.settle()
    world.check()
    counters = [rank.core.tiers.controller.counters for rank in world.ranks]
    assert counters[0]["load_back"], "nothing was loaded back"
    assert counters[0]["evicted"], "memory was never short"
    assert counters[0] == counters[1]
    assert batches[0] == batches[1]


def test_fm04_the_shortest_answer_of_all_ranks_counts() -> None:
    """One rank's store holds less: the computed span is that rank's, on both."""
    world = world_with_storage()
    world.submit(PROMPT)
    world.settle()
    for key in [key for key in world.store if key[0] == 1][3:]:
        del world.store[key]
    world.command(wire.FlushCache)
    world.settle()
    rid = world.submit(PROMPT)
    world.settle()
    world.check()
    ends = [o.cached for rank in world.ranks for o in rank.outputs if o.rid == rid and o.finish]
    assert len(ends) == 2
    assert ends[0] == ends[1]
    assert 0 < ends[0].storage < len(PROMPT) - 4


def test_a_page_reaches_storage_only_after_its_copy_has_filled_it() -> None:
    """write_back: a node is demoted, its copy is slow, and the next request loads it back and offers it for backup.

    1. the demotion gives the node host pages at once, and the copy is queued
    2. the prompt comes again: a load-back, queued behind the copy, may use them
    3. the request's nodes are offered to storage while rank 1's copy has still not filled the pages
    The played process refuses to write such a page; a real one would seal other bytes with a good checksum.
    """
    world = World(0, 2, fault_rate=0.0, config=server_config(2, device_pages=9, write_policy="write_back"))
    world.command(wire.AttachStorage, backend="memory")
    world.settle()
    world.submit(PROMPT)
    world.settle()
    for prompt in ([9] * 30, PROMPT):
        world.submit(prompt, max_new_tokens=1)
        for _ in range(30):
            tick(world)
            for rank in world.ranks:
                for process in rank.storage.values():
                    process.step()
    assert world.ranks[0].core.tiers.controller.counters["load_back"]
    assert not any(op.kind is OpKind.WRITE for op in world.ranks[0].core.tiers.ops)
    world.settle()
    world.check()
    assert world.store, "backed up once the copies had ended"
