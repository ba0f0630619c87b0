"""Orders of events that traffic drawn at random rarely meets, each of which once went wrong."""

from __future__ import annotations

from sglang_hicache import wire
from sglang_hicache.cache.backup_pace import MAX_WRITES
from sglang_hicache.scheduler.request import PROBE_PREFIX
from sglang_hicache.storage.attachment_events import State
from tests.ranks.reads import PROMPT, process, tick, warm_store, world_with_storage
from tests.ranks.world import PAGE, World, server_config


def test_a_request_that_is_aborted_before_its_first_plan_never_runs() -> None:
    """A client leaves during a long tick: its request and its abort meet in one plan."""
    world = World(0, 2, fault_rate=0.0)
    rid = world.submit(PROMPT, max_new_tokens=50)
    world.leader.add_abort(rid)
    world.settle()
    world.check()
    assert world.texts()[rid] == []


def written_off() -> World:
    """Every storage process dies hard: it is killed with its writes under way, and does not go."""
    world = World(0, 2, fault_rate=0.0, config=server_config(2, device_pages=200, host_pages=200))
    world.command(wire.AttachStorage, backend="memory", extra_config_json='{"prefetch_threshold": 100}')
    world.settle()
    for rank in world.ranks:
        process(world, rank.number).state = "held"
    for i in range(2 * MAX_WRITES):
        world.submit([i] * (PAGE + 1), max_new_tokens=1)
        for _ in range(3):
            tick(world)
            for rank in world.ranks:
                while rank.copies:
                    rank.finish_copy()
    assert world.ranks[0].core.tiers.ops.counts()["write"] == MAX_WRITES
    for rank in world.ranks:
        held = rank.storage[rank.core.tiers.slot.epoch]
        held.state = "unkillable in spe"
        held.tell("lost", "the test says so")
    tick(world)
    tick(world)
    for rank in world.ranks:
        held = rank.storage[rank.core.tiers.slot.epoch]
        held.state = "stuck"
        held.tell("reap_timeout", "uninterruptible")
    for _ in range(4):
        tick(world)
    assert world.ranks[0].core.tiers.quarantine.pages == MAX_WRITES
    return world


def reaped(world: World) -> None:
    for rank in world.ranks:
        for held in rank.storage.values():
            if held.state == "stuck":
                held.end()


def test_writes_in_quarantine_take_no_place_from_those_of_the_next_attachment() -> None:
    world = written_off()
    world.command(wire.AttachStorage, backend="memory")
    world.settle()
    world.submit(PROMPT, max_new_tokens=1)
    world.settle()
    assert world.store, "nothing is backed up any more"
    assert not world.ranks[0].core.commands.blockers()
    reaped(world)
    world.settle()
    world.check()


def test_a_flush_leaves_the_pages_in_quarantine_where_they_are() -> None:
    """A written-off process may still read what it was to write: those pages are not free, all others are."""
    world = written_off()
    flush = world.command(wire.FlushCache)
    world.settle()
    assert world.answer(flush).success
    for rank in world.ranks:
        rank.core.check()
        assert rank.core.tiers.controller.host.used_count == MAX_WRITES
    reaped(world)
    world.settle()
    world.check()
    assert not world.ranks[0].core.tiers.controller.host.used_count


def test_what_a_retracted_request_computes_again_is_shared_again() -> None:
    """Retracted, its pages evicted, computed anew and retracted again: the second time is cached, too."""
    world = World(0, 1, fault_rate=0.0, config=server_config(1, device_pages=40, host_pages=2))
    core = world.ranks[0].core
    rid = world.submit(list(range(100, 140)), max_new_tokens=30)
    for _ in range(4):
        tick(world)
    request = core._requests[rid]
    core.admission.retract(request, core.tick)
    while core.tiers.ops.counts():
        while world.ranks[0].copies:
            world.ranks[0].finish_copy()
        tick(world) if core.tiers.ops.counts() else None
        if request in core.admission.running:
            core.admission.retract(request, core.tick)
    tree, device = core.tiers.controller.tree, core.tiers.controller.device
    while (victim := tree.device_victim()) is not None:
        core.tiers.controller._evict_from_device(victim)
    assert device.free_count == device.total
    tick(world)
    computed = request.computed // PAGE
    assert computed
    core.admission.retract(request, core.tick)
    assert tree.device_tokens == computed * PAGE


def test_a_probe_runs_while_all_requests_wait_for_storage() -> None:
    world = world_with_storage(store=warm_store())
    for rank in world.ranks:
        process(world, rank.number).state = "held"
    world.submit(PROMPT)
    tick(world)
    assert not world.ranks[0].core.admission.running
    probe = PROBE_PREFIX + "1"
    sampling = wire.SamplingParams(max_new_tokens=1, temperature=0.0)
    world.leader.add_request(wire.NewRequest(rid=probe, token_ids=[1], sampling=sampling))
    tick(world)
    assert [o.rid for o in world.ranks[0].outputs] == [probe]


def test_a_slow_lane_that_gets_on_is_not_lost() -> None:
    """Sixteen writes wait in one lane that ends one every second: the last waits longer than the time for one op."""
    world = World(0, 2, fault_rate=0.0, config=server_config(2, device_pages=200, host_pages=200))
    world.command(wire.AttachStorage, backend="memory", extra_config_json='{"prefetch_threshold": 100}')
    world.settle()
    for rank in world.ranks:
        process(world, rank.number).state = "held"
    for i in range(MAX_WRITES):
        world.submit([i] * (PAGE + 1), max_new_tokens=1)
    for _ in range(4 * MAX_WRITES):
        tick(world)
        for rank in world.ranks:
            while rank.copies:
                rank.finish_copy()
    slot = world.ranks[0].core.tiers.slot
    for _ in range(MAX_WRITES):
        world.now_us += 1_000_000
        for rank in world.ranks:
            held = rank.storage[1]
            held.state = "open"
            held.step()
            held.step()
            held.state = "held"
        tick(world)
        assert slot.gate() == 1, slot.last_error
    world.settle()
    world.check()


def test_a_lane_that_stands_still_is_lost_in_time() -> None:
    world = world_with_storage(store=warm_store())
    for rank in world.ranks:
        process(world, rank.number).state = "held"
    world.submit(PROMPT)
    tick(world)
    slot = world.ranks[0].core.tiers.slot
    world.now_us += 4_900_000
    tick(world)
    assert slot.gate() == 1
    world.now_us += 200_000
    tick(world)
    assert slot.gate() is None
    assert slot.last_error


def test_a_deadline_that_has_passed_does_not_keep_the_leader_awake() -> None:
    """After the kill there is nothing to do but to wait for the reap: no plans in a row until it comes."""
    world = world_with_storage(store=warm_store())
    for rank in world.ranks:
        process(world, rank.number).state = "held"
    world.submit(PROMPT, max_new_tokens=1)
    tick(world)
    world.now_us += 6_000_000
    for _ in range(4):
        tick(world)
    assert world.ranks[0].core.tiers.slot.gate() is None
    before = len(world.plans)
    for _ in range(10):
        world.now_us += 1_000
        world.lead()
    assert len(world.plans) == before


def test_a_store_that_is_lost_and_reaped_at_once_is_detached_without_further_news() -> None:
    """A single rank hears of the death and of the reap together, and nothing else happens after that."""
    world = World(0, 1, fault_rate=0.0)
    world.command(wire.AttachStorage, backend="memory")
    world.settle()
    held = process(world, 0)
    held.tell("lost", "the test says so")
    held.end()
    tick(world)
    while world.lead():
        pass
    assert world.ranks[0].core.tiers.slot.face() is State.DETACHED
