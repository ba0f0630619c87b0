"""The books of incidents: each time that storage was missed is told once, and costs exactly what it cost."""

from __future__ import annotations

import msgspec
import pytest

from sglang_hicache import wire
from sglang_hicache.cache.incidents import MOST
from sglang_hicache.scheduler.core import SchedulerCore
from tests.ranks import failover
from tests.ranks.backups import computed, prompt
from tests.ranks.test_backup_losses import stores_die
from tests.ranks.test_failure_modes import ATTACH, world_with_storage
from tests.ranks.timed import US_PER_TOKEN, TimedWorld
from tests.ranks.world import PAGE, World, server_config

#: Whole pages of a prompt, which is one token longer.
PAGES = 6
TOKENS = PAGES * PAGE


def incidents(world: World) -> list[wire.Incident]:
    """As every rank tells them."""
    first, *others = (rank.core.status.answer("q").incidents for rank in world.ranks)
    assert all(other == first for other in others)
    return first


def attach(world: World, **fields: object) -> wire.CommandAnswer:
    command = world.command(wire.AttachStorage, **(ATTACH | fields))
    world.settle()
    return world.answer(command)


def detach(world: World) -> None:
    command = world.command(wire.DetachStorage)
    world.settle()
    assert world.answer(command).success


def forget_caches(world: World) -> None:
    """Device and host lose all, so that only storage could help."""
    world.command(wire.FlushCache)
    world.settle()


def stored_world(*numbers: int) -> World:
    """A server whose storage holds some prompts, and nothing else does."""
    world = world_with_storage(device_pages=200, host_pages=200)
    computed(world, *(prompt(number, PAGES) for number in numbers))
    forget_caches(world)
    return world


# ------------------------------------------------------------------------------------------------- outages


def test_a_server_that_lacks_nothing_tells_nothing() -> None:
    world = stored_world(1)
    computed(world, prompt(1, PAGES), prompt(2, PAGES))
    assert incidents(world) == []


def test_an_outage_costs_exactly_what_was_stored() -> None:
    """1. Three prompts are stored. 2. The store dies. 3. Two of them, and one that it never had, are computed.
    4. The third is computed after the next attach, when nobody misses anything any more."""
    world = stored_world(1, 2, 3)
    stores_die(world)
    computed(world, prompt(1, PAGES), prompt(2, PAGES), prompt(9, PAGES))
    (outage,) = incidents(world)
    assert (outage.kind, outage.backend, outage.ended_s_ago) == ("outage", "memory", None)
    assert "the test says so" in outage.cause
    assert (outage.requests, outage.computed_tokens) == (3, 3 * (TOKENS + 1))
    assert outage.reprefilled_tokens == 2 * TOKENS, "of the last one nobody ever knew anything"
    world.store.clear()
    assert attach(world).success
    forget_caches(world)
    computed(world, prompt(3, PAGES))
    (ended,) = incidents(world)
    assert 0 < ended.ended_s_ago < ended.began_s_ago
    assert msgspec.structs.replace(ended, began_s_ago=0, ended_s_ago=None) == msgspec.structs.replace(
        outage, began_s_ago=0
    )


def test_only_what_could_have_been_fetched_counts() -> None:
    """The first pages are on the device, the last were never stored, and what lies behind them is out of reach."""
    world = stored_world(1)
    longer = [*prompt(1, PAGES)[:TOKENS], *prompt(2, 3)]
    computed(world, prompt(1, 2))  # two pages are computed, and on the device
    stores_die(world)
    computed(world, prompt(1, PAGES)[: 2 * PAGE] + longer[2 * PAGE :])
    (outage,) = incidents(world)
    assert outage.reprefilled_tokens == TOKENS - 2 * PAGE
    assert outage.computed_tokens == len(longer) - 2 * PAGE


def test_less_than_is_worth_a_look_up_is_no_loss() -> None:
    world = stored_world(1)
    detach(world)
    attach(world, extra_config_json=f'{{"prefetch_threshold": {TOKENS + PAGE}}}')
    computed(world, prompt(1, PAGES))
    forget_caches(world)
    stores_die(world)
    computed(world, prompt(1, PAGES))
    assert incidents(world)[0].reprefilled_tokens == 0


def test_what_a_look_up_has_found_is_known_too() -> None:
    """Another server has stored it: this one has never written it, and computes it only once the store is gone."""
    store = stored_world(1).store
    world = world_with_storage(store=store)
    computed(world, prompt(1, PAGES))
    forget_caches(world)
    stores_die(world)
    computed(world, prompt(1, PAGES))
    assert incidents(world)[0].reprefilled_tokens == TOKENS


@pytest.mark.parametrize("by", ["clear", "weights", "another store"])
def test_what_the_store_no_longer_has_is_not_missed(by: str) -> None:
    world = stored_world(1)
    if by == "clear":
        world.command(wire.ClearStorage)
    elif by == "weights":
        world.command(wire.UpdateWeights, weights_digest="other")
    else:
        world.command(wire.AttachStorage, **(ATTACH | {"backend": "file"}), switch=True)
    world.settle()
    stores_die(world)
    computed(world, prompt(1, PAGES))
    (outage,) = incidents(world)
    assert (outage.requests, outage.reprefilled_tokens) == (1, 0)


