"""The status: alike on every rank as far as all compute alike, and each count with the backend that it belongs to."""

from __future__ import annotations

import msgspec

from sglang_hicache import wire
from tests.ranks.control import attach, moment
from tests.ranks.reads import world_with_storage
from tests.ranks.test_ranks_agree import play
from tests.ranks.world import PAGE, World, server_config

EXTRA = '{"prefetch_threshold": 4}'


def test_all_ranks_tell_the_same() -> None:
    """One rank speaks for all in the metrics: a histogram that saw a clock of its own would make that a lie."""
    seen: dict[str, int] = {}
    for seed in (1, 4, 5):
        world = play(seed, rounds=4, steps=250)
        answers = [msgspec.structs.replace(rank.core.status.answer("q"), rank=0) for rank in world.ranks]
        assert all(answer == answers[0] for answer in answers)
        for name, histogram in answers[0].histograms.items():
            seen[name] = seen.get(name, 0) + sum(histogram.counts)
        counters = answers[0].counters
        cached = [counters[f"served_cached_{tier}_tokens"] for tier in ("device", "host", "storage")]
        assert counters["served_prompt_tokens"] > sum(cached) > 0
        assert answers[0].histograms["uncached_prompt_tokens_histogram"].total == (
            counters["served_prompt_tokens"] - sum(cached)
        )
    for kind in ("lookup", "read", "write", "load_back", "write_through"):
        assert seen[f"op_duration_seconds/{kind}"] > 0, kind


def test_a_switch_is_no_outage() -> None:
    """Whoever watches `state` would be woken up by each switch if it told of what opens, or of what drains."""
    world = world_with_storage(device_pages=200, host_pages=200)
    switch = attach(world, "/b", switch=True)
    seen: dict[tuple[str, str, int], int] = {}
    while not any(answer.id == switch for answer in world.ranks[0].answers):
        moment(world)
        said = world.ranks[0].core.status.answer("q")
        place = said.state, said.backend, said.epoch
        seen[place] = max(seen.get(place, 0), len(said.places))
    assert seen == {("attached", "memory", 1): 2, ("attached", "file", 2): 2}


def _stored(world: World) -> dict[str, int]:
    """By backend: tokens that were written, as the status tells it."""
    totals = world.ranks[0].core.status.answer("q").totals
    return {backend: counts.get("backup_backuped_tokens", 0) for backend, counts in totals.items()}


def test_what_is_counted_belongs_to_the_backend_that_was_attached() -> None:
    """1. Attach A, write. 2. Attach B, ask for the first time only now. 3. All is told of B: A's series never was."""
    world = World(0, 2, fault_rate=0.0, config=server_config(2, 60, 60))
    told = []
    for number, backend in enumerate(("memory", "file", "memory")):
        world.command(wire.AttachStorage, backend=backend, extra_config_json=EXTRA)
        world.settle()
        world.submit([1000 + number] * (3 * PAGE + 1), max_new_tokens=1)
        world.settle()
        told.append(_stored(world) if number else {})
        world.command(wire.DetachStorage)
        world.settle()
        world.command(wire.FlushCache)
        world.settle()
    tokens = 3 * PAGE
    assert told == [{}, {"memory": tokens, "file": tokens}, {"memory": 2 * tokens, "file": tokens}]
    assert _stored(world) == told[-1], "a detach takes nothing away"
    total = world.ranks[0].core.status.answer("q").counters["backup_backuped_tokens"]
    assert sum(told[-1].values()) == total
