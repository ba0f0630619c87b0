"""Attention of one batch, bit-identical for a token whatever else is in the batch and however its prompt was cut.

SDPA computes a query row the same way every time if, seen from that row, the call is the same every time:

    keys     a row at position p reads the keys of whole blocks of 256, up to the end of its own block, the
             rest masked: the number of keys is a function of p alone
    rows     padded to a multiple of 16: below that the libraries switch to other kernels
    slots    that belong to nobody, or to tokens yet to come, are zeros

so a token that is decoded, part of a chunk, packed with strangers or computed after a cached prefix goes
through equal arithmetic.  This rests on how the libraries behave and not on a promise of theirs; `selfcheck.py`
tries it on the running machine before a server trusts it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from sglang_hicache.workers.attention.packing import PackedBatch, Span
from sglang_hicache.workers.attention.pool import DevicePool
from sglang_hicache.workers.batch import DUMMY_PAGE

#: Keys come in whole blocks of this many tokens, at absolute positions.  Above a few dozen any size is equally
#: exact; a larger one wastes more on short sequences.
_BLOCK_TOKENS = 256
#: Query rows of a call are a multiple of this.
ROW_MULTIPLE = 16
#: Gathered keys of one decode call; see fast.py.
_GROUP_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class _Reach:
    """What a block's rows read, as slots of a gather that starts at a page: equal reaches make equal calls."""

    first_page: int
    page_count: int
    keys: slice

    @property
    def shape(self) -> tuple[int, int, int]:
        """What two sequences must share to be served by one call."""
        return self.page_count, self.keys.start, self.keys.stop


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """One query token of each of `count` sequences of equal shape."""

    rows: Tensor
    count: int
    pages: Tensor
    keys: slice
    #: [count, 1, 1, keys]
    mask: Tensor
    blank: Tensor

    def run(self, pool: DevicePool, layer: int, query: Tensor, scale: float, out: Tensor) -> None:
        keys, values = _gather(pool, layer, self.pages, self.blank)
        _, query_heads, channels = query.shape
        heads = keys.shape[1]
        group = query_heads // heads
        rows = query.index_select(0, self.rows).view(self.count, heads, group, channels)
        rows = pad(rows, (0, 0, 0, -group % ROW_MULTIPLE))
        result = scaled_dot_product_attention(
            rows,
            keys.view(self.count, -1, heads, channels)[:, self.keys].transpose(1, 2),
            values.view(self.count, -1, heads, channels)[:, self.keys].transpose(1, 2),
            attn_mask=self.mask.expand(-1, 1, rows.shape[2], -1),
            scale=scale,
        )
        out.index_copy_(0, self.rows, result[:, :, :group].reshape(self.count, query_heads, channels))


@dataclass(frozen=True, slots=True)
class _Block:
    rows: slice
    keys: slice
    #: [rows padded, keys]
    mask: Tensor


@dataclass(frozen=True, slots=True)
class _ExtendSpan:
    """Several tokens of one sequence, block by block."""

    pages: Tensor
    blocks: list[_Block]
    blank: Tensor

    def run(self, pool: DevicePool, layer: int, query: Tensor, scale: float, out: Tensor) -> None:
        keys, values = (half.transpose(0, 1)[None] for half in _gather(pool, layer, self.pages, self.blank))
        is_grouped = query.shape[1] != keys.shape[1]
        for block in self.blocks:
            rows = query[block.rows].transpose(0, 1)[None]
            count = rows.shape[2]
            result = scaled_dot_product_attention(
                pad(rows, (0, 0, 0, -count % ROW_MULTIPLE)),
                keys[:, :, block.keys],
                values[:, :, block.keys],
                attn_mask=block.mask,
                scale=scale,
                enable_gqa=is_grouped,
            )
            out[block.rows] = result[0, :, :count].transpose(0, 1)


