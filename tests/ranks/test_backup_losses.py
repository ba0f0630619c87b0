"""Every way in which a page stays out of the store, each with its reason and its exact number of tokens.

    offered == stored + lost - recovered + waiting          `core.check` holds it after every tick of these worlds
"""

from __future__ import annotations

import logging

import pytest

from sglang_hicache import wire
from sglang_hicache.cache import backup
from sglang_hicache.cache.backup_pace import MAX_ATTEMPTS
from tests.ranks.backups import (
    ATTACH,
    attach,
    books,
    computed,
    give_up_device,
    give_up_host,
    hold,
    let_go,
    lost,
    prompt,
    refuse_writes,
    stored,
    ticks,
    world_with_storage,
)
from tests.ranks.world import PAGE, World


def stores_die(world: World) -> None:
    """Every storage process ends by itself."""
    for rank in world.ranks:
        for process in rank.storage.values():
            if process.state in ("open", "held"):
                process.tell("lost", "the test says so")
                process.end()
    world.settle()


def test_what_is_stored_is_no_loss() -> None:
    world = world_with_storage()
    computed(world, prompt(1, 6))
    assert stored(world, prompt(1, 6)) == 6 and not lost(world)
    assert books(world).counters["offered"] == books(world).counters["backuped"] == 6 * PAGE


def test_queue_full_drops_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup, "MAX_QUEUED", 3)
    world = world_with_storage()
    hold(world)
    prompts = [prompt(i, 2) for i in range(30)]
    for tokens in prompts:
        world.submit(tokens, max_new_tokens=1)
        ticks(world, 4)
    let_go(world)
    world.settle()
    world.check()
    kept = [stored(world, tokens) == 2 for tokens in prompts]
    assert kept[-3:] == [True] * 3 and not all(kept)
    first_dropped = kept.index(False)
    assert kept[first_dropped:-3] == [False] * (27 - first_dropped), "the oldest that waited went first"
    assert lost(world) == {"queue_full": kept.count(False) * 2 * PAGE}
    computed(world, prompts[first_dropped])  # touched: offered again
    assert stored(world, prompts[first_dropped]) == 2
    assert books(world).counters["recovered"] == 2 * PAGE


def test_backend_error_is_tried_again_and_then_given_up() -> None:
    world = world_with_storage()
    refuse_writes(world, lambda *_: "io")
    began_us = world.now_us
    computed(world, prompt(1, 6))
    assert lost(world) == {"backend_error": 6 * PAGE} and not world.store
    assert books(world).counters["failed"] == MAX_ATTEMPTS * 6 * PAGE
    assert 7_500_000 <= world.now_us - began_us < 8_500_000, "0.5 s, 1, 2 and 4 between five attempts"
    world.check()
    before = len(world.plans)
    world.now_us += 3_600_000_000
    assert not world.lead() and len(world.plans) == before, "a store that stays broken wakes nobody up"


def test_a_node_that_was_given_up_is_offered_again_when_it_is_touched() -> None:
    world = world_with_storage()
    refuse_writes(world, lambda *_: "io")
    computed(world, prompt(1, 6))
    refuse_writes(world, None)
    computed(world, prompt(1, 6))
    assert stored(world, prompt(1, 6)) == 6
    counters = books(world).counters
    assert (counters["offered"], counters["backuped"], counters["recovered"]) == (24, 24, 24)
    assert lost(world) == {"backend_error": 24}, "what was lost stays counted, and is counted back"
    world.check()


def test_evicted_before_backup() -> None:
    """The store stands still, and more comes than the host holds."""
    world = world_with_storage(device_pages=60, host_pages=20)
    hold(world)
    for i in range(12):
        world.submit(prompt(i, 3), max_new_tokens=1)
        ticks(world, 6)
    let_go(world)
    world.settle()
    world.check()
    assert list(lost(world)) == ["evicted_before_backup"]
    assert books(world).counters["backuped"] + lost(world)["evicted_before_backup"] == 12 * 3 * PAGE


def test_policy_of_two_hits_is_a_reason() -> None:
    world = world_with_storage(write_policy="write_through_selective")
    computed(world, prompt(1, 6))
    assert not world.store and not lost(world), "it is on the device, and may still be hit"
    give_up_device(world)
    assert lost(world) == {"policy": 6 * PAGE}


@pytest.mark.parametrize("policy", ["write_through", "write_back"])
def test_host_pressure_is_a_reason(policy: str) -> None:
    """A prompt that the whole host pool does not hold never gets the copy that a backup starts from."""
    world = world_with_storage(host_pages=4, write_policy=policy)
    computed(world, prompt(1, 6))
    give_up_device(world)
    assert lost(world) == {"host_pressure": 6 * PAGE} and not world.store


def test_detached_what_waited_when_the_store_died() -> None:
    world = world_with_storage()
    hold(world)
    world.submit(prompt(1, 6), max_new_tokens=1)
    ticks(world)
    stores_die(world)
    assert lost(world) == {"detached": 6 * PAGE}
    attach(world)  # offered anew, in the background
    assert stored(world, prompt(1, 6)) == 6 and books(world).counters["recovered"] == 6 * PAGE
    world.check()


