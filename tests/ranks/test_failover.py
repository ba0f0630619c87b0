"""A store that is sick takes itself out on all ranks in one tick, and comes back, or another one does, by itself."""

from __future__ import annotations

import functools

import pytest

from sglang_hicache import wire
from sglang_hicache.cache.breaker import Trust
from sglang_hicache.storage.attachment_events import State
from tests.ranks.failover import (
    A,
    B,
    S,
    ask,
    attach,
    attached,
    breaker,
    elapse,
    failover,
    finish,
    news,
    serving,
    state,
    step,
    trip,
    until,
)
from tests.ranks.world import PAGE, World, server_config

LEVELS = ("auto_detach", "auto_reconnect", "failover")


# ------------------------------------------------------------------------------------------------- taken out


@pytest.mark.parametrize("level", LEVELS)
def test_a_store_that_fails_is_taken_out_on_all_ranks_in_one_tick(level: str) -> None:
    world = attached(level, A, ranks=3)
    trip(world)
    for rank in world.ranks:
        slot = rank.core.tiers.slot
        assert slot.gate() is None and slot.last_error.startswith("tripped_errors: 3 "), slot.last_error
    assert breaker(world).trips == 1
    assert news(world) == [("command c0", "", "memory"), ("breaker", "memory", "")]
    assert "3 look-ups in a row failed, the last with 'io'" in breaker(world).reason
    finish(world)


def test_a_failure_of_one_rank_is_enough() -> None:
    world = attached("auto_detach")
    world.sick.add(("memory", 1))
    until_tripped(world)
    finish(world)


def until_tripped(world: World) -> None:
    for _ in range(200):
        if failover(world).breaker.trips:
            return
        ask(world)
        step(world)
    raise AssertionError("it never tripped")


def test_requests_that_wait_for_a_store_that_is_taken_out_go_on_within_the_deadline() -> None:
    """1. A read hangs, and writes fail meanwhile. 2. The store is taken out. 3. The request of the read runs on what
    has arrived, and the process is killed when the force deadline has passed."""
    world = attached("auto_detach")
    prompt = list(range(100, 100 + 6 * PAGE))
    world.submit(prompt, max_new_tokens=1)
    until(world, lambda: bool(world.store))
    until(world, lambda: not world.ranks[0].core.commands.blockers())
    for rank in world.ranks:
        rank.core.tiers.flush()
    rid = world.submit([*prompt, 7, 7], max_new_tokens=1)
    step(world)
    for process in (rank.storage[1] for rank in world.ranks):
        process.state = "held"
    asked_us = world.now_us
    fail_three_times(world)
    until(world, lambda: any(o.rid == rid and o.finish for o in world.ranks[0].outputs))
    assert world.now_us - asked_us < 2 * S
    until(world, lambda: world.ranks[0].core.tiers.slot.face() is State.DETACHED)
    assert world.now_us - asked_us < 2 * S
    assert world.ranks[0].core.tiers.slot.last_error.startswith("tripped_errors: ")
    finish(world)


@pytest.mark.parametrize("reason", ["no_space", "miss", "revoked", "queue_full", "gone", "other_key"])
def test_what_is_no_failure_trips_nothing(reason: str) -> None:
    world = attached("auto_detach", consecutive_errors=1, min_ops=1)
    for rank in world.ranks:
        rank.storage[1].refuses = lambda _message, _at: reason
    for _ in range(25):
        ask(world)
        step(world)
    assert state(world) is Trust.CLOSED
    for rank in world.ranks:
        del rank.storage[1].refuses
    finish(world)


def test_at_level_off_nothing_is_taken_out_and_a_process_that_ends_stays_away() -> None:
    world = attached("off")
    world.sick.add(("memory", None))
    for _ in range(60):
        ask(world)
        step(world)
    assert serving(world) == "primary" and state(world) is Trust.OFF
    lose(world)
    finish(world)
    assert world.ranks[0].core.tiers.slot.gate() is None and breaker(world).trips == 0
    assert news(world)[-1] == ("breaker", "memory", "")
    assert world.ranks[0].news[-1].detail.startswith("crashed: ")


