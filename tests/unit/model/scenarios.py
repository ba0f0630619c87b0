"""Ways to compute the same tokens that exact numerics must not tell apart."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_hicache.workers.batch import ForwardBatch, ForwardRow, RowSampling
from sglang_hicache.workers.model_worker import ModelWorker
from tests.unit.model.support import ShuffledPages, page_contents, prompts

#: Tokens of the sequence: more than one block of 256 keys, and no multiple of anything.
LENGTH = 331


@dataclass(frozen=True)
class Result:
    logits: Tensor
    pages: Tensor


class Bench:
    """A worker and one sequence, computed in several ways."""

    def __init__(self, worker: ModelWorker) -> None:
        self._worker = worker
        self._tokens, self._other = prompts([LENGTH, 200], seed=3)

    def compute(self, cuts: list[int], neighbours: list[int] | None = None, seed: int = 0) -> Result:
        """Compute the sequence from cut to cut, in every step beside other sequences of these lengths."""
        pages = ShuffledPages(self._worker, seed)
        own = pages.for_tokens(LENGTH)
        others = [(length, pages.for_tokens(length)) for length in neighbours or []]
        logits = torch.empty(0)
        for start, end in zip(cuts, cuts[1:]):
            rows = [ForwardRow(self._other[:length], 0, table, RowSampling()) for length, table in others]
            place = len(rows) // 2
            rows.insert(place, ForwardRow(self._tokens[start:end], start, own, RowSampling()))
            logits = self._worker.runner.forward(ForwardBatch(rows))[place].clone()
        return Result(logits, page_contents(self._worker, own, LENGTH))

    def decode_in_batch(self, start: int) -> Result:
        """Compute up to `start`, then token by token together with seven sequences that decode as well."""
        pages = ShuffledPages(self._worker, 9)
        own = pages.for_tokens(LENGTH)
        others = [[length, pages.for_tokens(length + LENGTH)] for length in (3, 30, 77, 120, 130, 190, 199)]
        for length, table in others:
            self._worker.runner.forward(ForwardBatch([ForwardRow(self._other[:length], 0, table, None)]))
        self._worker.runner.forward(ForwardBatch([ForwardRow(self._tokens[:start], 0, own, None)]))
        logits = torch.empty(0)
        for at in range(start, LENGTH):
            rows = [ForwardRow([5], length, table, RowSampling()) for length, table in others]
            rows.insert(3, ForwardRow([self._tokens[at]], at, own, RowSampling()))
            logits = self._worker.runner.forward(ForwardBatch(rows))[3].clone()
            for other in others:
                other[0] += 1
        return Result(logits, page_contents(self._worker, own, LENGTH))


def differences(worker: ModelWorker) -> list[str]:
    """Names of the ways whose logits or pages are not bit-identical to one prefill of everything."""
    bench = Bench(worker)
    whole = bench.compute([0, LENGTH])
    chance = random.Random(1)
    chunks = [0]
    while chunks[-1] < LENGTH:
        chunks.append(min(LENGTH, chunks[-1] + chance.randrange(20, 100)))
    ways = {
        "other pages": bench.compute([0, LENGTH], seed=4),
        "cached 64": bench.compute([0, 64, LENGTH]),
        "cached 256": bench.compute([0, 256, LENGTH]),
        "cached all but one": bench.compute([0, LENGTH - 1, LENGTH]),
        "chunks": bench.compute(chunks, seed=5),
        "packed": bench.compute([0, LENGTH], [30, 1, 171], seed=6),
        "chunks among others": bench.compute(chunks, [9, 64], seed=7),
        "decoded alone": bench.compute([0, *range(252, 260), LENGTH - 3, LENGTH - 2, LENGTH - 1, LENGTH], seed=8),
        "decoded in a batch": bench.decode_in_batch(LENGTH - 12),
    }
    return [
        name
        for name, result in ways.items()
        if not (torch.equal(result.logits, whole.logits) and torch.equal(result.pages, whole.pages))
    ]
