"""Detach under load, and what can still be given up: each command is answered in time, whatever the store does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sglang_hicache import wire
from sglang_hicache.cache.op import OpKind, OpPhase
from sglang_hicache.storage.attachment_events import State
from tests.ranks.control import attach, detach, ended, hold, moment, processes, slot, until_answered
from tests.ranks.reads import PROMPT, cached, tick, warm_store, world_with_storage
from tests.ranks.test_failure_modes import BLOCKERS
from tests.ranks.world import PAGE, World

#: The 0.5 s in which a killed process is expected to go, and some ticks.
GRACE_S = 1.0


@pytest.mark.parametrize("name", BLOCKERS)
@pytest.mark.parametrize("mode", ["drain", "force"])
def test_fm54_what_refuses_an_idle_detach_does_not_refuse_one_that_drains(name: str, mode: str) -> None:
    world = world_with_storage()
    BLOCKERS[name](world)
    assert world.ranks[0].core.commands.blockers().get(name)
    command = detach(world, mode, deadline_s=5.0)
    tick(world)
    assert slot(world).gate() is None, "nothing new is given to the store"
    assert until_answered(world, command) < 5.0, "what is under way ends by itself, and nobody waits for the deadline"
    answer = world.answer(command)
    assert answer.success and "did not end by itself" not in answer.message
    world.settle()
    world.check()


@pytest.mark.parametrize("command", [wire.DetachStorage, wire.AttachStorage])
def test_fm54_queued_backups_of_a_store_that_moves_refuse_too(command: type) -> None:
    """The one blocker that needs more than a request: more waits to be written than may be written at a time."""
    world = world_with_storage(device_pages=200, host_pages=200)
    hold(world, 1)
    for rank in world.ranks:
        rank.core.tiers.prefetcher.policy = "best_effort"
    for i in range(24):
        world.submit([100 * i] * (PAGE + 1), max_new_tokens=1)
    for _ in range(60):
        moment(world)
    found = world.ranks[0].core.commands.blockers()
    assert found.keys() >= {"write-ops", "queued-backups"}
    fields = {"backend": "memory"} if command is wire.AttachStorage else {}
    asked = world.command(command, **fields)
    tick(world)
    assert f"#queued-backups={found['queued-backups']}" in world.answer(asked).message
    world.settle()
    world.check()


# ------------------------------------------------------------------------------------------ a store that hangs


def reading(world: World, *, arrived: int) -> str:
    """A request that waits for six pages, so many of which have come; then its store hangs."""
    rid = world.submit(PROMPT)
    for _ in range(3):
        tick(world)
        for process in processes(world, 1):
            process.step()
    for _ in range(arrived):
        for process in processes(world, 1):
            process.step()
    hold(world, 1)
    tick(world)
    (op,) = [op for op in world.ranks[0].core.tiers.ops if op.kind is OpKind.READ]
    assert not ended(world, rid) and op.phase is OpPhase.RUNNING
    return rid


def test_fm14_a_forced_detach_of_a_store_that_hangs_is_answered_and_requests_go_on() -> None:
    """1. A request waits for six pages. 2. Three have come, and the store hangs. 3. The detach lets it go at once, with
    the three; the pages of the rest are free only after the process is dead."""
    world = world_with_storage(store=warm_store())
    rid = reading(world, arrived=2)
    assert len(world.ranks[0].core.tiers.ops.of_epoch(1)) == 1
    command = detach(world, "force", deadline_s=1.0)
    began_us = world.now_us
    while not world.texts()[rid]:
        moment(world)
    assert (world.now_us - began_us) / 1e6 < 0.2, "it waited for the end of the store"
    assert slot(world).face() is State.DRAINING and len(world.ranks[0].core.tiers.ops.of_epoch(1)) == 1
    assert until_answered(world, command) <= 1.0 + GRACE_S
    answer = world.answer(command)
    assert answer.success and "drain_timeout: the store hangs, and the detach was due: 1 operation " in answer.message
    assert {process.state for process in processes(world, 1)} == {"gone"}
    world.settle()
    world.check()
    found = cached(world, rid)
    assert 0 < found.storage < 6 * PAGE and found.storage_backend == "MemoryBackend"


def test_fm14_what_a_hung_store_brings_after_the_detach_is_thrown_away() -> None:
    world = world_with_storage(store=warm_store())
    rid = reading(world, arrived=0)
    (read,) = world.ranks[0].core.tiers.ops.of_epoch(1)
    command = detach(world, "force")
    until_answered(world, command)
    for rank in world.ranks:
        rank.op_facts.append(wire.OpFact(read.id, 6, True, True))
    world.settle()
    world.check()
    assert ended(world, rid).cached.storage == 0


def test_fm13_a_store_that_does_not_close_is_killed_and_the_detach_answered() -> None:
    """Nothing is under way; it is the backend's own end that never comes."""
    world = world_with_storage()
    command = detach(world)
    while slot(world).face() is not State.DETACHING:
        tick(world)
    hold(world, 1)
    assert until_answered(world, command) <= 1.0 + GRACE_S
    assert "drain_timeout: the store did not close in time on rank 0, 1" in world.answer(command).message
    world.settle()
    world.check()


