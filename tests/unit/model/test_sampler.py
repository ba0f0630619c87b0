"""The choice of a token: what the parameters allow, and that nothing else has a say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_hicache.workers.batch import RowSampling
from sglang_hicache.workers.sampler import sample, uniform

_HOT = RowSampling(temperature=1.0, seed=5)


def _logits(rows: int, seed: int = 0, vocabulary: int = 50) -> torch.Tensor:
    return torch.randn((rows, vocabulary), generator=torch.Generator().manual_seed(seed)) * 2


def _draws(logits: torch.Tensor, parameters: RowSampling, count: int = 300) -> Counter[int]:
    rows = [replace(parameters, position=position) for position in range(count)]
    return Counter(sample(logits.expand(count, -1), rows).tolist())


@pytest.mark.parametrize("parameters", [RowSampling(), replace(_HOT, top_k=1), replace(_HOT, temperature=0.0)])
def test_greedy_takes_the_most_probable(parameters):
    logits = _logits(6)
    assert sample(logits, [parameters] * 6).tolist() == logits.argmax(-1).tolist()


def test_greedy_takes_the_lowest_id_of_equals():
    """bf16 logits tie now and then; all tiers and ranks must then agree."""
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0]])
    assert sample(logits, [RowSampling()]).tolist() == [1]


@given(st.integers(2, 9), st.permutations(range(9)), st.integers(0, 3))
def test_a_row_does_not_depend_on_its_batch(size, order, seed):
    logits = _logits(9, seed)
    parameters = [
        RowSampling(
            temperature=0.3 + row / 3, top_k=row * 5, top_p=1 - row / 12, min_p=row / 50, seed=row, position=seed
        )
        for row in range(9)
    ]
    alone = [sample(logits[row : row + 1], [parameters[row]]).item() for row in range(9)]
    batch = order[:size]
    assert sample(logits[list(batch)], [parameters[row] for row in batch]).tolist() == [alone[row] for row in batch]


def test_frequencies_follow_the_distribution():
    logits = torch.tensor([0.5, 0.25, 0.2, 0.05]).log()
    drawn = _draws(logits, _HOT, 4000)
    for token, share in enumerate((0.5, 0.25, 0.2, 0.05)):
        assert drawn[token] / 4000 == pytest.approx(share, abs=0.03)


def test_temperature_sharpens_and_flattens():
    logits = _logits(1)[0]
    best = int(logits.argmax())
    assert set(_draws(logits, replace(_HOT, temperature=1e-6))) == {best}
    assert len(_draws(logits, replace(_HOT, temperature=50.0))) > 40


@pytest.mark.parametrize(
    ("limit", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 2**30}, {0, 1, 2, 3}),
        ({"top_k": -1}, {0, 1, 2, 3}),
        # The token that crosses the line is kept.
        ({"top_p": 0.45}, {0}),
        ({"top_p": 0.55}, {0, 1}),
        ({"top_p": 0.8}, {0, 1, 2}),
        ({"min_p": 0.35}, {0, 1, 2}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "min_p": 0.45}, {0, 1}),
    ],
)
def test_limits_keep_exactly_what_they_say(limit, allowed):
    """Probabilities 0.5, 0.25, 0.2, 0.05, stored in another order."""
    logits = torch.tensor([0.05, 0.5, 0.2, 0.25]).log()
    by_rank = [1, 3, 2, 0]
    assert set(_draws(logits, replace(_HOT, **limit), 400)) == {by_rank[place] for place in allowed}


def test_an_impossible_token_is_never_drawn():
    logits = torch.full((50,), float("-inf"))
    logits[[7, 30]] = 0.0
    assert set(_draws(logits, _HOT)) == {7, 30}


def test_not_a_number_is_an_id_all_the_same():
    """A model that overflows answers nonsense to its own request; it must not take the rank down."""
    (token,) = sample(torch.full((1, 50), torch.nan), [_HOT]).tolist()
    assert 0 <= token < 50


@given(st.integers(-(2**63), 2**64), st.integers(0, 2**20))
def test_uniform_is_a_function_into_zero_to_one(seed, position):
    number = uniform(seed, position)
    assert 0 <= number < 1 and number == uniform(seed, position)


def test_uniform_does_not_correlate_between_seeds_and_positions():
    for numbers in (
        [uniform(seed, 7) for seed in range(2000)],
        [uniform(7, position) for position in range(2000)],
        [uniform(n, n) for n in range(2000)],
    ):
        values = torch.tensor(numbers)
        assert abs(values.mean().item() - 0.5) < 0.03
        neighbours = torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]
        assert abs(neighbours.item()) < 0.08


def test_choices_are_pinned():
    """A restarted server, or a newer one, repeats a request with a seed."""
    logits = torch.linspace(0, 3, 50)
    rows = [RowSampling(temperature=0.9, top_p=0.9, seed=1234, position=position) for position in range(8)]
    assert sample(logits.expand(8, -1), rows).tolist() == [38, 46, 41, 36, 41, 43, 43, 36]