def test_what_the_server_takes_out_by_itself_is_an_outage() -> None:
    world = failover.attached("auto_reconnect", backoff_initial_s=1.0)
    failover.trip(world)
    failover.elapse(world, 0.5)
    (outage,) = incidents(world)
    assert outage.kind == "outage" and "tripped" in outage.cause and outage.ended_s_ago is None
    world.sick.clear()
    failover.until(world, lambda: failover.serving(world) == "primary")
    assert incidents(world)[0].ended_s_ago is not None and len(incidents(world)) == 1


def test_a_switch_is_none() -> None:
    world = stored_world(1)
    assert attach(world, backend="file", switch=True).success
    assert incidents(world) == []


def test_a_detach_is_somebodys_wish_and_ends_what_went_before() -> None:
    world = stored_world(1)
    detach(world)
    computed(world, prompt(1, PAGES))
    assert incidents(world) == []
    attach(world)
    stores_die(world)
    assert [i.ended_s_ago for i in incidents(world)] == [None]
    detach(world)
    assert incidents(world)[0].ended_s_ago is not None, "nobody misses it any more"


# ------------------------------------------------------------------------------------- refusals and cold starts


def test_a_refused_attach_is_told_until_one_succeeds() -> None:
    """1. Detach, to attach with another configuration. 2. It is wrong. 3. What the old store held is missed."""
    world = stored_world(1)
    detach(world)
    assert not attach(world, extra_config_json='{"no_such_key": 1}').success
    assert not attach(world, backend="no such backend").success, "part of the first"
    computed(world, prompt(1, PAGES))
    (refusal,) = incidents(world)
    assert (refusal.kind, refusal.backend, refusal.ended_s_ago) == ("refusal", "memory", None)
    assert "no_such_key" in refusal.cause and refusal.reprefilled_tokens == TOKENS
    attach(world)
    assert incidents(world)[0].ended_s_ago is not None


def test_a_store_that_does_not_open_is_a_refusal_and_one_that_was_given_up_is_none() -> None:
    world = World(0, 2, fault_rate=0.0)
    command = world.command(wire.AttachStorage, **ATTACH)
    failover.step(world)
    world.command(wire.CancelCommand, target=command)
    world.settle()
    assert "cancelled" in world.answer(command).message and incidents(world) == []
    world.sick.add(("memory", None))
    command = world.command(wire.AttachStorage, **ATTACH)
    failover.until(world, lambda: all(command in [a.id for a in rank.answers] for rank in world.ranks))
    assert [i.kind for i in incidents(world)] == ["refusal"]


def test_a_refusal_while_something_is_attached_costs_nobody_anything() -> None:
    world = stored_world(1)
    assert not attach(world, backend="file").success
    assert incidents(world) == []


def test_a_cold_start_ends_with_the_first_attachment() -> None:
    config = server_config(2, device_pages=200)
    config = msgspec.structs.replace(config, storage=msgspec.structs.replace(config.storage, backend="memory"))
    world = World(0, 2, fault_rate=0.0, config=config)
    world.now_us = 1_000_000
    world.submit(prompt(1, PAGES), max_new_tokens=1)
    world.settle()
    (start,) = incidents(world)
    assert (start.kind, start.backend, start.requests) == ("cold_start", "memory", 1)
    assert (start.reprefilled_tokens, start.computed_tokens) == (0, TOKENS + 1), "nobody knows what storage had"
    attach(world)
    assert incidents(world)[0].ended_s_ago is not None


# --------------------------------------------------------------------------------------------------- the books


def test_seconds_are_those_of_the_measured_rate() -> None:
    world = TimedWorld()
    texts = [world.prompt() for _ in range(3)]
    for text in texts:
        world.ask(text)
        world.rest(0.1)
    forget_caches(world)
    stores_die(world)
    world.ask(texts[0])
    (outage,) = incidents(world)
    assert outage.reprefilled_tokens == (len(texts[0]) - 1) // PAGE * PAGE
    assert outage.reprefill_s == pytest.approx(outage.reprefilled_tokens * US_PER_TOKEN / 1e6, rel=0.01)


def test_the_latest_are_kept_and_counters_know_of_all() -> None:
    core = SchedulerCore(server_config(), 0)
    books = core.tiers.incidents
    for number in range(MOST + 20):
        books.attach_failed("file", f"no. {number}", now_us=number)
        books.given_up(now_us=number)
    kept = books.snapshot(now_us=1_000_000)
    assert [entry.number for entry in kept] == list(range(21, MOST + 21))
    assert books.counters["incidents_refusal"] == MOST + 20


def test_health_probes_are_nobodys_loss() -> None:
    world = stored_world(1)
    stores_die(world)
    sampling = wire.SamplingParams(max_new_tokens=1, temperature=0.0)
    world.leader.add_request(wire.NewRequest(rid="HEALTH_CHECK_1", token_ids=[5, 5, 5], sampling=sampling))
    world.submitted["HEALTH_CHECK_1"] = wire.NewRequest(rid="HEALTH_CHECK_1", token_ids=[5, 5, 5], sampling=sampling)
    world.settle()
    assert incidents(world)[0].requests == 0
