"""Stores that fail now and then, for long, or for want of room: what is written in the end, after how many tries."""

from __future__ import annotations

import random

import pytest

from sglang_hicache import wire
from sglang_hicache.cache.backup_pace import LONGEST_DELAY_US, MAX_ATTEMPTS, MAX_WRITES
from sglang_hicache.cache.page import encode_tokens, page_keys
from tests.ranks.backups import (
    ATTACH,
    attach,
    books,
    computed,
    hold,
    is_prefix_closed,
    let_go,
    lost,
    prompt,
    refuse_writes,
    stored,
    ticks,
    world_with_storage,
)
from tests.ranks.reads import cached
from tests.ranks.reads import world_with_storage as reader
from tests.ranks.world import PAGE, World, server_config


def test_fm50_of_writes_that_fail_at_random_nearly_all_are_stored_and_each_failure_is_counted() -> None:
    """One page in ten fails, on each rank for itself.  Elsewhere one failure lost the rest of a batch, unseen."""
    world = world_with_storage(device_pages=1000, host_pages=1000)
    world.check_each_tick = False
    chance = random.Random(5)
    refuse_writes(world, lambda *_: "io" if chance.random() < 0.1 else "")
    prompts = [prompt(i, 8) for i in range(100)]
    for tokens in prompts:
        world.submit(tokens, max_new_tokens=1)
    world.settle()
    world.check()
    durable = sum(stored(world, tokens) for tokens in prompts)
    assert durable >= 0.99 * 800
    assert books(world).counters["backuped"] == durable * PAGE
    assert sum(lost(world).values()) == (800 - durable) * PAGE


def test_fm50_the_failed_pages_in_the_counter_are_those_that_failed() -> None:
    world = world_with_storage(ranks=1)
    chance, failed = random.Random(1), 0

    def refuse(_rank: int, message: wire.WritePages, at: int) -> str:
        nonlocal failed
        if chance.random() >= 0.1:
            return ""
        failed += len(message.keys) - at
        return "io"

    refuse_writes(world, refuse)
    computed(world, *(prompt(i, 8) for i in range(20)))
    assert failed and books(world).counters["failed"] == failed * PAGE


@pytest.mark.parametrize("seed", range(4))
def test_fm40_fm41_what_is_stored_is_prefix_closed_and_the_rest_is_counted(seed: int) -> None:
    """A small host, a store that fails often and sometimes stands still: no page lies behind a hole, and every page
    that was given up before it was safe is in the books."""
    world = World(seed, 2, fault_rate=0.0, config=server_config(2, 40, 24))
    attach(world)
    chance = random.Random(seed)
    refuse_writes(world, lambda *_: chance.choice(("io", "no_space")) if chance.random() < 0.2 else "")
    for i in range(60):
        world.submit(world.some_tokens(), max_new_tokens=4)
        if i % 10 == 5:
            hold(world)
        ticks(world, chance.randrange(12))
        let_go(world)
        for _ in range(chance.randrange(40)):
            world.happen()
    world.settle()
    world.check()
    assert world.store and is_prefix_closed(world)
    counters = books(world).counters
    assert lost(world), "this world was to be hard"
    assert counters["offered"] == counters["backuped"] + sum(lost(world).values()) - counters["recovered"]


def test_a_failure_costs_only_the_pages_behind_it() -> None:
    world = world_with_storage()
    failures = {0: 1, 1: 2}  # rank 1 fails twice at the page at which rank 0 fails once

    def refuse(rank: int, message: wire.WritePages, at: int) -> str:
        if message.depth + at != 4 or not failures[rank]:
            return ""
        failures[rank] -= 1
        return "io"

    refuse_writes(world, refuse)
    computed(world, prompt(1, 6))
    assert stored(world, prompt(1, 6)) == 6 and not lost(world)
    assert books(world).counters["failed"] == 2 * 2 * PAGE


