"""Rows of docs/failure-modes.md that a scheduler core can show: one test each, named by the row's number."""

from __future__ import annotations

import pytest

from sglang_hicache import wire
from sglang_hicache.cache.page import page_keys
from sglang_hicache.cache.prefetch import PrefetchPhase
from tests.ranks.reads import ATTACH, PROMPT, cached, process, tick, warm_store, world_with_storage
from tests.ranks.world import PAGE, World, server_config


def test_fm01_a_rank_that_is_late_with_everything_hangs_nobody() -> None:
    """Rank 1 finishes no copy while ten requests come and go: every rank takes the same ticks all the same."""
    world = World(3, 2, fault_rate=0.0, config=server_config(2, device_pages=100))
    for i in range(10):
        world.submit([i] * 20)
    for _ in range(200):
        world.ranks[0].copies and world.ranks[0].finish_copy()
        tick(world)
    assert world.ranks[1].copies, "nothing was ever late"
    assert sum(o.finish is not None for o in world.ranks[0].outputs) == 10
    world.settle()
    world.check()


def test_fm03_fm39b_only_pages_whole_on_every_rank_are_published() -> None:
    """Rank 1 reads 3 of 6 pages: both ranks put exactly 3 into the tree."""
    world = world_with_storage(store=warm_store())
    for key in page_keys(PROMPT, PAGE)[3:6]:
        del world.store[1, key]
    rid = world.submit(PROMPT)
    # Rank 1's look-up still says 6: the pages vanish between look-up and read.
    late = process(world, 1)
    work = late.work
    late.work = lambda message: (
        late.fact(message.op_id, 6, True) if isinstance(message, wire.LookupPages) else work(message)
    )
    world.settle()
    world.check()
    assert cached(world, rid).storage == 3 * PAGE


@pytest.mark.parametrize("bad", [0, 1])
def test_fm07_fm58_attach_that_fails_on_one_rank_leaves_all_detached(bad: int) -> None:
    world = World(0, 2, fault_rate=0.0)
    command = world.command(wire.AttachStorage, **ATTACH)
    tick(world)
    world.ranks[bad].storage[1].fault_rate = 1.0  # its process cannot open the backend
    world.ranks[bad].storage[1].step()
    world.settle()
    world.check()
    for rank in world.ranks:
        assert rank.core.tiers.slot.gate() is None
        assert "no such host" in rank.core.tiers.slot.last_error
    assert not world.answer(command).success and f"rank {bad}: no such host" in world.answer(command).message
    rid = world.submit(PROMPT)
    world.settle()
    assert world.texts()[rid], "the server must go on serving"


def test_fm16_a_read_that_fails_on_one_rank_costs_a_recompute_and_nothing_else() -> None:
    world = world_with_storage(store=warm_store())
    rid = world.submit(PROMPT)
    broken = process(world, 1)
    broken.move = lambda message: broken.fact(message.op_id, 0, True)
    world.settle()
    world.check()
    assert cached(world, rid).storage == 0 and len(world.texts()[rid]) == 6


def test_fm17_an_anchor_evicted_during_its_prefetch_leaks_no_host_page() -> None:
    """1. The prompt's first two pages are on the device. 2. Its tail is being read. 3. The anchor is evicted."""
    store = warm_store()
    world = world_with_storage(store=store, device_pages=10)
    world.submit(PROMPT[: 2 * PAGE + 1], max_new_tokens=1)
    world.settle()
    rid = world.submit(PROMPT)
    tick(world)
    controllers = [rank.core.tiers.controller for rank in world.ranks]
    for controller in controllers:
        tree = controller.tree
        for node in [n for n in tree.nodes() if n.host_pages is not None and not n.host_locks]:
            if node.device_pages is not None:
                controller.device.free(tree.drop_device(node))
            controller.host.free(tree.clear_host(node))
        assert not list(tree.nodes()), "the anchor is gone"
        controller.ops._digest.value = 0  # done behind the core's back, on all ranks alike
    world.settle()
    for rank in world.ranks:
        rank.core.check()
    assert world.texts()[rid]
    assert world.ranks[0].core.tiers.prefetcher.counters["anchor_lost"] == 4 * PAGE