def fail_three_times(world: World) -> None:
    """On all ranks in one tick, whatever else the store does."""
    for rank in world.ranks:
        for row in rank.core.tiers.evidence._watch.rows.values():
            row.failures = 3
    ask(world)


def stalled(world: World) -> None:
    """What opens does not come to an end on rank 1."""
    rank = world.ranks[1]
    rank.storage[rank.core.tiers.slot.last_epoch].state = "stalled"


def lose(world: World, rank: int = 0) -> None:
    """The storage process of one rank dies."""
    epoch = world.ranks[rank].core.tiers.slot.gate()
    process = world.ranks[rank].storage[epoch]
    process.tell("lost", "crashed: it has ended by itself")
    process.end()
    until(world, lambda: world.ranks[0].core.tiers.slot.gate() != epoch)


# ------------------------------------------------------------------------------------------------ comes back


def test_a_process_that_dies_comes_back_after_a_good_canary() -> None:
    world = attached("auto_reconnect")
    lose(world, 1)
    assert state(world) is Trust.OPEN and breaker(world).reason.startswith("crashed: ")
    assert until(world, lambda: serving(world) == "primary") < 1.0
    assert [cause for cause, *_ in news(world)] == ["command c0", "breaker", "reconnect"]
    assert state(world) is Trust.CLOSED
    finish(world)


def test_level_auto_detach_brings_nothing_back() -> None:
    world = attached("auto_detach")
    trip(world)
    world.sick.clear()
    elapse(world, 20)
    assert state(world) is Trust.OPEN and not world.ranks[0].canaries
    assert world.ranks[0].core.tiers.slot.face() is State.DETACHED
    assert breaker(world).next_try_s is None
    (why,) = status(world).why
    assert why.startswith("storage is out since 2") and "it stays out until a command attaches it" in why
    finish(world)


def status(world: World) -> wire.StatusAnswer:
    return world.ranks[0].core.status.answer("q", world.now_us)


def test_one_rank_whose_canary_is_bad_keeps_the_store_out() -> None:
    world = attached("auto_reconnect", ranks=3)
    trip(world)
    world.sick = {("memory", 2)}
    elapse(world, 12)
    assert state(world) in (Trust.OPEN, Trust.HALF_OPEN) and serving(world) == ""
    assert world.ranks[0].core.tiers.slot.last_epoch == 1, "it was attached on the word of some ranks"
    world.sick.clear()
    assert until(world, lambda: serving(world) == "primary") <= 4.1
    finish(world)


def test_a_canary_that_never_ends_is_bad_at_its_deadline() -> None:
    world = attached("auto_reconnect")
    trip(world)
    until(world, lambda: bool(world.ranks[0].canaries))
    for rank in world.ranks:
        rank.end_canary = lambda: None
    began_us = world.now_us
    until(world, lambda: state(world) is Trust.OPEN)
    assert S <= world.now_us - began_us <= 1.1 * S
    for rank in world.ranks:
        rank.canaries.clear()
        del rank.end_canary
    world.sick.clear()
    until(world, lambda: serving(world) == "primary")
    finish(world)


def test_fm63_after_a_stall_of_50_s_it_is_back_within_the_longest_wait_and_the_time_without_it_is_told() -> None:
    world = attached("auto_reconnect", backoff_initial_s=1, backoff_max_s=60, healthy_s=30, canary_timeout_s=5)
    elapse(world, 10)
    trip(world)
    tripped_us = world.now_us
    elapse(world, 50)
    assert serving(world) == "" and status(world).why[0].startswith("storage is out since 50.")
    world.sick.clear()
    assert until(world, lambda: serving(world) == "primary") <= 60
    told = breaker(world)
    assert told.total_s["open"] + told.total_s["half_open"] == pytest.approx((world.now_us - tripped_us) / S, abs=0.5)
    assert told.total_s["closed"] >= 10 and told.state == "closed" and told.trips == 1
    ask(world)
    finish(world)
    assert world.store, "what is attached is not used"


