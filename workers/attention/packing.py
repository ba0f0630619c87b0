"""One forward as tensors: all new tokens of all rows in one sequence of T, and where each comes from and goes.

Built by the runner once per forward and read by every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_hicache.workers.batch import ForwardBatch, ForwardRow


@dataclass(frozen=True, slots=True)
class Span:
    """One row's tokens in the packed sequence: `[start, start + length)`, at positions from `prefix_len` on."""

    start: int
    length: int
    prefix_len: int
    #: The row's pages from position 0 on, as many as its tokens need, on the device.
    pages: Tensor

    @property
    def total_len(self) -> int:
        """Tokens of the row after this forward."""
        return self.prefix_len + self.length


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Inputs of one forward on the device.

    `input_ids` and `positions` have `padding` dummy tokens at the end; `slots` has not, so what a dummy token
    computes is written nowhere.
    """

    input_ids: Tensor
    positions: Tensor
    slots: Tensor
    spans: list[Span]
    #: Index in the packed sequence of the last token of each row that wants a token, padded like the tokens.
    wanted: Tensor
    #: Rows that want a token.
    wanted_count: int
    padding: int

    @property
    def token_count(self) -> int:
        """Tokens without the dummy ones."""
        return len(self.slots)


def pack(batch: ForwardBatch, *, page_size: int, vocab_size: int, multiple: int, device: torch.device) -> PackedBatch:
    """Pack the rows; tokens, and wanted tokens, are padded to a multiple of `multiple`."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    spans: list[Span] = []
    wanted: list[int] = []
    for row in batch.rows:
        spans.append(_span(row, len(ids), page_size, device))
        ids += row.token_ids
        row_positions = range(row.prefix_len, row.prefix_len + len(row.token_ids))
        positions += row_positions
        slots += [row.pages[at // page_size] * page_size + at % page_size for at in row_positions]
        if row.sampling is not None:
            wanted.append(len(ids) - 1)
    padding = -len(ids) % multiple
    # The tokenizer refuses ids that the vocabulary does not have.  Should one come through, a clamped id gives
    # its own request nonsense; an index past the embedding would take down the rank and everybody with it.
    input_ids = torch.tensor(ids + [0] * padding).clamp_(0, vocab_size - 1)
    wanted_count = len(wanted)
    if wanted:
        wanted += wanted[:1] * (-wanted_count % multiple)
    return PackedBatch(
        input_ids=input_ids.to(device, non_blocking=True),
        positions=torch.tensor(positions + [0] * padding).to(device, non_blocking=True),
        slots=torch.tensor(slots).to(device, non_blocking=True),
        spans=spans,
        wanted=torch.tensor(wanted, dtype=torch.int64).to(device, non_blocking=True),
        wanted_count=wanted_count,
        padding=padding,
    )


def _span(row: ForwardRow, start: int, page_size: int, device: torch.device) -> Span:
    length = len(row.token_ids)
    pages = torch.tensor(row.pages[: -(-(row.prefix_len + length) // page_size)])
    return Span(start, length, row.prefix_len, pages.to(device, non_blocking=True))
