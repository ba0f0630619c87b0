"""Attaching to a warm server: what device and host hold already goes out in the background, and holds up nothing.

Beside it: how much of the host a slow store may lock, and what the status says of all this.
"""

from __future__ import annotations

import re

import msgspec
import pytest

from sglang_hicache import wire
from sglang_hicache.cache.backup_pace import LOCKED_SHARE, MAX_UPLOADS, MAX_WRITES, Limits
from sglang_hicache.cache.page import page_keys
from sglang_hicache.config import ServerConfig
from tests.ranks.backups import (
    ATTACH,
    attach,
    books,
    computed,
    give_up_device,
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
from tests.ranks.reads import ATTACH as FETCHING
from tests.ranks.world import PAGE, World, server_config


def config(device_pages: int = 200, host_pages: int = 200, rate_mib: float = 1000.0, **cache: object) -> ServerConfig:
    """A page counts as 1 MiB, so the rate is that of pages."""
    made = server_config(2, device_pages, host_pages, **cache)
    return msgspec.structs.replace(made, storage=msgspec.structs.replace(made.storage, upload_rate_mib=rate_mib))


def warm_server(prompts: int = 6, **settings: object) -> World:
    """A server that has served for a while without a store."""
    world = World(0, 2, fault_rate=0.0, config=config(**settings))
    for i in range(prompts):
        computed(world, prompt(i, 6)[: 3 * PAGE + 1], prompt(i, 6))
    return world


def why(world: World) -> str:
    first, *others = (rank.core.status.answer("q").why for rank in world.ranks)
    assert all(other == first for other in others)
    return "\n".join(first)


def test_attaching_to_a_warm_server_uploads_all_of_it_parents_first() -> None:
    world = warm_server()
    attach(world)
    world.check()
    assert [stored(world, prompt(i, 6)) for i in range(6)] == [6] * 6
    order = {key: at for at, (rank, key) in enumerate(world.store) if rank == 0}
    for i in range(6):
        places = [order[key] for key in page_keys(prompt(i, 6), PAGE)[:6]]
        assert places == sorted(places), "a child was written before its parent"
    assert books(world).counters["backuped"] == 36 * PAGE and not lost(world)


def test_attaching_twice_uploads_to_the_second_store_too() -> None:
    world = warm_server()
    attach(world)
    world.command(wire.DetachStorage)
    world.settle()
    world.store.clear()  # another store
    attach(world)
    assert [stored(world, prompt(i, 6)) for i in range(6)] == [6] * 6
    world.store.clear()
    attach(world)  # the same again: only policies may change, and nothing is written twice
    assert not world.store
    world.check()


def test_an_upload_keeps_to_its_rate_and_sleeps_in_between() -> None:
    world = warm_server(rate_mib=1.0)
    began_us, plans = world.now_us, len(world.plans)
    attach(world)
    assert 30e6 < world.now_us - began_us < 45e6, "36 pages at one a second"
    assert len(world.plans) - plans < 200
    assert stored(world, prompt(5, 6)) == 6


def test_an_upload_can_be_switched_off() -> None:
    world = warm_server(rate_mib=0)
    attach(world)
    assert not world.store and not books(world).counters["offered"]
    computed(world, prompt(3, 6))
    assert stored(world, prompt(3, 6)) == 6, "what is touched is stored all the same"


def test_fresh_backups_pass_an_upload() -> None:
    world = warm_server(rate_mib=1.0)
    world.command(wire.AttachStorage, **ATTACH)
    for _ in range(6):
        ticks(world, 2)
        for rank in world.ranks:
            for process in rank.storage.values():
                process.step()
    assert world.ranks[0].core.tiers.backup.uploads_left() > 20
    world.submit(prompt(90, 4), max_new_tokens=1)
    world.submit(prompt(5, 6), max_new_tokens=1)  # warm: its turn comes now, with its parents'
    for _ in range(20):
        ticks(world, 1)
        for rank in world.ranks:
            for _ in range(20):
                rank.storage[1].step()
    assert stored(world, prompt(90, 4)) == 4 and stored(world, prompt(5, 6)) == 6
    assert world.ranks[0].core.tiers.backup.uploads_left() > 10
    assert "upload of what was cached before the attach" in why(world)


def test_fm54_an_upload_does_not_stand_in_the_way_of_a_detach() -> None:
    world = warm_server(rate_mib=1.0)
    world.command(wire.AttachStorage, **ATTACH)
    ticks(world, 3)
    for rank in world.ranks:
        rank.storage[1].step()
    ticks(world, 3)
    tiers = world.ranks[0].core.tiers
    assert tiers.ops.counts() == {"upload": 1} and tiers.backup.uploads_left() > 20
    assert not tiers.blockers()
    command = world.command(wire.DetachStorage)
    world.settle()
    assert world.answer(command).success
    assert list(lost(world)) == ["detached"]
    counters = books(world).counters
    assert counters["offered"] == counters["backuped"] + lost(world)["detached"]
    world.check()


def test_what_is_on_the_device_only_is_copied_first_while_the_host_has_room() -> None:
    """A server that ran with write_back has copied nothing; one page of room is left out of twenty."""
    world = warm_server(prompts=3, host_pages=10, write_policy="write_back")
    attach(world, write_policy="write_through")
    world.check()
    assert sum(stored(world, prompt(i, 6)) for i in range(3)) == 9, "three nodes of three pages fit"
    assert is_prefix_closed(world)
    host = world.ranks[0].core.tiers.controller.host
    assert host.free_count == 1 and not lost(world), "nothing was displaced, and nothing that was not offered is lost"


def test_under_write_back_what_is_on_the_device_only_stays_there() -> None:
    world = warm_server(write_policy="write_back")
    attach(world)
    assert not world.store and not lost(world)
    give_up_device(world)
    ticks(world)
    world.settle()
    assert stored(world, prompt(0, 6)) == 6, "it goes out when it is demoted"


def test_uploads_and_backups_keep_to_the_writes_that_may_run() -> None:
    world = warm_server(prompts=20, device_pages=400, host_pages=400)
    world.command(wire.AttachStorage, **ATTACH)
    ticks(world, 3)
    for rank in world.ranks:
        rank.storage[1].step()
    hold(world)
    ticks(world, 60)
    counts = world.ranks[0].core.tiers.ops.counts()
    assert counts == {"upload": MAX_UPLOADS}
    for i in range(20):
        world.submit(prompt(50 + i, 1), max_new_tokens=1)
    ticks(world, 60)
    counts = world.ranks[0].core.tiers.ops.counts()
    assert counts == {"upload": MAX_UPLOADS, "write": MAX_WRITES}
    let_go(world)
    world.settle()
    world.check()


# --------------------------------------------------------------------------------------- back-pressure


def test_a_store_that_stands_still_locks_a_bounded_share_of_the_host() -> None:
    """Requests come and go meanwhile, are copied to the host, and push out what waits there."""
    world = world_with_storage(device_pages=60, host_pages=40)
    hold(world)
    tree = world.ranks[0].core.tiers.controller.tree
    for i in range(30):
        world.submit(prompt(i, 3), max_new_tokens=1)
        ticks(world, 6)
        locked = (tree.host_tokens - tree.host_tokens_evictable) // PAGE
        assert locked <= 40 * LOCKED_SHARE
    assert sum(o.finish is not None for o in world.ranks[0].outputs) == 30, "no prefill waits for the store"
    host = world.ranks[0].core.tiers.controller.counters
    assert host["dropped_host_pressure"] == 0, "every copy found room"
    told = re.search(r"with the next one (\d+) host pages are in use, and at most (\d+) may be", why(world))
    assert told is not None and int(told[1]) > int(told[2]) <= 40 * LOCKED_SHARE
    let_go(world)
    world.settle()
    world.check()


def test_a_long_prefix_is_written_in_pieces_though_it_locks_more_than_its_share() -> None:
    """Every write locks all that lies before it: the last of a prompt that fills the host locks all of it."""
    world = world_with_storage(device_pages=60, host_pages=40)
    computed(world, prompt(1, 38))
    world.check()
    assert stored(world, prompt(1, 38)) == 38


@pytest.mark.parametrize(("token_bytes", "pages"), [(0, 64), (1 << 20, 1), (128 << 10, 8), (1, 250)])
def test_the_size_of_one_write(token_bytes: int, pages: int) -> None:
    """64 MiB, 256 pages or a quarter of the host, whichever is least, and one page at least."""
    made = config(host_pages=1000)
    pool = msgspec.structs.replace(made.pool, page_size=64, host_tokens=64_000, token_bytes=token_bytes)
    assert Limits.of(msgspec.structs.replace(made, pool=pool)).op_pages == pages


# -------------------------------------------------------------------------------------------- the status


def test_fm52_the_status_says_that_the_policy_waits_for_a_second_hit() -> None:
    """Nothing was stored at the first pass, and storage looked broken."""
    world = world_with_storage(write_policy="write_through_selective")
    computed(world, prompt(1, 6))
    assert not world.store
    assert "write policy write_through_selective: a page is copied to the host, and stored, at hit 2" in why(world)
    assert "passed over so far" in why(world) and "nothing waits to be written" in why(world)
    computed(world, prompt(1, 6))
    assert stored(world, prompt(1, 6)) == 6


def test_fm52_the_status_says_what_is_too_short_to_be_fetched() -> None:
    world = world_with_storage()
    computed(world, prompt(1, 6))
    assert "fewer than 4000 tokens in a row (prefetch_threshold) are not fetched: 24 tokens so far" in why(world)


def test_the_status_says_that_the_store_is_full_and_when_it_is_tried_again() -> None:
    world = world_with_storage()
    refuse_writes(world, lambda *_: "no_space")
    computed(world, prompt(1, 6))
    assert "the store has been full for " in why(world) and "one write tries again in " in why(world)


def test_the_status_says_that_writes_are_tried_again() -> None:
    world = world_with_storage()
    refuse_writes(world, lambda *_: "io")
    world.submit(prompt(1, 6), max_new_tokens=1)
    for _ in range(10):
        ticks(world, 2)
        for rank in world.ranks:
            rank.storage[1].step()
    assert "1 nodes wait for another attempt, the first in 0." in why(world)


def test_the_status_says_how_many_writes_run() -> None:
    world = world_with_storage()
    hold(world)
    for i in range(20):
        world.submit(prompt(i, 1), max_new_tokens=1)
    ticks(world, 40)
    assert "4 backups wait: 16 writes are under way, the most that may be" in why(world)


def test_the_status_blames_no_lock_for_a_backup_that_starts_in_a_moment() -> None:
    world = world_with_storage()
    for rank in world.ranks:
        rank.core.tiers.backup.is_held = True
    world.submit(prompt(1, 6), max_new_tokens=1)
    ticks(world, 12)
    for rank in world.ranks:
        rank.core.tiers.backup.is_held = False
    assert world.ranks[0].core.tiers.backup.line.fresh.line and "host pages" not in why(world)


def test_the_status_of_a_server_without_a_store() -> None:
    world = World(0, 2, fault_rate=0.0)
    assert why(world) == "storage is detached: nothing is written or fetched"


def test_the_status_of_a_server_that_has_lost_its_store() -> None:
    world = world_with_storage()
    world.ranks[1].storage[1].tell("lost", "segfault")
    world.settle()
    assert why(world).endswith("; last_error says what failed last, and an attach starts it again")


def test_the_status_counts_what_was_lost_by_reason() -> None:
    world = world_with_storage()
    refuse_writes(world, lambda *_: "io")
    computed(world, prompt(1, 6))
    assert world.ranks[0].core.status.answer("q").lost_tokens == {"backend_error": 24}


def test_the_status_says_that_prefetches_have_their_share_of_the_host() -> None:
    world = World(0, 2, fault_rate=0.0, config=config(host_pages=12))
    attach(world, **FETCHING, prefetch_policy="wait_complete")
    hold(world)
    world.submit(prompt(1, 8))
    ticks(world, 3)
    assert "prefetches hold 6 of 12 host pages" in why(world)
    let_go(world)
    world.settle()
    world.check()