def test_a_store_that_fails_again_and_again_is_left_alone_longer_and_longer() -> None:
    """It is well until it has traffic: the server's storage changes a handful of times until the longest wait is
    reached, and then twice in such a time."""
    world = attached("auto_reconnect", backoff_initial_s=0.5, backoff_max_s=8, healthy_s=30)
    world.check_each_tick = False
    times = []
    for _ in range(8):
        trip(world)
        times.append(world.now_us)
        world.sick.clear()
        until(world, lambda: serving(world) == "primary")
    waits = [(after - before) / S for before, after in zip(times, times[1:])]
    assert all(wait >= least for wait, least in zip(waits, (0.5, 1, 2, 4, 8, 8, 8))), waits
    assert waits[0] < 2
    finish(world)


def test_a_store_that_was_well_for_long_enough_is_trusted_again() -> None:
    world = attached("auto_reconnect")
    for _ in range(4):
        trip(world)
        world.sick.clear()
        until(world, lambda: serving(world) == "primary")
    assert failover(world)._stores.primary.backoff.wait_us == 4 * S
    until(world, lambda: world.now_us >= failover(world)._stores._since_us + 2 * S or bool(ask(world)))
    trip(world)
    world.sick.clear()
    assert until(world, lambda: serving(world) == "primary") < 2
    finish(world)


# --------------------------------------------------------------------------------------------------- standbys


def test_a_standby_takes_over_and_the_primary_comes_back_without_a_gap() -> None:
    world = attached("failover", A)
    trip(world)
    assert until(world, lambda: serving(world) == "standby 1") < 1
    ask(world)
    elapse(world, 3)
    assert world.stores["file/a"], "the standby was given nothing"
    world.sick.clear()
    until(world, lambda: serving(world) == "primary")
    causes = news(world)
    assert causes[1:] == [("breaker", "memory", ""), ("failover", "", "file"), ("failback", "file", "memory")]
    told = breaker(world)
    assert (told.failovers, told.failbacks, told.trips) == (1, 1, 1)
    finish(world)


def test_the_primary_is_taken_back_only_after_it_was_well_for_a_while() -> None:
    world = attached("failover", A)
    trip(world)
    until(world, lambda: serving(world) == "standby 1")
    elapse(world, 5)
    world.sick.clear()
    until(world, lambda: failover(world)._stores.primary.good_since_us is not None)
    good_us = world.now_us
    elapse(world, 1)
    world.sick.add(("memory", 0))  # and falls sick again before the time is over
    until(world, lambda: failover(world)._stores.primary.good_since_us is None)
    world.sick.clear()
    until(world, lambda: serving(world) == "primary")
    assert world.now_us - good_us > 3 * S
    finish(world)


def test_every_store_has_its_turn_the_primary_first() -> None:
    world = attached("failover", A, B)
    trip(world)
    world.sick.add(("file/a", None))
    until(world, lambda: serving(world) == "standby 2")
    trip(world)  # now all three are sick
    elapse(world, 10)
    assert serving(world) == ""
    world.sick.clear()
    until(world, lambda: serving(world) != "")
    assert serving(world) in ("primary", "standby 1", "standby 2")
    until(world, lambda: serving(world) == "primary")
    finish(world)


def test_a_standby_that_dies_while_the_primary_is_on_its_way_back() -> None:
    world = attached("failover", A)
    trip(world)
    until(world, lambda: serving(world) == "standby 1")
    world.sick.clear()
    until(world, lambda: world.ranks[0].core.tiers.slot.candidate is not None)
    lose(world)
    until(world, lambda: serving(world) == "primary")
    finish(world)


