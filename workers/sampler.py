"""The next token of each row, from its logits.

Called by the model worker on rank 0 only, whose choice the other ranks take over.  A row's choice depends on
its own logits and parameters and on nothing else, and its randomness on (seed, position): a request that is
retracted and computed again repeats itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sglang_hicache.workers.batch import RowSampling

_MASK_64 = (1 << 64) - 1


def sample(logits: Tensor, sampling: Sequence[RowSampling]) -> Tensor:
    """One token id per row of logits [rows, vocabulary], int64 on the device of the logits."""
    ids = logits.argmax(dim=-1)
    for row, parameters in enumerate(sampling):
        if not parameters.is_greedy:
            ids[row] = _sample_row(logits[row], parameters)
    return ids


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that looks random and is a function of its arguments alone (splitmix64, twice).

    Not a torch generator: its stream differs between CPU and CUDA, and is nobody's promise across versions.
    """
    return (_splitmix64(_splitmix64(seed & _MASK_64) ^ (position & _MASK_64)) >> 11) * 2.0**-53


def _splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def _sample_row(logits: Tensor, parameters: RowSampling) -> Tensor:
    """Draw from the distribution that temperature, top-k, top-p and min-p leave.

    All three limits look at the distribution after temperature, before any of the others has cut it.  In float64:
    a sum of a hundred thousand small numbers in fp32 would leave the last tokens unreachable.
    """
    # Subtracting the largest first keeps a tiny temperature from overflowing into NaN.
    scaled = (logits.double() - logits.max()) / parameters.temperature
    probabilities = scaled.softmax(dim=-1)
    # Stable: equal probabilities, common in bf16, keep the order of their ids.
    probabilities, order = probabilities.sort(descending=True, stable=True)
    if parameters.top_p < 1:
        # Kept while the mass before a token is below top_p: the token that crosses the line stays.
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.where(before < parameters.top_p, 0)
    if parameters.min_p > 0:
        probabilities = probabilities.where(probabilities >= parameters.min_p * probabilities[0], 0)
    if parameters.top_k > 0:
        probabilities[parameters.top_k :] = 0
    mass = probabilities.cumsum(dim=-1)
    drawn = uniform(parameters.seed, parameters.position) * mass[-1]
    # First place whose mass is above the number: a token of probability zero is never it.
    place = torch.searchsorted(mass, drawn, right=True)
    return order[place.clamp_(max=len(order) - 1)]
