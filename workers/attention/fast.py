"""Attention of one batch, as fast as gather and SDPA go: results depend on the batch in the last bits.

Single tokens (decode) are grouped so that one SDPA call serves several short sequences; several tokens of one
sequence (extend) are cut into blocks so that a block reads no keys after its own end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sglang_hicache.workers.attention.packing import PackedBatch, Span
from sglang_hicache.workers.attention.pool import DevicePool

#: Query rows of one call.  Blocks end at absolute multiples of it, so that equal chunks make equal calls.
_BLOCK_TOKENS = 256
#: A group's padded keys stay in the second-level cache up to about here; larger groups were slower.
_GROUP_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """One query token of each of `count` sequences, keys padded to the longest."""

    #: Places of the tokens in the packed sequence.
    rows: Tensor
    count: int
    #: Page ids of all sequences, padded with the dummy page, one after the other.
    pages: Tensor
    #: Of each sequence's gathered slots, those that any of them attends to.
    keys: slice
    #: [count, 1, 1, keys]; None for a single sequence, whose slice says it all.
    mask: Tensor | None
    #: Gathered slots that belong to nobody, in the order of the gather.
    blank: Tensor | None

    def run(self, pool: DevicePool, layer: int, query: Tensor, scale: float, out: Tensor) -> None:
        keys, values = pool.gather(layer, self.pages)
        if self.blank is not None:
            # Masked slots still count as 0 x value: what an earlier owner left there must not be a NaN.
            keys.index_fill_(0, self.blank, 0)
            values.index_fill_(0, self.blank, 0)
        _, query_heads, channels = query.shape
        heads = keys.shape[1]
        keys = keys.view(self.count, -1, heads, channels)[:, self.keys].transpose(1, 2)
        values = values.view(self.count, -1, heads, channels)[:, self.keys].transpose(1, 2)
        # The query heads of one KV head as rows of one product: SDPA's own grouping is ten times slower in bf16.
        rows = query.index_select(0, self.rows).view(self.count, heads, -1, channels)
        result = scaled_dot_product_attention(rows, keys, values, attn_mask=self.mask, scale=scale)
        out.index_copy_(0, self.rows, result.reshape(self.count, query_heads, channels))


@dataclass(frozen=True, slots=True)
class _Block:
    """Query tokens `rows` of the packed sequence over gathered slots `keys`."""

    rows: slice
    keys: slice
    mask: Tensor


@dataclass(frozen=True, slots=True)
class _ExtendSpan:
    """Several tokens of one sequence."""

    pages: Tensor
    blocks: list[_Block]

    def run(self, pool: DevicePool, layer: int, query: Tensor, scale: float, out: Tensor) -> None:
        keys, values = (half.transpose(0, 1)[None] for half in pool.gather(layer, self.pages))
        is_grouped = query.shape[1] != keys.shape[1]
        for block in self.blocks:
            result = scaled_dot_product_attention(
                query[block.rows].transpose(0, 1)[None],
                keys[:, :, block.keys],
                values[:, :, block.keys],
                attn_mask=block.mask,
                scale=scale,
                enable_gqa=is_grouped,
            )
            out[block.rows] = result[0].transpose(0, 1)


class FastPlan:
    """All calls of one batch for one window."""

    def __init__(self, batch: PackedBatch, pool: DevicePool, window: int | None) -> None:
        singles = [span for span in batch.spans if span.length == 1]
        self._pieces: list[_DecodeGroup | _ExtendSpan] = [
            _decode_group(group, pool, window) for group in _groups(singles, pool.page_size, window)
        ]
        self._pieces += [_extend_span(span, pool, window) for span in batch.spans if span.length > 1]

    def run(self, pool: DevicePool, layer: int, query: Tensor, scale: float, out: Tensor) -> None:
        for piece in self._pieces:
            piece.run(pool, layer, query, scale, out)


def _first_key(position: int, window: int | None) -> int:
    """The first position that a token attends to."""
    return 0 if window is None else max(0, position - window + 1)


def _page_count(span: Span, page_size: int, window: int | None) -> int:
    """Pages that hold what a single token attends to."""
    return len(span.pages) - _first_key(span.prefix_len, window) // page_size


def _groups(spans: list[Span], page_size: int, window: int | None) -> Iterator[list[Span]]:
    """Neighbours, as many as stay below _GROUP_TOKENS when padded to the longest."""
    group: list[Span] = []
    longest = 0
    for span in spans:
        count = _page_count(span, page_size, window)
        if group and max(longest, count) * page_size * (len(group) + 1) > _GROUP_TOKENS:
            yield group
            group, longest = [], 0
        group.append(span)
        longest = max(longest, count)
    if group:
        yield group


def _decode_group(group: list[Span], pool: DevicePool, window: int | None) -> _DecodeGroup:
    page_size, device = pool.page_size, pool.device
    counts = [_page_count(span, page_size, window) for span in group]
    width = max(counts)
    table = torch.zeros((len(group), width), dtype=torch.int64, device=device)
    starts, ends = [], []
    for row, (span, count) in enumerate(zip(group, counts)):
        table[row, :count] = span.pages[len(span.pages) - count :]
        gathered_from = (len(span.pages) - count) * page_size
        starts.append(_first_key(span.prefix_len, window) - gathered_from)
        ends.append(span.total_len - gathered_from)
    rows = torch.tensor([span.start for span in group], device=device)
    if len(group) == 1:
        return _DecodeGroup(rows, 1, table.flatten(), slice(starts[0], ends[0]), None, None)
    slots = torch.arange(width * page_size, device=device)
    is_own = slots < torch.tensor(ends, device=device)[:, None]
    mask = is_own & (slots >= torch.tensor(starts, device=device)[:, None])
    blank = (~is_own).flatten().nonzero().flatten()
    return _DecodeGroup(rows, len(group), table.flatten(), slice(0, len(slots)), mask[:, None, None], blank)


def _extend_span(span: Span, pool: DevicePool, window: int | None) -> _ExtendSpan:
    first_page = _first_key(span.prefix_len, window) // pool.page_size
    gathered_from = first_page * pool.page_size
    blocks = []
    start = span.prefix_len
    while start < span.total_len:
        end = min(span.total_len, start // _BLOCK_TOKENS * _BLOCK_TOKENS + _BLOCK_TOKENS)
        low = _first_key(start, window)
        at = torch.arange(start, end, device=pool.device)[:, None]
        key_at = torch.arange(low, end, device=pool.device)
        mask = key_at <= at
        if window is not None:
            mask &= key_at > at - window
        offset = span.start - span.prefix_len
        blocks.append(
            _Block(slice(start + offset, end + offset), slice(low - gathered_from, end - gathered_from), mask)
        )
        start = end
    return _ExtendSpan(span.pages[first_page:], blocks)
