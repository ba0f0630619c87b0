"""A store that is sick takes itself out on all ranks in one tick, and comes back, or another one does, by itself."""

from __future__ import annotations

import pytest

from sglang_hicache.cache.breaker import Trust
from sglang_hicache.storage.attachment_events import State
from tests.ranks.failover import (
    A,
    B,
    S,
    ask,
    attached,
    breaker,
    elapse,
    fail_three_times,
    failover,
    finish,
    lose,
    news,
    serving,
    stalled,
    state,
    status,
    step,
    trip,
    until,
)
from tests.ranks.world import PAGE, World

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
    for _ in range(12):
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
