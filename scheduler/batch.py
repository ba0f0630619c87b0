"""From the shares of a tick to the batch that a worker computes."""

from __future__ import annotations

from sglang_hicache.scheduler.admission import Share
from sglang_hicache.workers.batch import ForwardBatch, ForwardRow, RowSampling


def build(shares: list[Share]) -> ForwardBatch:
    """One row per share, in order."""
    return ForwardBatch([_row(share) for share in shares])


def _row(share: Share) -> ForwardRow:
    request = share.request
    start, end = request.computed, request.computed + share.tokens
    sampling = None
    if share.is_last:
        wanted = request.sampling
        sampling = RowSampling(
            temperature=wanted.temperature, top_k=wanted.top_k, top_p=wanted.top_p, min_p=wanted.min_p,
            seed=wanted.seed or 0, position=end,
        )
    return ForwardRow(request.tokens[start:end], start, list(request.pages), sampling)
