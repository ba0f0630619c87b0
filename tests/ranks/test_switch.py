"""From one store to another under load: all ranks in one tick, and neither store answers for the other."""

from __future__ import annotations

import msgspec
import pytest

from sglang_hicache import wire
from sglang_hicache.cache.backup_pace import MAX_ATTEMPTS, MAX_WRITES
from sglang_hicache.cache.op import Op, OpKind
from sglang_hicache.cache.page import encode_tokens, page_keys
from sglang_hicache.cache.prefetch import Prefetch
from sglang_hicache.storage.attachment_events import State
from tests.ranks.backups import books, let_go, prompt, refuse_writes, stored, ticks
from tests.ranks.control import (
    attach,
    detach,
    ended,
    hold,
    moment,
    processes,
    slot,
    store,
    until_answered,
)
from tests.ranks.reads import PROMPT, cached, tick, warm_store, world_with_storage
from tests.ranks.world import PAGE, World, server_config


@pytest.fixture
def world() -> World:
    """The memory store is attached, and there is room for everything."""
    return world_with_storage(device_pages=200, host_pages=200)


def test_a_switch_under_load_commits_everywhere_and_fails_nobody(world: World) -> None:
    rids = [world.submit(prompt(i, 5), max_new_tokens=20) for i in range(4)]
    for _ in range(6):
        moment(world)
    assert world.ranks[0].core.commands.blockers(), "nothing was under way"
    switch = attach(world, "/b", switch=True)
    until_answered(world, switch)
    for rank in world.ranks:
        answer = next(a for a in rank.answers if a.id == switch)
        assert answer.success and "took over from 'memory'" in answer.message
        assert rank.core.tiers.slot.serving() == "file"
    world.settle()
    world.check()
    assert all(ended(world, rid) for rid in rids)
    assert [process.state for process in processes(world, 1)] == ["gone", "gone"]
    assert store(world, "/b"), "nothing was written to the new store"


def test_fm07_a_switch_that_fails_on_one_rank_leaves_every_rank_with_the_old_store(world: World) -> None:
    world.submit(PROMPT)
    world.settle()
    switch = attach(world, "/b", switch=True)
    tick(world)
    processes(world, 2)[1].fault_rate = 1.0
    processes(world, 2)[1].step()
    until_answered(world, switch)
    for rank in world.ranks:
        answer = next(a for a in rank.answers if a.id == switch)
        assert not answer.success and "rank 1: no such host" in answer.message
        assert rank.core.tiers.slot.gate() == 1
    for rank in world.ranks:
        rank.core.tiers.flush()
    rid = world.submit(PROMPT)
    world.settle()
    assert cached(world, rid).storage == 6 * PAGE, "the old store serves as before"


def test_the_same_backend_and_config_is_a_switch_when_one_is_asked_for(world: World) -> None:
    """A credential was rotated behind an unchanged config: only a new connection takes it."""
    for switch, epoch in ((False, 1), (True, 2)):
        command = attach(world, switch=switch)
        world.settle()
        assert world.answer(command).success and slot(world).gate() == epoch
    world.check()


def test_another_config_without_a_switch_is_refused_and_says_how(world: World) -> None:
    for path in ("", "/b"):
        fields = {"extra_config_json": '{"prefetch_threshold": 5}'} if not path else {"backend": "file"}
        command = world.command(wire.AttachStorage, **{"backend": "memory", "mode": "drain"} | fields)
        world.settle()
        answer = world.answer(command)
        assert not answer.success and "detach first" in answer.message and '"switch": true' in answer.message


def test_a_switch_where_nothing_is_attached_is_an_attach() -> None:
    world = World(0, 2, fault_rate=0.0)
    command = attach(world, switch=True)
    world.settle()
    assert world.answer(command).success and slot(world).gate() == 1
    world.check()


def test_a_switch_in_idle_mode_is_refused_like_any_attach(world: World) -> None:
    world.submit([1, 2, 3], max_new_tokens=30)
    tick(world)
    command = attach(world, "/b", switch=True, mode="idle")
    tick(world)
    assert "Reject attach: scheduler is not idle. #queue-req=0 #running-req=1" in world.answer(command).message
    world.settle()
    world.check()


