"""Long random walks through worlds that are too large to be played completely."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_hicache.storage.attachment_events import Verdict
from tests.machines.attachment_world import Explorer, Scenario, Urgency, World

COMMANDS = (
    "attach a", "attach late", "switch b", "switch late", "switch b patiently", "detach", "detach patiently", "clear",
    "cancel 0", "cancel 1", "cancel 2", "cancel 4",
)  # fmt: skip

scenarios = st.builds(
    Scenario,
    script=st.lists(st.sampled_from(COMMANDS), min_size=1, max_size=12).map(tuple),
    ranks=st.integers(1, 4),
    pages=st.integers(1, 3),
    ops=st.integers(0, 8),
    faults=st.integers(0, 6),
    lag=st.integers(1, 4),
)
#: Which of the possible moves is taken, step by step.
choices = st.lists(st.integers(0, 255), min_size=20, max_size=250)


def _chosen(explorer: Explorer, world: World, step: int) -> World | None:
    """The move that a step takes: mostly what is due anyway, for else every attach would end at its deadline."""
    moves = list(explorer.moves(world))
    due = [move for move in moves if move[0] is Urgency.MUST and "deadline" not in move[1]]
    if due and step % 4:
        moves = due
    return moves[step // 4 % len(moves)][-1] if moves else None


def walk(scenario: Scenario, steps: list[int]) -> tuple[Explorer, World]:
    """Take the chosen moves, then only what must happen, then what happens some day."""
    explorer = Explorer(scenario)
    world = explorer.start()
    for step in steps:
        after = _chosen(explorer, world, step)
        if after is None:
            break
        world = after
        explorer.check(world)
    for allowed in ((Urgency.MUST,), (Urgency.MUST, Urgency.SOME_DAY)):
        while moves := [after for urgency, _, after in explorer.moves(world) if urgency in allowed]:
            world = moves[0]
            explorer.check(world)
        explorer.check_calm(world)
    explorer.check_end(world)
    return explorer, world


@given(scenario=scenarios, steps=choices)
@settings(max_examples=200)
def test_a_walk_comes_to_rest(scenario: Scenario, steps: list[int]) -> None:
    walk(scenario, steps)


@pytest.mark.long
@given(scenario=scenarios, steps=st.lists(st.integers(0, 255), min_size=100, max_size=900))
@settings(max_examples=1500)
def test_a_walk_comes_to_rest_long(scenario: Scenario, steps: list[int]) -> None:
    walk(scenario, steps)


def test_walks_go_far() -> None:
    """Walks that never attach, switch, work or fail would prove little."""
    script = ("attach a", "switch late", "detach", "attach b", "clear", "switch a", "detach")
    scenario = Scenario(script, ranks=3, pages=2, ops=8, faults=2, lag=2)
    chance = random.Random(1)
    verdicts, ops, faults = Counter(), 0, 0
    for _ in range(100):
        explorer, world = walk(scenario, [chance.randrange(256) for _ in range(400)])
        replica = explorer.replicas[world.ranks[0].replica]
        assert len(replica.answers) == world.commands_sent
        verdicts.update((command.split()[1], verdict) for command, verdict in replica.answers.items())
        ops, faults = ops + world.ops_sent, faults + scenario.faults - world.faults_left
    assert ops > 40
    assert faults > 40
    for verb in ("attach", "switch"):
        assert min(verdicts[verb, v] for v in (Verdict.OK, Verdict.FAILED, Verdict.CONFLICT)) > 1, verdicts
    assert min(verdicts["detach", v] for v in (Verdict.OK, Verdict.PAGES_HELD)) > 1, verdicts