@pytest.mark.parametrize("reason", ["io", "no_space"])
@pytest.mark.parametrize(
    ("command", "loss"), [(wire.DetachStorage, "detached"), (wire.FlushCache, "flushed"), (wire.AttachStorage, "")]
)
def test_a_store_that_refuses_can_be_detached_although_requests_keep_coming(
    reason: str, command: type, loss: str
) -> None:
    """1. Every write fails. 2. What waits for another attempt is an obligation. 3. The next request brings more of it
    before the last one is given up, so that the sick store can never be detached."""
    world = world_with_storage()
    refuse_writes(world, lambda *_: reason)
    for i in range(8):
        world.submit(prompt(i, 2), max_new_tokens=1)
    for _ in range(20):
        ticks(world, 2)
        for rank in world.ranks:
            rank.storage[1].step()
    commands = world.ranks[0].core.commands
    assert commands.blockers() == {"queued-backups": len(world.ranks[0].core.tiers.backup)}
    patient = world.command(wire.FlushCache, timeout_s=0.05) if command is wire.FlushCache else ""
    if patient:
        ticks(world, 2)
        assert commands.blockers(), "who has time waits for the store to recover"
    else:
        patient = world.command(command, **(ATTACH if command is wire.AttachStorage else {}))
    world.settle()
    world.check()
    assert world.answer(patient).success, world.answer(patient).message
    assert set(lost(world)) == {loss} if loss else "detached" not in lost(world)


class Disk:
    """Takes so many pages on each rank, and counts who asks."""

    def __init__(self, room: int) -> None:
        self.room = {0: room, 1: room}
        self.refusals = {0: 0, 1: 0}

    def __call__(self, rank: int, _message: wire.WritePages, _at: int) -> str:
        if self.room[rank]:
            self.room[rank] -= 1
            return ""
        self.refusals[rank] += 1
        return "no_space"


def test_a_full_store_is_asked_by_one_write_at_a_time_and_recovers_by_itself() -> None:
    world = world_with_storage(device_pages=1000, host_pages=1000)
    disk = Disk(10)
    refuse_writes(world, disk)
    prompts = [prompt(i, 2) for i in range(100)]
    for tokens in prompts:
        world.submit(tokens, max_new_tokens=1)
    world.settle()
    world.check()
    durable = sum(stored(world, tokens) for tokens in prompts)
    assert durable == 10 and lost(world) == {"no_space": 190 * PAGE}
    assert disk.refusals[0] <= MAX_WRITES + MAX_ATTEMPTS, "a full store is not hammered"
    before = len(world.plans)
    world.now_us += 3_600_000_000
    assert not world.lead() and len(world.plans) == before, "and nobody is woken up for it"
    disk.room = {0: 1000, 1: 1000}
    computed(world, prompt(500, 2))
    assert stored(world, prompt(500, 2)) == 2, "there is room again, and nobody had to say so"
    computed(world, prompts[50])
    assert stored(world, prompts[50]) == 2 and books(world).counters["recovered"] == 2 * PAGE


def test_what_comes_to_a_full_store_waits_for_the_next_try() -> None:
    world = world_with_storage()
    disk = Disk(0)
    refuse_writes(world, disk)
    computed(world, prompt(1, 2))
    full = world.ranks[0].core.tiers.writer.full
    assert full.failures == MAX_ATTEMPTS and full.probe_at_us - world.now_us <= LONGEST_DELAY_US
    tried = disk.refusals[0]
    for i in range(2, 12):
        world.submit(prompt(i, 2), max_new_tokens=1)
    ticks(world)
    assert disk.refusals[0] == tried and world.ranks[0].core.tiers.backup.line.fresh.pages == 20
    world.settle()
    assert disk.refusals[0] == tried + 1 and lost(world) == {"no_space": 11 * 2 * PAGE}
    world.check()