def test_policies_and_settings_come_with_the_commit_and_not_before(world: World) -> None:
    prefetchers = [rank.core.tiers.prefetcher for rank in world.ranks]
    config = '{"file_storage_path": "/b", "prefetch_threshold": 77}'
    world.command(
        wire.AttachStorage, backend="file", extra_config_json=config, switch=True, prefetch_policy="best_effort",
        write_policy="write_back",
    )  # fmt: skip
    tick(world)
    assert slot(world).face() is State.ATTACHING
    assert {(p.policy, p.settings.prefetch_threshold) for p in prefetchers} == {("wait_complete", 4)}
    world.settle()
    assert {(p.policy, p.settings.prefetch_threshold) for p in prefetchers} == {("best_effort", 77)}
    assert world.ranks[1].core.tiers.controller.write_policy == "write_back"


# ------------------------------------------------------------------------------- what waits to be written


def test_who_waits_for_the_old_store_waits_for_the_new_one_behind_its_parents(world: World) -> None:
    """1. A prompt is stored in A. 2. Its continuation waits for its turn. 3. B takes over, and lacks the prompt.

    Written at its turn, the continuation would lie in B behind a hole, where no look-up ever reaches it."""
    first, longer = prompt(1, 4), [*prompt(1, 4)[:-1], *prompt(2, 4)]
    world.submit(first, max_new_tokens=1)
    world.settle()
    assert stored(world, first) == 4
    hold(world, 1)
    for i in range(MAX_WRITES):  # the line is full of others
        world.submit(prompt(10 + i, 1), max_new_tokens=1)
    ticks(world, 4 * MAX_WRITES)
    rid = world.submit(longer, max_new_tokens=1)
    nobody_waits(world)
    ticks(world)
    assert ended(world, rid) and len(world.ranks[0].core.tiers.backup.line.fresh.line)
    until_answered(world, attach(world, "/b", switch=True, drain_s=0.5))
    for rank in world.ranks:
        rank.core.tiers.backup.check()
    world.settle()
    world.check()
    keys = page_keys(longer, PAGE)[: len(longer) // PAGE]
    assert all((rank, key) in store(world, "/b") for rank in (0, 1) for key in keys)
    assert not books(world).lost, "a switch loses nothing"


def test_without_uploads_only_what_waits_and_what_lies_before_it_is_written_to_the_new_store() -> None:
    config = server_config(2, 200, 200)
    storage = msgspec.structs.replace(config.storage, upload_rate_mib=0.0)
    world = World(0, 2, fault_rate=0.0, config=msgspec.structs.replace(config, storage=storage))
    attach(world)
    world.settle()
    world.submit(prompt(1, 4), max_new_tokens=1)
    world.submit(prompt(9, 4), max_new_tokens=1)
    world.settle()
    hold(world, 1)
    nobody_waits(world)
    world.submit([*prompt(1, 4)[:-1], *prompt(2, 4)], max_new_tokens=1)
    ticks(world)
    until_answered(world, attach(world, "/b", switch=True, drain_s=0.5))
    world.settle()
    world.check()
    assert {content[-1] // 100 for (rank, _), content in store(world, "/b").items() if not rank} == {1, 2}


def nobody_waits(world: World) -> None:
    """What hangs is a miss at once."""
    for rank in world.ranks:
        rank.core.tiers.prefetcher.policy = "best_effort"


# ------------------------------------------------------------------- the old store says nothing of the new one


def test_writes_that_hang_in_the_old_store_take_no_place_from_those_to_the_new_one(world: World) -> None:
    hold(world, 1)
    nobody_waits(world)
    for i in range(MAX_WRITES + 4):
        world.submit(prompt(i, 1), max_new_tokens=1)
    ticks(world, 4 * MAX_WRITES)
    assert world.ranks[0].core.tiers.storage.count(OpKind.WRITE) == MAX_WRITES
    until_answered(world, attach(world, "/b", switch=True, drain_s=60.0))
    for _ in range(40):
        moment(world)
    assert slot(world).retiring is not None, "the old one still hangs"
    assert store(world, "/b"), "nothing is written as long as the old one hangs"
    world.settle()
    world.check()


def test_a_full_old_store_does_not_make_the_new_one_full(world: World) -> None:
    """Its last writes end with no_space after the new one has taken over."""
    hold(world, 1)
    nobody_waits(world)
    world.submit(prompt(1, 3), max_new_tokens=1)
    ticks(world)
    switch = attach(world, "/b", switch=True)
    while not slot(world).retiring:
        moment(world)
    for rank in world.ranks:
        late = rank.core.tiers.ops.of_epoch(1)
        assert OpKind.WRITE in {op.kind for op in late}
        rank.op_facts += [wire.OpFact(op.id, 0, True, True, "no_space") for op in late]
        rank.storage[1].queue.clear()
    tick(world)
    assert world.answer(switch).success
    assert {rank.core.tiers.writer.full.since_us for rank in world.ranks} == {None}
    let_go(world)
    world.settle()
    world.check()
    assert not books(world).lost


def test_a_failed_write_of_the_old_store_is_no_failed_attempt_of_the_new_one(world: World) -> None:
    """Five failures in a row give a node up: four of them were the old store's."""
    refuse_writes(world, lambda *_: "io")
    world.submit(prompt(1, 3), max_new_tokens=1)
    line = world.ranks[0].core.tiers.backup.line
    while not any(entry.failures == MAX_ATTEMPTS - 1 for entry in line.entries()):
        ticks(world, 1)
        for rank in world.ranks:
            for process in rank.storage.values():
                process.step()
        world.now_us = max(world.now_us, line.next_due_us() or 0)
    until_answered(world, attach(world, "/b", switch=True))
    assert {entry.failures for entry in line.entries()} <= {0}
    refuse_writes(world, None)
    world.settle()
    world.check()
    assert not books(world).lost


def test_what_the_old_store_lacks_is_not_held_against_the_new_one(world: World) -> None:
    """A look-up of A that ends as a miss after B has taken over: what B holds is not offered to B again."""
    world.submit(PROMPT, max_new_tokens=1)
    world.settle()
    until_answered(world, attach(world, "/b", switch=True))
    world.settle()
    tiers = world.ranks[0].core.tiers
    (node,) = [node for node in tiers.controller.tree.nodes() if node.page_count]
    assert node.stored == tiers.storage.tag
    op = Op(1, OpKind.READ, epoch=1, pages=6)
    prefetch = Prefetch("r", node.seed, encode_tokens(PROMPT[: 6 * PAGE]), 0, [], op, 0)
    tiers.prefetcher._missed(prefetch, op)
    assert not tiers.backup.line.entries()
    op.epoch = 2
    tiers.prefetcher._missed(prefetch, op)
    assert tiers.backup.line.entries(), "and if B lacked it, it would be"


def test_a_request_is_told_the_store_that_its_pages_came_from() -> None:
    """Its pages were read from the memory store; when it runs, the file store serves."""
    world = world_with_storage(store=warm_store())
    rid = world.submit(PROMPT)
    for _ in range(5):
        tick(world)
        for process in processes(world, 1):
            process.step()
    read = [op for op in world.ranks[0].core.tiers.ops if op.kind is OpKind.READ]
    assert read, "nothing is being read"
    hold(world, 1)
    until_answered(world, attach(world, "/b", switch=True))
    world.settle()
    world.check()
    found = cached(world, rid)
    assert found.storage and found.storage_backend == "MemoryBackend"
    later = world.submit([9] * 20)
    world.settle()
    assert cached(world, later).storage_backend == "FileBackend"


def test_what_ends_late_in_the_old_store_is_counted_there(world: World) -> None:
    """A write of three pages is whole after the new store has taken over."""
    hold(world, 1)
    nobody_waits(world)
    world.submit(prompt(1, 3), max_new_tokens=1)
    ticks(world)
    until_answered(world, attach(world, "/b", switch=True, drain_s=5.0))
    status = world.ranks[0].core.status
    assert not status.answer("q").totals["memory"].get("backup_backuped_tokens")
    for rank in world.ranks:
        late = rank.core.tiers.ops.of_epoch(1)
        rank.op_facts += [wire.OpFact(op.id, op.pages, True, True) for op in late if op.kind is OpKind.WRITE]
        rank.op_facts += [wire.OpFact(op.id, 0, True, True) for op in late if op.kind is not OpKind.WRITE]
    tick(world)
    totals = status.answer("q").totals
    assert totals["memory"]["backup_backuped_tokens"] == 3 * PAGE
    assert not totals["file"].get("backup_backuped_tokens")
    world.settle()
    totals, counters = status.answer("q").totals, status.answer("q").counters
    assert totals["file"]["backup_backuped_tokens"] == 3 * PAGE, "and it is written to the new one, too"
    for name, total in counters.items():
        if name.startswith(("backup_", "prefetch_")):
            assert sum(of.get(name, 0) for of in totals.values()) == total


def test_a_clear_of_the_old_store_leaves_what_the_new_one_holds(world: World) -> None:
    world.submit(prompt(1, 3), max_new_tokens=1)
    world.settle()
    hold(world, 1)
    clear = world.command(wire.ClearStorage, deadline_s=2.0)
    until_answered(world, attach(world, "/b", switch=True, drain_s=0.5))
    world.settle()
    answer = world.answer(clear)
    assert not answer.success and "rank 0: the storage was lost, detached or switched" in answer.message
    tiers = world.ranks[0].core.tiers
    assert all(node.stored == tiers.storage.tag for node in tiers.controller.tree.nodes())
    world.check()


def test_how_the_old_store_ended_is_not_how_the_new_one_does(world: World) -> None:
    hold(world, 1)
    nobody_waits(world)
    world.submit(prompt(1, 3), max_new_tokens=1)
    ticks(world)
    until_answered(world, attach(world, "/b", switch=True, drain_s=0.5))
    world.settle()
    assert slot(world).last_error.startswith("drain_timeout: ") and "(memory, epoch 1)" in slot(world).last_error
    command = detach(world)
    world.settle()
    assert world.answer(command).message == "HiCache storage detached successfully."


# ----------------------------------------------------------------------------------------------- how long


def test_the_old_store_has_the_time_that_the_switch_gave_it(world: World) -> None:
    hold(world, 1)
    nobody_waits(world)
    world.submit(PROMPT, max_new_tokens=1)
    ticks(world)
    seconds = until_answered(world, attach(world, "/b", switch=True, deadline_s=30.0, drain_s=2.0))
    assert seconds < 1.0, "a switch is answered at the commit"
    began_us = world.now_us
    while slot(world).retiring is not None:
        moment(world)
    assert 1.8 <= (world.now_us - began_us) / 1e6 <= 2.5
    assert slot(world).last_error.startswith("drain_timeout: ") and slot(world).gate() == 2
    world.settle()
    world.check()


def test_a_forced_detach_cuts_the_drain_of_a_switch_short(world: World) -> None:
    hold(world, 1)
    nobody_waits(world)
    world.submit(PROMPT, max_new_tokens=1)
    ticks(world)
    until_answered(world, attach(world, "/b", switch=True, drain_s=1000.0))
    assert slot(world).retiring is not None
    assert until_answered(world, detach(world, "force")) <= 2.0
    world.settle()
    world.check()
    assert slot(world).face() is State.DETACHED


def test_a_detach_gives_the_candidate_up_and_answers_both(world: World) -> None:
    switch = attach(world, "/b", switch=True, deadline_s=30.0)
    tick(world)
    hold(world, 2)
    command = detach(world)
    until_answered(world, command)
    assert world.answer(command).success
    assert not world.answer(switch).success and "given up by a detach" in world.answer(switch).message
    world.settle()
    world.check()


# ------------------------------------------------------------------------------------------------ new weights


def test_a_switch_while_the_line_stands_still_for_new_weights_is_waited_for(world: World) -> None:
    """In drain mode nothing refuses it.  Its processes could not hear yet what their pages are called, and the played
    world fails when one is told; so the weights come after the commit, or not at all."""
    world.submit(prompt(1, 2), max_new_tokens=30)
    tick(world)
    update = world.command(wire.UpdateWeights, weights_digest="w1")
    tick(world)
    for rank in world.ranks:
        rank.end_staging()
    tick(world)
    assert world.ranks[0].core.update.is_holding
    switch = attach(world, "/b", switch=True)
    world.settle()
    assert world.answer(update).success and world.answer(switch).success
    rid = world.submit(PROMPT)
    world.settle()
    world.check()
    assert ended(world, rid)
    assert {key[:2] for _, key in store(world, "/b")} == {b"w1"}


def test_a_candidate_that_never_opens_delays_new_weights_to_the_end_of_their_time(world: World) -> None:
    attach(world, "/b", switch=True, deadline_s=30.0)
    tick(world)
    hold(world, 2)
    update = world.command(wire.UpdateWeights, weights_digest="w1", deadline_s=1.0)
    tick(world)
    for rank in world.ranks:
        rank.end_staging()
    until_answered(world, update)
    assert not world.answer(update).success and "#opening-storage=1" in world.answer(update).message
    world.settle()
    world.check()
