"""What an operator reads when a store hangs: which one, doing what, on which rank, and what became of it."""

from __future__ import annotations

import pytest

from sglang_hicache import wire
from tests.ranks.reads import PROMPT, process, tick, warm_store, world_with_storage
from tests.ranks.world import World


def last_words(world: World, caplog: pytest.LogCaptureFixture) -> str:
    """The same on every rank, and in the log."""
    world.settle()
    world.check()
    (words,) = {rank.core.tiers.slot.last_error for rank in world.ranks}
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [f"the storage is given up: {words}"]
    return words


def test_an_op_that_never_ends_is_told_with_its_rank(caplog: pytest.LogCaptureFixture) -> None:
    """1. Rank 1's store hangs in a read. 2. All ranks detach. 3. The log was silent, the status named a number."""
    world = world_with_storage(store=warm_store())
    process(world, 1).state = "held"
    rid = world.submit(PROMPT)
    words = last_words(world, caplog)
    assert words.startswith("hung: the store hangs: a lookup of 6 pages did not end within 5 s on rank 1 (op ")
    assert "detached" in words and world.ranks[0].outputs[-1].rid == rid


def test_a_store_that_does_not_answer_is_told_before_it_counts_as_hung() -> None:
    """1. Every call of the store hangs, and requests wait for it. 2. The status said that nothing waits."""
    world = world_with_storage(store=warm_store())
    process(world, 1).state = "held"
    world.submit(PROMPT)
    tick(world)
    status = world.ranks[0].core.status
    assert not any("under way" in sentence for sentence in status.answer("q").why), "it has only begun"
    (told,) = [words for words in status.answer("q", world.now_us + 3_000_000).why if "under way" in words]
    assert told.startswith("under way with the store: 1 operation, the oldest, a lookup, for 3.0 s; ")
    world.command(wire.DetachStorage, flush_timeout_s=0.0, deadline_s=9.0)
    tick(world)
    draining, told = status.answer("q", world.now_us + 4_000_000).why
    assert draining.startswith("storage is draining: ") and told.startswith("under way with the store: 1 operation, ")


def test_a_lane_that_hangs_is_noticed_although_requests_keep_coming(caplog: pytest.LogCaptureFixture) -> None:
    """1. A look-up hangs. 2. Those behind it are given up by their requests and revoked in the queue. 3. Each of them
    ended, so the lane seemed to move, and the hang was noticed only once nobody asked any more."""
    world = world_with_storage(policy="timeout")
    for rank in world.ranks:
        process(world, rank.number).state = "held"
    answered: set[int] = set()
    for number in range(40):  # of half a second each; the time-out is 5 s
        world.submit([number] * 9, max_new_tokens=1)
        for _ in range(3):
            tick(world)
            world.now_us += 170_000
        for rank in world.ranks:
            for storage in rank.storage.values():
                revoked = [message.op_id for message in storage.queue if isinstance(message, wire.RevokeOp)]
                fresh = [op_id for op_id in revoked[1:] if op_id not in answered]
                rank.op_facts += [wire.OpFact(op_id, 0, True, True, "revoked") for op_id in fresh]
        answered |= set(revoked)
        if world.ranks[0].core.tiers.slot.last_error:
            break
    assert number < 20
    assert "the store hangs: a lookup of 2 pages did not end within 5 s on rank 0, 1 (op " in last_words(world, caplog)


@pytest.mark.parametrize("busy", [False, True])
def test_a_detach_that_had_to_kill_says_so(busy: bool, caplog: pytest.LogCaptureFixture) -> None:
    world = world_with_storage()
    if busy:
        world.submit(PROMPT, max_new_tokens=1)
        tick(world)
    command = world.command(wire.DetachStorage, flush_timeout_s=0.0 if busy else None, deadline_s=1.0)
    tick(world)
    for rank in world.ranks:
        for storage in rank.storage.values():
            storage.state = "held"
    words = last_words(world, caplog)
    assert world.answer(command).success
    assert words.startswith("drain_timeout: ")
    if busy:
        assert "the detach was due: 1 operation cut off" in words
    else:
        assert words == (
            "drain_timeout: the store did not close in time on rank 0, 1, and its process was killed (memory, epoch 1)"
        )
