"""New weights under load: all ranks or none, in one tick, and no page ever under the name of other weights.

The played worker writes its weights into every page and refuses to compute on a page of others; the played storage
refuses to store one.  So a page that outlives its weights on any tier, or that is stored under the other name, fails
these tests as wrong bytes.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import pytest

from sglang_hicache import wire
from sglang_hicache.cache.tiers import Tiers
from sglang_hicache.errors import IntegrityError
from sglang_hicache.scheduler.weights_update import WeightsUpdate
from tests.ranks.reads import ATTACH, PROMPT, cached, tick, world_with_storage
from tests.ranks.test_ranks_agree import traffic
from tests.ranks.world import SimRank, World, next_token, server_config

NONE = wire.CachedTokens()


def update(world: World, digest: str, **fields: object) -> wire.CommandAnswer:
    """An update that nothing stands in the way of, to its end."""
    command = world.command(wire.UpdateWeights, weights_digest=digest, **fields)
    world.settle()
    return world.answer(command)


def tiers_of(world: World, prompt: list[int] = PROMPT) -> wire.CachedTokens:
    rid = world.submit(prompt)
    world.settle()
    found = cached(world, rid)
    return wire.CachedTokens(device=found.device, host=found.host, storage=found.storage)


def test_fm32_no_page_of_the_old_weights_is_served_on_any_tier() -> None:
    """The prompt is on the device, on the host and in storage; with other weights it is on none of them."""
    world = world_with_storage()
    tiers_of(world)
    assert tiers_of(world).device == 24
    assert update(world, "w1").success
    assert tiers_of(world) == NONE
    assert tiers_of(world).device == 24, "what the new weights computed is cached as ever"
    assert [rank.core.update.weights_digest for rank in world.ranks] == ["w1", "w1"]
    world.check()


def test_fm32_the_pages_of_the_old_weights_are_found_again_when_they_come_back() -> None:
    """The namespace is the content of the weights, and not a count of updates."""
    world = world_with_storage()
    tiers_of(world)
    for digest in ("w1", "", "w1"):
        before = tiers_of(world)
        assert update(world, digest).success
        found = tiers_of(world)
        assert before != found and found.device == found.host == 0
        assert found.storage == (0 if digest == "w1" and world.commands[-1] == "c1" else 24)
    world.check()


def test_one_rank_that_cannot_read_them_leaves_all_ranks_as_they_were() -> None:
    world = world_with_storage(ranks=3)
    tiers_of(world)
    command = world.command(wire.UpdateWeights, weights_digest="w1")
    tick(world)
    world.ranks[1].end_staging("no space left on the device")
    world.settle()
    for rank in world.ranks:
        answer = next(a for a in rank.answers if a.id == command)
        assert not answer.success and "rank 1: no space left on the device" in answer.message
        assert rank.worker.weights == "" and rank.staging is None
    assert tiers_of(world).device == 24, "nothing was flushed either"
    world.check()


def test_a_rank_that_never_finishes_reading_is_named_at_the_deadline() -> None:
    world = world_with_storage()
    command = world.command(wire.UpdateWeights, weights_digest="w1", deadline_s=1.0)
    tick(world)
    world.ranks[0].end_staging()
    tick(world)
    assert not world.ranks[0].answers[1:]
    world.now_us += 1_000_001
    tick(world)
    answer = world.answer(command)
    assert not answer.success and "not read in time on rank 1" in answer.message
    world.ranks[1].end_staging()  # too late: nobody asks any more
    world.settle()
    world.check()


def test_serving_goes_on_while_the_weights_are_read() -> None:
    world = world_with_storage()
    world.command(wire.UpdateWeights, weights_digest="w1")
    tick(world)
    rid = world.submit(PROMPT)
    for _ in range(40):
        for rank in world.ranks:
            for process in rank.storage.values():
                process.step()
        tick(world)
    assert [o for o in world.ranks[0].outputs if o.rid == rid and o.finish], "it waited for the weights"
    world.settle()
    world.check()


def test_what_runs_ends_with_the_old_weights_and_what_waits_begins_with_the_new_ones() -> None:
    world = World(0, 2, fault_rate=0.0)
    first = world.submit(PROMPT, max_new_tokens=12)
    tick(world)
    command = world.command(wire.UpdateWeights, weights_digest="w1")
    tick(world)
    for rank in world.ranks:
        rank.end_staging()
    tick(world)
    assert world.ranks[0].core.update.is_holding
    second = world.submit(PROMPT, max_new_tokens=12)
    world.settle()
    texts, answer = world.texts(), world.answer(command)
    assert texts[first][0] == next_token(PROMPT) and texts[second][0] == next_token(PROMPT, "w1")
    assert answer.success and answer.paused_requests == 1
    assert cached(world, second).device == 0
    world.check()


def test_a_request_that_had_to_step_back_ends_with_the_weights_it_began_with() -> None:
    """Two requests outgrow the device; the one that was sent back to the line when the update came is in no hurry."""
    world = World(0, 2, fault_rate=0.0, config=server_config(2, device_pages=10))
    for i in range(2):
        world.submit([i] * 12, max_new_tokens=20)
    line = world.ranks[0].core.waiting
    while not any(request.num_retractions for request in line):
        tick(world)
    assert update(world, "w1").success
    assert any(o.num_retractions for o in world.ranks[0].outputs if o.finish)
    world.check()


def test_with_abort_nobody_is_waited_for() -> None:
    world = world_with_storage()
    rid = world.submit(PROMPT, max_new_tokens=1000)
    tick(world)
    tick(world)
    assert update(world, "w1", aborts_requests=True).success
    end = next(o.finish for o in world.ranks[0].outputs if o.rid == rid and o.finish)
    assert end.type == "abort" and "weights" in end.message
    world.check()


def test_a_failed_update_aborts_nobody() -> None:
    world = world_with_storage()
    rid = world.submit(PROMPT, max_new_tokens=8)
    world.command(wire.UpdateWeights, weights_digest="w1", aborts_requests=True)
    tick(world)
    world.ranks[0].end_staging("truncated")
    world.settle()
    assert next(o.finish.type for o in world.ranks[0].outputs if o.rid == rid and o.finish) != "abort"
    world.check()


def test_a_store_that_hangs_keeps_the_old_weights_and_the_line_moves_on() -> None:
    """The server cannot come to rest: at the deadline it says what did not end, and serves as before."""
    world = world_with_storage(policy="best_effort")
    world.submit(PROMPT)
    for rank in world.ranks:
        for process in rank.storage.values():
            process.state = "held"
    command = world.command(wire.UpdateWeights, weights_digest="w1", deadline_s=1.0)
    for _ in range(30):
        for rank in world.ranks:
            rank.end_staging()
            while rank.copies:
                rank.finish_copy()
        tick(world)
    assert world.ranks[0].core.update.is_holding
    late = world.submit(PROMPT)
    tick(world)
    world.now_us += 1_000_000
    tick(world)
    answer = world.answer(command)
    assert not answer.success and "-ops=" in answer.message
    tick(world)
    assert late not in [request.rid for request in world.ranks[0].core.waiting]
    world.settle()
    world.check()


def test_two_updates_at_once_are_a_conflict_and_nothing_else_may_change_meanwhile() -> None:
    world = world_with_storage()
    first = world.command(wire.UpdateWeights, weights_digest="w1")
    tick(world)
    second = world.command(wire.UpdateWeights, weights_digest="w2")
    detach = world.command(wire.DetachStorage)
    tick(world)
    assert "Conflict" in world.answer(second).message
    assert "#weights-update=1" in world.answer(detach).message
    world.settle()
    assert world.answer(first).success and world.ranks[0].worker.weights == "w1"
    world.check()


def test_an_attach_that_is_opening_is_waited_for() -> None:
    """Its process could not hear yet what its pages are called."""
    world = World(0, 2, fault_rate=0.0)
    attach = world.command(wire.AttachStorage, **ATTACH)
    tick(world)
    command = world.command(wire.UpdateWeights, weights_digest="w1")
    tick(world)
    for rank in world.ranks:
        rank.end_staging()
    for _ in range(3):
        tick(world)
    assert world.ranks[0].core.update.is_holding
    world.settle()
    assert world.answer(attach).success and world.answer(command).success
    world.check()


def test_storage_that_is_attached_later_gets_the_name_of_the_present_weights() -> None:
    world = World(0, 2, fault_rate=0.0)
    assert update(world, "w1").success
    world.command(wire.AttachStorage, **ATTACH)
    world.settle()
    assert tiers_of(world) == NONE
    assert {key[:2] for _, key in world.store} == {b"w1"}
    world.check()


def test_health_probes_are_answered_while_the_line_stands_still() -> None:
    world = world_with_storage()
    for rank in world.ranks:
        for process in rank.storage.values():
            process.state = "held"
    world.submit(PROMPT)
    world.command(wire.UpdateWeights, weights_digest="w1")
    for _ in range(30):
        for rank in world.ranks:
            rank.end_staging()
            while rank.copies:
                rank.finish_copy()
        tick(world)
    assert world.ranks[0].core.update.is_holding
    sampling = wire.SamplingParams(max_new_tokens=1, temperature=0.0)
    world.leader.add_request(wire.NewRequest(rid="HEALTH_CHECK_1", token_ids=[1], sampling=sampling))
    tick(world)
    assert [o for o in world.ranks[0].outputs if o.rid == "HEALTH_CHECK_1" and o.finish]


# ------------------------------------------------------------------------------------------- at random moments


def play(seed: int, steps: int) -> World:
    """Traffic, faults, attaches and detaches of `test_ranks_agree.py`, and updates at random moments."""
    ranks = 2 + seed % 2
    device_pages, host_pages = ((24, 40), (40, 20))[seed % 2]
    policy = ("write_through", "write_back", "write_through_selective")[seed % 3]
    config = server_config(ranks, device_pages, host_pages, write_policy=policy)
    world, chance = World(seed, ranks, 0.01, config=config), random.Random(seed)
    for _ in range(6):
        world.command(wire.FlushCache)  # so that the store is asked
        world.command(wire.AttachStorage, **ATTACH, prefetch_policy=("timeout", "wait_complete")[seed % 2])
        for _ in range(steps):
            if chance.random() < 0.006:
                world.command(
                    wire.UpdateWeights, weights_digest=chance.choice(("", "w1", "w2")),
                    aborts_requests=chance.random() < 0.3, deadline_s=chance.choice((0.1, 1.0, 3.0)),
                )  # fmt: skip
            traffic(world, 1)
        world.settle()
        world.check()
        world.fault_rate = 0.01
    return world


#: One life is looked at by two tests.
played = functools.cache(play)


@pytest.mark.parametrize("seed", range(6))
def test_fm32_updates_at_random_moments_mix_no_pages_and_no_texts(seed: int) -> None:
    played(seed, 250)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 140))
def test_fm32_updates_at_random_moments_long(seed: int) -> None:
    play(seed, 3000)


def test_the_random_moments_are_the_ones_that_matter() -> None:
    answers, fetched, aborted = [], 0, 0
    for seed in range(6):
        world = played(seed, 250)
        answers += [answer for answer in world.ranks[0].answers if answer.id in update_ids(world)]
        fetched += sum(o.cached.storage for o in world.ranks[0].outputs if o.finish)
        aborted += sum("weights" in o.finish.message for o in world.ranks[0].outputs if o.finish)
    messages = " ".join(answer.message for answer in answers)
    for sense in ("updated.", "disk", "not read in time", "Conflict"):
        assert sense in messages, f"nobody was ever told {sense!r}"
    assert fetched and aborted and any(answer.paused_requests for answer in answers)


def update_ids(world: World) -> set[str]:
    return {c.id for plan in world.plans for c in plan.commands if isinstance(c, wire.UpdateWeights)}


# ------------------------------------------------------------------------------- mistakes that must be noticed


def device_and_host_are_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tiers, "flush", lambda self: None)


def storage_is_not_told(patch: pytest.MonkeyPatch) -> None:
    real = SimRank.send
    patch.setattr(
        SimRank, "send",
        lambda self, epoch, message: isinstance(message, wire.UseNamespace) or real(self, epoch, message),
    )  # fmt: skip


def running_requests_are_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    real = WeightsUpdate._obstacles
    patch.setattr(
        WeightsUpdate, "_obstacles",
        lambda self: {name: n for name, n in real(self).items() if name not in ("running-req", "retracted-req")},
    )  # fmt: skip


def ops_are_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    real = WeightsUpdate._obstacles
    patch.setattr(
        WeightsUpdate, "_obstacles",
        lambda self: {name: n for name, n in real(self).items() if not name.endswith("-ops")},
    )  # fmt: skip


MUTANTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    device_and_host_are_kept, storage_is_not_told, running_requests_are_not_waited_for, ops_are_not_waited_for,
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_simulator_catches(mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises((IntegrityError, AssertionError)):
        for seed in range(12):
            play(seed, 250)