class ExactPlan:
    """All calls of one batch for one window."""

    def __init__(self, batch: PackedBatch, pool: DevicePool, window: int | None) -> None:
        groups: dict[tuple[int, int, int], list[Span]] = {}
        for span in batch.spans:
            if span.length == 1:
                groups.setdefault(_reach(span.prefix_len, pool.page_size, window).shape, []).append(span)
        self._pieces: list[_DecodeGroup | _ExtendSpan] = []
        for shape, spans in groups.items():
            size = max(1, _GROUP_TOKENS // (shape[0] * pool.page_size))
            for first in range(0, len(spans), size):
                self._pieces.append(_decode_group(spans[first : first + size], pool, window))
        self._pieces += [_extend_span(span, pool, window) for span in batch.spans if span.length > 1]

    def run(self, pool: DevicePool, layer: int, query: Tensor, scale: float, out: Tensor) -> None:
        for piece in self._pieces:
            piece.run(pool, layer, query, scale, out)


def _gather(pool: DevicePool, layer: int, pages: Tensor, blank: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = pool.gather(layer, pages)
    keys.index_fill_(0, blank, 0)
    values.index_fill_(0, blank, 0)
    return keys, values


def _reach(position: int, page_size: int, window: int | None) -> _Reach:
    """What a row at `position` reads; the same for every position of its block."""
    block = position // _BLOCK_TOKENS * _BLOCK_TOKENS
    low = 0 if window is None else max(0, block - window + 1) // _BLOCK_TOKENS * _BLOCK_TOKENS
    high = block + _BLOCK_TOKENS
    first_page = low // page_size
    gathered_from = first_page * page_size
    return _Reach(first_page, -(-high // page_size) - first_page, slice(low - gathered_from, high - gathered_from))


def _visible(positions: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which key positions each query position may see."""
    mask = keys <= positions[:, None]
    if window is not None:
        mask &= keys > positions[:, None] - window
    return mask


def _pages(span: Span, first_page: int, count: int) -> Tensor:
    """`count` pages from `first_page` on; beyond the sequence's end, the dummy page."""
    own = span.pages[first_page : first_page + count]
    return pad(own, (0, count - len(own)), value=DUMMY_PAGE)


def _decode_group(spans: list[Span], pool: DevicePool, window: int | None) -> _DecodeGroup:
    pages, masks, blanks = [], [], []
    for row, span in enumerate(spans):
        reach = _reach(span.prefix_len, pool.page_size, window)
        gathered_from, slots = reach.first_page * pool.page_size, reach.page_count * pool.page_size
        pages.append(_pages(span, reach.first_page, reach.page_count))
        key_at = torch.arange(slots, device=pool.device)[reach.keys] + gathered_from
        masks.append(_visible(torch.tensor([span.prefix_len], device=pool.device), key_at, window))
        blanks.append(torch.arange(row * slots + span.total_len - gathered_from, (row + 1) * slots, device=pool.device))
    return _DecodeGroup(
        rows=torch.tensor([span.start for span in spans], device=pool.device),
        count=len(spans),
        pages=torch.cat(pages),
        keys=reach.keys,
        mask=torch.cat(masks)[:, None, None],
        blank=torch.cat(blanks),
    )


def _extend_span(span: Span, pool: DevicePool, window: int | None) -> _ExtendSpan:
    first = _reach(span.prefix_len, pool.page_size, window)
    last = _reach(span.total_len - 1, pool.page_size, window)
    page_count = last.first_page + last.page_count - first.first_page
    gathered_from = first.first_page * pool.page_size
    offset = span.start - span.prefix_len
    blocks = []
    start = span.prefix_len
    while start < span.total_len:
        end = min(span.total_len, start // _BLOCK_TOKENS * _BLOCK_TOKENS + _BLOCK_TOKENS)
        reach = _reach(start, pool.page_size, window)
        shift = (reach.first_page - first.first_page) * pool.page_size
        keys = slice(reach.keys.start + shift, reach.keys.stop + shift)
        # Padding rows repeat the last one: a row that sees nothing would be a division by zero.
        positions = torch.arange(start, end + -(end - start) % ROW_MULTIPLE, device=pool.device).clamp_(max=end - 1)
        key_at = torch.arange(keys.start, keys.stop, device=pool.device) + gathered_from
        blocks.append(_Block(slice(start + offset, end + offset), keys, _visible(positions, key_at, window)))
        start = end
    blank = torch.arange(span.total_len - gathered_from, page_count * pool.page_size, device=pool.device)
    return _ExtendSpan(_pages(span, first.first_page, page_count), blocks, blank)