def test_nothing_of_a_full_store_is_remembered_for_the_next_one() -> None:
    world = world_with_storage()
    refuse_writes(world, Disk(0))
    computed(world, prompt(1, 2))
    world.command(wire.DetachStorage)
    world.settle()
    attach(world)
    assert stored(world, prompt(1, 2)) == 2
    assert world.ranks[0].core.tiers.writer.full.since_us is None


def test_retries_end_with_the_attachment() -> None:
    """Another attempt is due in half a second, and storage is detached before."""
    world = world_with_storage()
    refuse_writes(world, lambda *_: "io")
    world.submit(prompt(1, 2), max_new_tokens=1)
    ticks(world)
    for rank in world.ranks:
        for process in rank.storage.values():
            for _ in range(4):
                process.step()
    ticks(world)
    tiers = world.ranks[0].core.tiers
    assert tiers.writer.next_deadline_us() and tiers.backup.line.retrying() == 1
    command = world.command(wire.DetachStorage, flush_timeout_s=0.1)
    world.settle()
    assert world.answer(command).success and lost(world) == {"shutdown": 2 * PAGE}
    assert tiers.writer.next_deadline_us() is None


# ------------------------------------------------------------------------------------------------- holes


def warm_store(pages: int, *missing: int) -> dict:
    """A store with the pages of `prompt(1, pages)`, some of which are lost."""
    world = world_with_storage()
    computed(world, prompt(1, pages))
    for page in missing:
        for rank in (0, 1):
            del world.store[rank, page_keys(prompt(1, pages), PAGE)[page]]
    return world.store


def test_fm40_a_hole_in_the_middle_heals_and_what_lies_behind_it_is_found_again() -> None:
    world = reader(store=warm_store(8, 3))
    rid = world.submit(prompt(1, 8), max_new_tokens=1)
    world.settle()
    assert cached(world, rid).storage == 3 * PAGE, "nothing is read from behind the hole"
    assert stored(world, prompt(1, 8)) == 8 and is_prefix_closed(world)
    again = reader(store=world.store)
    rid = again.submit(prompt(1, 8), max_new_tokens=1)
    again.settle()
    assert cached(again, rid).storage == 8 * PAGE
    assert not lost(world) and not lost(again)


def test_a_page_that_the_store_turns_out_to_lack_is_offered_again() -> None:
    """It was written in this attachment, and lost behind our back: a read that stops there says so."""
    world = world_with_storage()
    computed(world, prompt(1, 8))
    tokens = prompt(1, 8)
    for rank in world.ranks:
        queue = rank.core.tiers.backup
        del world.store[rank.number, page_keys(tokens, PAGE)[3]]
        queue.not_there(b"", encode_tokens(tokens[:-1]), 3)
        assert [entry.node.end_pages for entry in queue.line.entries()] == [4]
    world.settle()
    world.check()
    assert stored(world, tokens) == 8


def test_pages_that_a_read_brings_while_they_wait_are_stored() -> None:
    """Another server has written the first of them meanwhile: only the rest is left to do."""
    world = world_with_storage()
    hold(world)
    for i in range(MAX_WRITES):
        world.submit(prompt(50 + i, 1), max_new_tokens=1)
    tokens = prompt(1, 8)
    for length in (4, 8):
        world.submit(tokens[: length * PAGE + 1], max_new_tokens=1)
        ticks(world)
    world.store |= warm_store(4)
    for rank in world.ranks:
        queue = rank.core.tiers.backup
        assert queue.line.fresh.pages == MAX_WRITES + 8
        first = rank.core.tiers.controller.tree.holder(b"", encode_tokens(tokens[:-1]), 3)
        queue.found(first, queue.tag)
        assert queue.line.fresh.pages == MAX_WRITES + 4
    let_go(world)
    world.settle()
    world.check()
    counters = books(world).counters
    assert (counters["found"], counters["backuped"], lost(world)) == (4 * PAGE, (MAX_WRITES + 4) * PAGE, {})