def test_fm13_a_process_that_cannot_be_killed_frees_the_slot_and_keeps_its_pages() -> None:
    world = world_with_storage(store=warm_store())
    rid = reading(world, arrived=1)
    command = detach(world, "force")
    began_us = world.now_us
    while slot(world).face() is not State.FAILED:
        moment(world)
    for process in processes(world, 1):
        process.state = "stuck"
    world.now_us += 500_000
    for process in processes(world, 1):
        process.tell("reap_timeout", "pid 7 is in uninterruptible I/O")
    until_answered(world, command)
    assert (world.now_us - began_us) / 1e6 <= 1.0 + GRACE_S
    answer = world.answer(command)
    assert answer.success and "unreaped: could not be reaped" in answer.message and "Pages held" in answer.message
    for rank in world.ranks:
        status = rank.core.status.answer("q")
        assert status.quarantined_pages and status.state == "detached" and not status.places
        rank.core.check()
    again = attach(world)
    until_answered(world, again)
    assert world.answer(again).success, "the slot is free"
    assert ended(world, rid)
    for process in processes(world, 1):
        process.end()
    world.settle()
    world.check()


@pytest.mark.parametrize("is_closing", [False, True])
def test_a_second_detach_cuts_the_time_of_the_first(is_closing: bool) -> None:
    world = world_with_storage(store=warm_store())
    if not is_closing:
        reading(world, arrived=1)
    patient = detach(world, "drain", deadline_s=1000.0)
    if is_closing:
        while slot(world).face() is not State.DETACHING:
            tick(world)
        hold(world, 1)
    for _ in range(20):
        moment(world)
    assert slot(world).face() is (State.DETACHING if is_closing else State.DRAINING)
    forced = detach(world, "force", deadline_s=0.5)
    assert until_answered(world, forced) <= 0.5 + GRACE_S
    assert world.answer(patient).success and world.answer(forced).success
    world.settle()
    world.check()


def test_a_second_detach_with_more_time_gives_the_first_none() -> None:
    world = world_with_storage(store=warm_store())
    reading(world, arrived=1)
    forced = detach(world, "force", deadline_s=0.5)
    tick(world)
    detach(world, "drain", deadline_s=1000.0)
    assert until_answered(world, forced) <= 0.5 + GRACE_S
    world.settle()
    world.check()


def test_the_leader_sleeps_until_a_drain_is_due_and_no_longer() -> None:
    world = world_with_storage(store=warm_store())
    reading(world, arrived=1)
    world.submit([1, 2, 3], max_new_tokens=1)
    detach(world, "drain", deadline_s=3.0)
    due_us = world.now_us + 3_000_000
    for _ in range(20):
        tick(world)
    for _ in range(10):
        world.now_us += 1_000
        assert not world.lead()
    assert world.leader.wake_at_us(world.ranks[0].core) == due_us
    world.now_us = due_us
    assert world.lead() and world.plans[-1].storage[0].event == "deadline"
    world.settle()
    world.check()


# --------------------------------------------------------------------------------- one rank is not like the others


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_fm05_ranks_that_see_an_end_at_other_times_act_on_it_in_the_same_tick(slow: int) -> None:
    """One rank's store is ten steps behind: all ranks publish, close and go on in the tick of the slowest."""
    world = world_with_storage(3, store=warm_store(ranks=3))
    rid = world.submit(PROMPT)
    closed: list[dict[int, int]] = [{} for _ in world.ranks]
    for step in range(400):
        for rank in world.ranks:
            while rank.copies:
                rank.finish_copy()
            for process in rank.storage.values():
                if rank.number != slow or step % 10 == 0:
                    process.step()
        tick(world)
        for rank in world.ranks:
            for outcome in world.plans[-1].ops:
                closed[rank.number].setdefault(outcome.op_id, rank.core.tick)
            assert rank.digests == world.ranks[0].digests
        if ended(world, rid):
            break
    assert closed[0] and closed[0] == closed[1] == closed[2]
    assert cached(world, rid).storage == 6 * PAGE
    world.settle()
    world.check()


