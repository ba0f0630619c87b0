"""A leader that waits for others sleeps: no plans in a row in which nothing happens."""

from __future__ import annotations

from sglang_hicache import wire
from sglang_hicache.cache.backup_pace import MAX_ATTEMPTS
from sglang_hicache.storage.attachment_events import State
from tests.ranks.backups import ATTACH, computed, hold, let_go, lost, prompt, stored, ticks
from tests.ranks.world import World


def hold_what_opens(world: World) -> None:
    for rank in world.ranks:
        rank.storage[1].state = "held"


def plans_while_nothing_happens(world: World) -> int:
    before = len(world.plans)
    for _ in range(20):
        world.now_us += 1_000
        world.lead()
    return len(world.plans) - before


def world_that_uploads() -> World:
    """The store was attached to a warm server, and hangs with the first write of the upload."""
    world = World(0, 2, fault_rate=0.0)
    computed(world, prompt(1, 8))
    world.command(wire.AttachStorage, **ATTACH)
    ticks(world, 3)
    for rank in world.ranks:
        rank.storage[1].step()
    ticks(world, 2)
    hold(world)
    assert world.ranks[0].core.tiers.ops.counts() == {"upload": 1}
    return world


def test_while_a_flush_waits_for_an_upload_that_hangs() -> None:
    world = world_that_uploads()
    world.command(wire.FlushCache)
    ticks(world, 2)
    assert plans_while_nothing_happens(world) <= 1


def test_a_flush_ends_at_its_deadline_although_an_upload_hangs() -> None:
    world = world_that_uploads()
    flush = world.command(wire.FlushCache, deadline_s=3.0)
    ticks(world, 2)
    world.now_us = world.leader.wake_at_us(world.ranks[0].core)
    ticks(world, 2)
    answer = world.answer(flush)
    assert not answer.success and answer.message.endswith("#upload-ops=1")
    assert list(world.ranks[0].core.tiers.controller.tree.nodes()), "nothing was flushed"
    assert plans_while_nothing_happens(world) <= 1
    let_go(world)
    world.settle()
    world.check()


def test_an_upload_that_flushes_stopped_in_vain_goes_on() -> None:
    """The write was revoked, and nothing is wrong with the store: it costs none of the attempts."""
    world = world_that_uploads()
    for _ in range(MAX_ATTEMPTS):
        flush = world.command(wire.FlushCache, deadline_s=1.0)
        ticks(world, 2)
        world.now_us += 1_000_000
        ticks(world, 2)
        assert not world.answer(flush).success
        for rank in world.ranks:  # the revoke arrives, and the next write hangs like the one before it
            storage = rank.storage[1]
            storage.state = "open"
            storage.revoked.add(storage.queue[0].op_id)
            while storage.queue:
                storage.step()
            storage.state = "held"
        ticks(world, 1)
        world.now_us += 1_000_000
        ticks(world, 1)
        assert world.ranks[0].core.tiers.ops.counts() == {"upload": 1}
    let_go(world)
    world.settle()
    assert stored(world, prompt(1, 8)) == 8 and not lost(world)


def test_after_an_attach_that_was_too_slow_until_it_is_reaped() -> None:
    world = World(0, 2, fault_rate=0.0)
    attach = world.command(wire.AttachStorage, deadline_s=3.0, **ATTACH)
    ticks(world, 2)
    hold_what_opens(world)
    world.now_us += 4_000_000
    ticks(world, 2)
    assert world.ranks[0].core.tiers.slot.face() is State.FAILED
    assert plans_while_nothing_happens(world) <= 1
    world.settle()
    assert not world.answer(attach).success


def test_after_a_detach_that_was_too_slow_until_it_is_reaped() -> None:
    world = World(0, 2, fault_rate=0.0)
    world.command(wire.AttachStorage, **ATTACH)
    world.settle()
    hold(world)
    detach = world.command(wire.DetachStorage, deadline_s=3.0)
    ticks(world, 2)
    world.now_us += 4_000_000
    ticks(world, 2)
    assert world.ranks[0].core.tiers.slot.face() is State.FAILED
    assert plans_while_nothing_happens(world) <= 1
    world.settle()
    assert world.answer(detach).success


def test_while_new_weights_wait_for_a_write_that_hangs() -> None:
    world = World(0, 2, fault_rate=0.0)
    world.command(wire.AttachStorage, **ATTACH)
    world.settle()
    hold(world)
    world.submit(prompt(1, 3), max_new_tokens=1)
    ticks(world)
    update = world.command(wire.UpdateWeights, weights_digest="b")
    ticks(world, 2)
    for rank in world.ranks:
        rank.end_staging()
    world.submit(prompt(2, 3), max_new_tokens=1)
    ticks(world, 4)
    core = world.ranks[0].core
    assert core.update.is_holding and len(core.waiting) == 1
    assert plans_while_nothing_happens(world) <= 1
    let_go(world)
    world.settle()
    assert world.answer(update).success
    world.check()
