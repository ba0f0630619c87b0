"""Canaries in the ledger: what every rank says of one becomes one outcome for all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_hicache import wire
from sglang_hicache.scheduler.tick import Ledger

RANKS = 3
DEADLINE_US = 1_000


def core(*numbers: int) -> SimpleNamespace:
    """A replica whose failover waits for these canaries."""
    return SimpleNamespace(failover=SimpleNamespace(canaries=lambda: dict.fromkeys(numbers, DEADLINE_US)))


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(RANKS)


def say(ledger: Ledger, rank: int, reason: str = "", page_s: float = 0.0, number: int = 1) -> None:
    ledger.add_canaries(rank, [wire.CanaryFact(number, reason, page_s)])


def test_it_is_good_when_it_was_good_on_every_rank_and_as_slow_as_on_the_slowest(ledger: Ledger) -> None:
    for rank, page_s in ((2, 0.5), (0, 0.25)):
        say(ledger, rank, page_s=page_s)
        assert ledger.canary_outcomes(core(1), 0) == []
    say(ledger, 1, page_s=0.125)
    assert ledger.canary_outcomes(core(1), 0) == [wire.CanaryOutcome(1, "", 0.5)]


def test_one_bad_rank_is_enough(ledger: Ledger) -> None:
    """A rank whose store hangs must not keep the others waiting for what is known already."""
    say(ledger, 0)
    say(ledger, 2, "refused: nobody there")
    (outcome,) = ledger.canary_outcomes(core(1), 0)
    assert outcome.number == 1 and "rank 2: " in outcome.failure and "nobody there" in outcome.failure
    assert outcome.failure.startswith("refused: ")


def test_silent_ranks_are_named_at_the_deadline(ledger: Ledger) -> None:
    say(ledger, 1)
    assert ledger.canary_outcomes(core(1), DEADLINE_US - 1) == []
    (outcome,) = ledger.canary_outcomes(core(1), DEADLINE_US)
    assert outcome.failure.startswith("hung: ") and outcome.failure.endswith("on rank 0, 2")


def test_what_comes_after_the_outcome_is_forgotten(ledger: Ledger) -> None:
    for rank in range(RANKS):
        say(ledger, rank, "refused: no", number=1)
    assert ledger.canary_outcomes(core(2), 0) == []
    assert ledger.canary_outcomes(core(1), 0) == []


def test_two_at_a_time_are_told_apart(ledger: Ledger) -> None:
    for rank in range(RANKS):
        say(ledger, rank, number=1)
    say(ledger, 0, "other: x", number=2)
    assert [outcome.number for outcome in ledger.canary_outcomes(core(1, 2, 3), 0)] == [1, 2]