def test_a_process_that_claims_more_pages_than_it_was_asked_for_ends_no_rank() -> None:
    world = world_with_storage(store=warm_store())
    rid = world.submit(PROMPT)
    tick(world)
    liar = processes(world, 1)[1]
    liar.work = lambda message: liar.fact(message.op_id, 7, True)
    for _ in range(10):
        moment(world)
    world.settle()
    assert ended(world, rid).cached.storage == 0, "it is believed in nothing"


# ------------------------------------------------------------------------------------------------------ cancel


def cancel(world: World, target: str) -> str:
    return world.command(wire.CancelCommand, target=target)


@pytest.mark.parametrize("is_switch", [False, True])
def test_an_attach_that_is_opening_can_be_cancelled(is_switch: bool) -> None:
    world = world_with_storage() if is_switch else World(0, 2, fault_rate=0.0)
    command = attach(world, "/b", switch=is_switch, deadline_s=1000.0)
    tick(world)
    hold(world, 1 + is_switch)
    given_up = cancel(world, command)
    assert until_answered(world, given_up) < 0.5
    until_answered(world, command)
    for rank in world.ranks:
        assert next(a for a in rank.answers if a.id == given_up).success
        answer = next(a for a in rank.answers if a.id == command)
        assert not answer.success and answer.message == "Failed to attach storage backend 'file': cancelled"
        assert rank.core.tiers.slot.gate() == (1 if is_switch else None)
        assert not rank.core.tiers.slot.last_error, "nothing is wrong with the storage"
    world.settle()
    world.check()


def test_a_flush_that_waits_can_be_cancelled() -> None:
    world = world_with_storage()
    rid = world.submit([1, 2, 3], max_new_tokens=50)
    tick(world)
    flush = world.command(wire.FlushCache, timeout_s=100.0, deadline_s=100.0)
    tick(world)
    given_up = cancel(world, flush)
    tick(world)
    assert world.answer(given_up).success
    assert not world.answer(flush).success and "cancelled" in world.answer(flush).message
    assert not ended(world, rid), "it did not even wait"
    world.settle()
    world.check()


def _draining(world: World) -> str:
    reading(world, arrived=1)
    return detach(world, deadline_s=5.0)


def _clearing(world: World) -> str:
    hold(world, 1)
    return world.command(wire.ClearStorage, deadline_s=1.0)


def _ended(world: World) -> str:
    command = attach(world)
    world.settle()
    return command


UNDOABLE = {_draining: "takes the storage out", _clearing: "being deleted", _ended: "has ended"}


@pytest.mark.parametrize("begin", UNDOABLE, ids=lambda begin: begin.__name__)
def test_what_cannot_be_undone_is_not_cancelled_and_says_why(begin: Callable[[World], str]) -> None:
    world, why = world_with_storage(store=warm_store()), UNDOABLE[begin]
    target = begin(world)
    tick(world)
    given_up = cancel(world, target)
    tick(world)
    answer = world.answer(given_up)
    assert not answer.success and target in answer.message and why in answer.message
    world.settle()
    world.check()


# ------------------------------------------------------------------------------------------------------ status


def test_the_status_shows_every_place_of_a_switch() -> None:
    world = world_with_storage(store=warm_store())
    reading(world, arrived=1)
    switch = attach(world, "/b", switch=True, drain_s=1.0)
    tick(world)
    places = world.ranks[1].core.status.answer("q").places
    assert [(p.role, p.state, p.epoch, p.backend, p.in_flight) for p in places] == [
        ("current", "attached", 1, "memory", 1), ("candidate", "attaching", 2, "file", 0),
    ]  # fmt: skip
    until_answered(world, switch)
    places = world.ranks[1].core.status.answer("q").places
    assert [(p.role, p.state, p.epoch, p.in_flight) for p in places if p.role == "retiring"] == [
        ("retiring", "draining", 1, 1)
    ]
    world.settle()
    assert [p.role for p in world.ranks[0].core.status.answer("q").places] == ["current"]
    world.check()