def test_a_standby_that_falls_sick_while_the_primary_is_on_its_way_back() -> None:
    world = attached("failover", A, consecutive_errors=1)
    trip(world)
    until(world, lambda: serving(world) == "standby 1")
    world.sick.clear()
    until(world, lambda: world.ranks[0].core.tiers.slot.candidate is not None)
    stalled(world)
    fail_three_times(world)
    step(world)
    assert world.ranks[0].core.tiers.slot.gate() is None
    until(world, lambda: serving(world) == "primary")
    finish(world)


def test_two_stores_that_flap_do_not_make_the_server_flap() -> None:
    """Both are sick for half of the time, in turns of 3 s: after a minute each change waits for the longest time."""
    world = attached("failover", A, backoff_max_s=16, healthy_s=30)
    world.check_each_tick = False
    changes = []
    for half in range(40):
        world.sick = {("memory", None)} if half % 2 else {("file/a", None)}
        end_us = world.now_us + 3 * S
        while world.now_us < end_us:
            ask(world)
            step(world)
            world.now_us = min(world.now_us + 200_000, end_us) if world.now_us < end_us else world.now_us
        changes.append(len(world.ranks[0].news))
    first, last = changes[19], changes[39] - changes[19]
    assert last <= first and last <= 2 * 2 * (60 / 16 + 1), changes
    finish(world)


# -------------------------------------------------------------------------------------------------- commands


def moments() -> dict[str, str]:
    return {
        "draining": "auto_reconnect", "waiting": "auto_reconnect", "tried": "auto_reconnect",
        "opening": "auto_reconnect", "serving again": "auto_reconnect", "standby serves": "failover",
        "on the way back": "failover",
    }  # fmt: skip


def world_at(moment: str) -> World:
    """A server in the middle of an automatic change."""
    world = attached(moments()[moment], A)
    slot = world.ranks[0].core.tiers.slot
    if moment == "draining":
        ask(world)
        step(world)
        for rank in world.ranks:
            rank.storage[1].state = "held"
        fail_three_times(world)
        until(world, lambda: slot.face() is State.DRAINING)
        return world
    trip(world)
    world.sick = {("memory", None)} if moment in ("waiting", "standby serves") else set()
    holds = {
        "waiting": lambda: slot.face() is State.DETACHED and state(world) is Trust.OPEN,
        "tried": lambda: bool(world.ranks[0].canaries),
        "opening": lambda: slot.face() is State.ATTACHING,
        "serving again": lambda: serving(world) == "primary",
        "standby serves": lambda: serving(world) == "standby 1",
        "on the way back": lambda: serving(world) == "standby 1" and slot.candidate is not None,
    }
    until(world, holds[moment])
    if moment in ("opening", "on the way back"):
        stalled(world)
    return world


@pytest.mark.parametrize("moment", moments())
def test_after_a_detach_by_a_command_nothing_comes_back(moment: str) -> None:
    world = world_at(moment)
    command = world.command(wire.DetachStorage, mode="force", deadline_s=0.5)
    until(world, lambda: all(any(a.id == command for a in rank.answers) for rank in world.ranks))
    assert world.answer(command).success
    world.sick.clear()
    elapse(world, 20)
    assert serving(world) == "" and state(world) is Trust.OFF and not world.ranks[0].canaries
    assert breaker(world).next_try_s is None
    finish(world)


@pytest.mark.parametrize("moment", moments())
def test_an_attach_by_a_command_takes_over_or_is_told_to_wait(moment: str) -> None:
    world = world_at(moment)
    command = world.command(
        wire.AttachStorage, backend="file", extra_config_json='{"file_storage_path": "/mine"}', mode="drain",
        switch=True,
    )  # fmt: skip
    until(world, lambda: all(any(a.id == command for a in rank.answers) for rank in world.ranks))
    answer = world.answer(command)
    is_busy = moment in ("draining", "opening", "on the way back")
    assert answer.success is not is_busy, answer
    if is_busy:
        assert "Another change of the storage is under way: the server " in answer.message
        assert " by itself, and storage is " in answer.message
        for process in world.ranks[1].storage.values():
            process.state = "opening" if process.state == "stalled" else process.state
    else:
        slot = world.ranks[0].core.tiers.slot
        assert serving(world) == "primary" and slot.serving() == "file"
        world.sick.clear()
        elapse(world, 20)
        assert slot.serving() == "file", "the server went back to what nobody wants"
        assert breaker(world).level == "off"
    finish(world)


