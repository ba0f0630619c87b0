"""Whoever attaches or detaches by a command has the last word, whatever the server is about to do by itself."""

from __future__ import annotations

import pytest

from sglang_hicache import wire
from sglang_hicache.cache.breaker import Trust
from sglang_hicache.storage.attachment_events import State
from tests.ranks.failover import (
    A,
    ask,
    attach,
    attached,
    breaker,
    elapse,
    fail_three_times,
    failover,
    finish,
    serving,
    stalled,
    state,
    step,
    trip,
    until,
)
from tests.ranks.world import World, server_config


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


def test_a_store_whose_canary_was_good_while_the_weights_changed_is_attached_when_they_have() -> None:
    """The end of the update is the last thing that happens: nobody else wakes the leader."""
    world = world_at("waiting")
    world.sick.clear()
    until(world, lambda: bool(world.ranks[0].canaries))
    world.command(wire.UpdateWeights, weights_digest="b" * 64, model_path="", deadline_s=30.0)
    elapse(world, 5)
    assert not world.ranks[0].canaries and serving(world) == ""
    for rank in world.ranks:
        rank.end_staging()
    until(world, lambda: serving(world) == "primary", limit=200)
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