def test_fm19_an_abort_during_the_prefetch_gives_everything_back() -> None:
    world = world_with_storage(store=warm_store())
    rid = world.submit(PROMPT)
    for _ in range(4):
        tick(world)
        world.ranks[0].storage[1].step()
        world.ranks[1].storage[1].step()
    prefetcher = world.ranks[0].core.tiers.prefetcher
    assert prefetcher.is_waiting(rid) and prefetcher.occupied_pages
    world.leader.add_abort(rid)
    world.settle()
    world.check()
    assert not prefetcher.occupied_pages and not prefetcher._by_rid


def test_fm23_pages_of_a_timed_out_prefetch_are_reused_only_after_the_writer_let_go() -> None:
    world = world_with_storage(store=warm_store(), policy="timeout")
    hung = [process(world, rank) for rank in (0, 1)]
    rid = world.submit(PROMPT)
    for _ in range(3):
        tick(world)
        for p in hung:
            p.step()
    core = world.ranks[0].core
    (read,) = [op for op in core.tiers.ops if op.kind.name == "READ"]
    pages = list(read.host_pages)
    world.now_us += 3_000_000  # the budget of the policy is over; the processes do not move
    for _ in range(12):
        tick(world)
        world.now_us += 1000
    assert world.texts()[rid], "the request goes on without the prefetch"
    assert core.tiers.ops.get(read.id) is not None
    held = set(core.tiers.controller.host.used_pages())
    in_tree = {page for node in core.tiers.controller.tree.nodes() for page in node.host_pages or ()}
    assert set(pages) <= held and not set(read.host_pages) & in_tree
    core.check()
    world.settle()
    world.check()


def test_fm24_after_a_detach_no_lock_is_held_and_the_whole_tree_can_go() -> None:
    world = world_with_storage()
    for i in range(6):
        world.submit([i] * 20)
    world.settle()
    command = world.command(wire.DetachStorage)
    world.settle()
    assert world.answer(command).success
    for rank in world.ranks:
        controller = rank.core.tiers.controller
        assert controller.tree.device_tokens_evictable == controller.tree.device_tokens > 0
        assert controller.allocate_device(controller.device.total) is not None


def test_fm29_keys_written_after_a_late_attach_cover_the_whole_prefix() -> None:
    """Nodes older than the attach, then an attach, then their continuation: every key is that of its full prefix."""
    world = World(0, 2, fault_rate=0.0)
    world.submit(PROMPT[: 3 * PAGE + 1], max_new_tokens=1)
    world.settle()
    world.command(wire.AttachStorage, **ATTACH)
    world.settle()
    world.submit(PROMPT)
    world.settle()
    world.check()
    wanted = page_keys(PROMPT, PAGE)[:6]
    assert [key for rank, key in world.store if rank == 0][:6] == wanted
    for rank, key in world.store:
        _, *tokens = world.store[rank, key]
        assert page_keys(tokens, PAGE)[-1] == key


def test_fm37_two_requests_for_the_same_prefix_during_its_load_back() -> None:
    world = World(0, 2, fault_rate=0.0, config=server_config(2, device_pages=12))
    world.submit(PROMPT)
    world.settle()
    for i in range(1, 4):
        world.submit([40 + i] * 36, max_new_tokens=1)  # push the first prompt off the device
        world.settle()
    first, second = world.submit(PROMPT), world.submit(PROMPT)
    tick(world)
    assert world.ranks[0].core.tiers.ops.counts().get("load_back") == 1
    world.settle()
    world.check()
    assert cached(world, first).host and cached(world, second).device


def test_fm42_a_fresh_server_with_a_warm_store_hits_with_its_first_request() -> None:
    world = world_with_storage(store=warm_store())
    rid = world.submit(PROMPT)
    world.settle()
    world.check()
    assert cached(world, rid) == wire.CachedTokens(storage=6 * PAGE, storage_backend="MemoryBackend")