def test_an_attach_by_a_command_that_fails_changes_nothing() -> None:
    world = world_at("waiting")
    world.sick.add(("file/mine", None))
    command = world.command(
        wire.AttachStorage, backend="file", extra_config_json='{"file_storage_path": "/mine"}', mode="drain"
    )
    until(world, lambda: all(any(a.id == command for a in rank.answers) for rank in world.ranks))
    assert not world.answer(command).success
    world.sick.clear()
    until(world, lambda: serving(world) == "primary")
    assert world.ranks[0].core.tiers.slot.backend == "memory"
    finish(world)


def test_nothing_is_attached_while_the_weights_change() -> None:
    world = world_at("waiting")
    command = world.command(wire.UpdateWeights, weights_digest="b" * 64, model_path="", deadline_s=30.0)
    step(world)
    assert failover(world).next_deadline_us() is None
    world.sick.clear()
    elapse(world, 10)
    assert serving(world) == "" and not world.ranks[0].canaries
    for rank in world.ranks:
        rank.end_staging()
    until(world, lambda: serving(world) == "primary")
    assert world.answer(command).success
    finish(world)


def test_the_end_of_the_server_ends_it() -> None:
    world = world_at("waiting")
    world.command(wire.DetachStorage, flush_timeout_s=0.1, deadline_s=1.0)
    world.sick.clear()
    elapse(world, 10)
    assert serving(world) == "" and state(world) is Trust.OFF
    finish(world)


# ------------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("level", ["off", "auto_detach", "auto_reconnect", "failover"])
def test_a_store_that_is_not_there_at_the_start_is_attached_when_it_comes(level: str) -> None:
    world = World(0, 2, fault_rate=0.0, config=server_config(2, device_pages=200, host_pages=200))
    world.sick = {("memory", 1), ("file/a", None)}
    command = attach(world, level, A, fields={"keeps_trying": True})
    elapse(world, 6)
    assert not world.answer(command).success and state(world) in (Trust.OPEN, Trust.HALF_OPEN)
    world.sick.clear()
    until(world, lambda: serving(world) == "primary")
    assert state(world) is (Trust.OFF if level == "off" else Trust.CLOSED)
    ask(world)
    finish(world)
    assert world.store


def test_without_the_wish_a_failed_start_is_final() -> None:
    world = World(0, 2, fault_rate=0.0, config=server_config(2))
    world.sick = {("memory", None)}
    attach(world, "auto_reconnect")
    elapse(world, 6)
    world.sick.clear()
    elapse(world, 20)
    assert serving(world) == "" and state(world) is Trust.OFF
    finish(world)


def test_a_start_that_an_operator_gives_up_is_not_tried_again() -> None:
    world = World(0, 2, fault_rate=0.0, config=server_config(2))
    attach(world, "auto_reconnect", fields={"keeps_trying": True})
    step(world)
    world.command(wire.DetachStorage, mode="force", deadline_s=1.0)
    elapse(world, 20)
    assert serving(world) == "" and state(world) is Trust.OFF
    finish(world)


# ------------------------------------------------------------------------------------------------ what is told