def test_parent_lost_what_lies_behind_a_page_that_cannot_be_stored() -> None:
    world = world_with_storage()
    refuse_writes(world, lambda _rank, message, at: "io" if message.depth + at == 2 else "")
    tokens = prompt(1, 8)
    computed(world, tokens[: 4 * PAGE + 1], tokens)
    assert stored(world, tokens) == 2
    assert lost(world) == {"backend_error": 2 * PAGE, "parent_lost": 4 * PAGE}
    refuse_writes(world, None)
    computed(world, tokens)
    assert stored(world, tokens) == 8 and books(world).counters["recovered"] == 6 * PAGE
    world.check()


def test_parent_lost_what_the_host_gives_up_behind_a_lost_parent() -> None:
    """Not even offered, because its parent was not, and gone when the host needs the room."""
    world = world_with_storage(write_policy="write_back")
    tokens = prompt(1, 8)
    computed(world, tokens[: 4 * PAGE + 1], tokens)
    for rank in world.ranks:
        controller = rank.core.tiers.controller
        controller._evict_from_device(controller.tree.device_victim())  # the leaf alone
    ticks(world)
    assert not lost(world) and not world.store, "its parent has no host copy yet"
    give_up_host(world)
    assert lost(world) == {"parent_lost": 4 * PAGE}


def test_what_is_stored_while_it_waits_behind_its_parent_is_demoted_later() -> None:
    """write_back demotes leaves first: they wait for their parents and are no loss."""
    world = world_with_storage(write_policy="write_back")
    tokens = prompt(1, 8)
    computed(world, tokens[: 4 * PAGE + 1], tokens)
    give_up_device(world)
    ticks(world)
    world.settle()
    assert stored(world, tokens) == 8 and not lost(world)


def test_flushed_what_an_upload_had_still_to_write() -> None:
    world = World(0, 2, fault_rate=0.0)
    computed(world, prompt(1, 8))
    world.command(wire.AttachStorage, **ATTACH)
    ticks(world, 3)
    for rank in world.ranks:
        rank.storage[1].step()
    ticks(world, 2)
    hold(world)
    assert world.ranks[0].core.tiers.ops.counts() == {"upload": 1}, "a write of the upload is under way"
    flush = world.command(wire.FlushCache)
    ticks(world, 2)
    assert not [a for a in world.ranks[0].answers if a.id == flush], "nothing can be emptied under a write"
    let_go(world)
    world.settle()
    assert world.answer(flush).success
    assert lost(world) == {"flushed": 8 * PAGE}
    assert not list(world.ranks[0].core.tiers.controller.tree.nodes())
    world.check()


def test_what_another_server_has_stored_meanwhile_is_recovered_when_a_read_finds_it() -> None:
    """1. The store refuses a page for good. 2. Another server writes it. 3. A read that had begun before brings it."""
    world = world_with_storage(ranks=1)
    refuse_writes(world, lambda rank, message, at: "io")
    computed(world, prompt(1, 3))
    assert lost(world) == {"backend_error": 3 * PAGE}
    tiers = world.ranks[0].core.tiers
    (node,) = tiers.controller.tree.nodes()
    tiers.backup.found(node, (1, -1))
    assert not books(world).counters["recovered"], "what was read before a clear proves nothing"
    tiers.backup.found(node, (1, 0))
    assert books(world).counters["recovered"] == 3 * PAGE
    tiers.backup.check()


def test_shutdown_counts_what_it_could_not_write_and_logs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    world = world_with_storage()
    computed(world, prompt(1, 3))
    hold(world)
    for i in range(2, 40):
        world.submit(prompt(i, 3), max_new_tokens=1)
        ticks(world, 4)
    world.submit([7, 7, 7, 7, 7], max_new_tokens=1)
    command = world.command(wire.DetachStorage, flush_timeout_s=1.0, deadline_s=3.0)
    ticks(world, 4)
    world.settle()
    assert world.answer(command).success
    assert lost(world) == {"shutdown": (38 * 3 + 1) * PAGE}
    (line,) = [r.getMessage() for r in caplog.records if "storage detached" in r.getMessage()]
    assert line == "storage detached: 12 tokens were stored, 460 were not (shutdown 460)"
    assert "did not end by itself: " in world.answer(command).message


def test_shutdown_counts_what_the_policy_has_not_let_through() -> None:
    world = world_with_storage(write_policy="write_through_selective")
    computed(world, prompt(1, 2), prompt(2, 3), prompt(2, 3))
    command = world.command(wire.DetachStorage, flush_timeout_s=1.0)
    world.settle()
    assert world.answer(command).success
    assert lost(world) == {"policy": 2 * PAGE} and stored(world, prompt(2, 3)) == 3


def test_a_clear_is_no_loss_and_only_what_is_touched_is_written_again() -> None:
    world = world_with_storage()
    computed(world, prompt(1, 3), prompt(2, 3))
    world.command(wire.ClearStorage)
    world.settle()
    assert not world.store
    computed(world, prompt(1, 3))
    assert stored(world, prompt(1, 3)) == 3 and not stored(world, prompt(2, 3))
    give_up_device(world)
    ticks(world)
    give_up_host(world)
    assert not lost(world), "the operator wanted the pages gone"


def test_what_waits_during_a_clear_is_stored_with_all_that_lies_before_it() -> None:
    world = world_with_storage()
    tokens = prompt(1, 8)
    computed(world, tokens[: 4 * PAGE + 1])
    hold(world)
    world.submit(tokens, max_new_tokens=1)
    ticks(world)
    clear = world.command(wire.ClearStorage, deadline_s=60.0)
    ticks(world, 2)
    let_go(world)
    world.settle()
    assert world.answer(clear).success
    computed(world, tokens)
    assert stored(world, tokens) == 8 and not lost(world)
    world.check()