def test_fm44_a_hit_below_the_threshold_runs_in_the_next_tick() -> None:
    store = warm_store()
    for key in page_keys(PROMPT, PAGE)[1:]:
        for rank in (0, 1):
            store.pop((rank, key), None)
    world = World(0, 2, fault_rate=0.0)
    world.store = store
    config = '{"prefetch_threshold": 12}'
    world.command(wire.AttachStorage, backend="memory", extra_config_json=config, prefetch_policy="wait_complete")
    world.settle()
    world.submit(PROMPT)
    tick(world)
    assert not world.ranks[0].core.admission.running
    for rank in world.ranks:
        rank.storage[1].step()
    tick(world)
    assert world.ranks[0].core.admission.running, "one page is below the threshold: nothing to wait for"


def test_fm45_the_timeout_policy_lets_the_request_go_at_its_deadline() -> None:
    """Budget of 6 pages of 4 tokens: 1 s + 6 * 4/1024 * 0.25 s, from the first time the request was held back."""
    world = world_with_storage(store=warm_store(), policy="timeout")
    world.submit(PROMPT)
    blocked_us = world.now_us
    for _ in range(2):  # look-up, then the read that never moves
        tick(world)
        for rank in (0, 1):
            process(world, rank).step() if not world.ranks[0].core.tiers.ops.counts().get("read") else None
    core = world.ranks[0].core
    budget_us = int((1.0 + 6 * PAGE / 1024 * 0.25) * 1e6)
    assert core.next_deadline_us() == blocked_us + budget_us
    world.now_us = blocked_us + budget_us - 1
    tick(world)
    assert not core.admission.running
    world.now_us = blocked_us + budget_us
    tick(world)
    assert core.tiers.prefetcher._by_rid["r0"].phase is PrefetchPhase.STOPPING
    tick(world)
    assert core.admission.running, "one tick after the deadline it runs"
    assert any(f"{6 * PAGE} tokens were not waited for" in reason for reason in core.status.answer("q").why)


def test_fm47_a_miss_takes_no_host_memory_and_counts_as_no_prefetch() -> None:
    world = world_with_storage()
    free = world.ranks[0].core.tiers.controller.host.free_count
    rid = world.submit(PROMPT)
    tick(world)
    core = world.ranks[0].core
    assert core.tiers.ops.counts() == {"lookup": 1} and core.tiers.controller.host.free_count == free
    world.settle()
    assert cached(world, rid).storage == 0
    assert core.tiers.prefetcher.counters["hit"] == 0 and not core.tiers.prefetcher.occupied_pages


def _make_running(world: World) -> None:
    world.submit([1, 2, 3], max_new_tokens=50)  # too short to be looked up
    tick(world)


def _make_waiting(world: World) -> None:
    world.submit(PROMPT)
    tick(world)  # held back by its look-up


def _make_copy(world: World) -> None:
    world.submit(PROMPT, max_new_tokens=1)
    for _ in range(3):
        for rank in (0, 1):
            process(world, rank).step()
        tick(world)


def _make_write(world: World) -> None:
    _make_copy(world)
    for _ in range(2):
        for rank in world.ranks:
            while rank.copies:
                rank.finish_copy()
        tick(world)


BLOCKERS = {
    "running-req": _make_running,
    "queue-req": _make_waiting,
    "lookup-ops": _make_waiting,
    "write_through-ops": _make_copy,
    "write-ops": _make_write,
}


@pytest.mark.parametrize("name", BLOCKERS)
@pytest.mark.parametrize("command", [wire.DetachStorage, wire.AttachStorage])
def test_fm54_the_refusal_names_every_blocker_with_its_number(name: str, command: type) -> None:
    world = world_with_storage()
    BLOCKERS[name](world)
    found = world.ranks[0].core.commands.blockers()
    assert found.get(name), f"the scenario made {found}"
    asked = world.command(command, **(ATTACH if command is wire.AttachStorage else {}))
    tick(world)
    for rank in world.ranks:
        (answer,) = [a for a in rank.answers if a.id == asked]
        assert not answer.success and "not idle" in answer.message
        assert "#queue-req=" in answer.message and "#running-req=" in answer.message
        for blocker, count in found.items():
            assert f"#{blocker}={count}" in answer.message
    world.settle()
    world.check()