def test_the_status_says_what_goes_on() -> None:
    world = attached("failover", A)
    world.sick.add(("file/a", None))
    trip(world)
    until(world, lambda: state(world) is Trust.OPEN)
    (why,) = status(world).why
    assert why.startswith("storage is out since 0.") and "tripped_errors: 3 look-ups" in why
    assert "; next try in 0." in why
    until(world, lambda: state(world) is Trust.HALF_OPEN)
    assert status(world).why[0].endswith("; a store is being tried, and attached if it is well")
    world.sick.discard(("file/a", None))
    until(world, lambda: serving(world) == "standby 1")
    assert any("standby 1 serves in the place of the primary, which is " in why for why in status(world).why)
    assert status(world).breaker.serving == "standby 1"
    finish(world)


def test_the_log_has_a_line_for_each_thing_that_changed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="sglang_hicache.scheduler.failover")
    world = attached("failover", A)
    trip(world)
    until(world, lambda: serving(world) == "standby 1")
    world.sick.clear()
    until(world, lambda: serving(world) == "primary")
    lines = [r.getMessage() for r in caplog.records if r.name == "sglang_hicache.scheduler.failover"]
    assert lines[0].startswith("primary (memory) is taken out, and left alone for 0.5 s at least: tripped_errors: ")
    assert lines[1] == "standby 1 (file) serves: failover"
    assert lines[-1] == "primary (memory) serves: failback"
    assert lines[-2].startswith("primary (memory) is well again")
    assert len(lines) <= 5, "a line for each canary would fill the log of a store that is out for a night"


# --------------------------------------------------------------------------------------------------- anything


HASTY = {"min_ops": 4, "window_s": 0.5, "backoff_initial_s": 0.02, "backoff_max_s": 0.2, "healthy_s": 0.3}


@functools.cache
def life(seed: int, steps: int) -> World:
    """Requests, commands, and stores that fall sick and get well, at random moments."""
    ranks, level = 2 + seed % 2, ("off", "auto_detach", "auto_reconnect", "failover")[seed % 4]
    world = World(seed, ranks, fault_rate=0.002, config=server_config(ranks, device_pages=60, host_pages=80))
    chance = world.random
    names = [(name, rank) for name in ("memory", "file/a", "file/b") for rank in (None, 0, 1)]
    world.check_each_tick = seed % 4 == 1
    attach(world, level, A, B, **HASTY)
    for _ in range(steps):
        draw = chance.random()
        if draw < 0.05:
            world.submit(world.some_tokens())
        elif draw < 0.054:
            sick = chance.choice(names)
            world.sick ^= {sick}
        elif draw < 0.055:
            world.command(wire.DetachStorage, mode=chance.choice(("idle", "drain", "force")), deadline_s=0.3)
        elif draw < 0.0565:
            fields = {"switch": chance.random() < 0.5, "keeps_trying": chance.random() < 0.5}
            attach(world, chance.choice(LEVELS), A, B, fields=fields, **HASTY)
        elif draw < 0.057:
            world.command(wire.FlushCache, timeout_s=0.2)
        elif draw < 0.0573:
            world.command(wire.UpdateWeights, weights_digest=f"{chance.randrange(3)}" * 64)
        for _ in world.ranks:
            world.happen()
    world.settle()
    world.check()
    return world


SEEDS, STEPS = (2, 3, 5, 6, 7, 11), 900


@pytest.mark.parametrize("seed", SEEDS)
def test_sick_stores_and_commands_at_random_moments_part_no_ranks(seed: int) -> None:
    first, *others = (rank.news for rank in life(seed, STEPS).ranks)
    assert all(other == first for other in others)


def test_random_lives_reach_what_they_are_meant_to_test() -> None:
    """The same lives: a world in which no store ever came back would prove nothing."""
    worlds = [life(seed, STEPS) for seed in SEEDS]
    causes = {cause.split()[0] for world in worlds for cause, *_ in news(world)}
    assert causes == {"command", "breaker", "reconnect", "failover", "failback"}
    assert sum(failover(world).breaker.trips for world in worlds) > 3


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 140))
def test_sick_stores_and_commands_at_random_moments_long(seed: int) -> None:
    life(seed, steps=6000)
