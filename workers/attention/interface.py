"""The one attention function that transformers' models call, and the context it works in.

transformers passes keyword arguments of a model's call through to its attention function, so a forward carries
its `AttentionContext` as `paged=`.  No mask function is registered under the name: transformers then builds no
mask at all, and what may see what is decided by the plans alone.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from sglang_hicache.errors import IntegrityError
from sglang_hicache.workers.attention.packing import PackedBatch
from sglang_hicache.workers.attention.pool import DevicePool

#: Name of the function in transformers' registry.
PAGED_ATTENTION = "hicache_paged"

#: Arguments that change nothing here.  Any other that carries a value belongs to a model whose attention this
#: is not (sinks, soft caps, position biases): going on would answer wrong text.
_NEUTRAL_ARGUMENTS = frozenset({"position_ids", "use_cache", "cache_position", "dropout"})


class AttentionPlan(Protocol):
    """What one batch's attention comes to for one window: made once, run in every layer that has the window."""

    def run(self, pool: DevicePool, layer: int, query: Tensor, scale: float, out: Tensor) -> None:
        """Attend with query [T, heads, channels] over the pool into `out`, of the same shape."""
        ...


class Planner(Protocol):
    """Makes the plan of one batch for one window (None: full attention)."""

    def __call__(self, batch: PackedBatch, pool: DevicePool, window: int | None) -> AttentionPlan: ...


class AttentionContext:
    """One forward's pool, batch and plans."""

    def __init__(self, pool: DevicePool, batch: PackedBatch, planner: Planner) -> None:
        self._pool = pool
        self._batch = batch
        self._planner = planner
        self._plans: dict[int | None, AttentionPlan] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Store the new keys and values, then read everything, old and new, from the pool: one path for both."""
        count = self._batch.token_count
        self._pool.write(layer, self._batch.slots, key[:count], value[:count])
        plan = self._plans.get(window)
        if plan is None:
            plan = self._plans[window] = self._planner(self._batch, self._pool, window)
        out = torch.empty_like(query)
        # Dummy tokens attend to nothing.
        out[count:] = 0
        plan.run(self._pool, layer, query, scale, out)
        return out


def _paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    paged: AttentionContext | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    strange = [
        name
        for name, given in others.items()
        if name not in _NEUTRAL_ARGUMENTS and given is not None and given is not False
    ]
    if strange or attention_mask is not None or paged is None or scaling is None:
        raise IntegrityError(f"{type(module).__name__} asks for an attention that the paged one is not: {strange}")
    out = paged.attend(
        module.layer_idx,
        query[0].transpose(0, 1).contiguous(),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling,
        sliding_window,
    )
    return out.unsqueeze(0), None


AttentionInterface.register(PAGED_ATTENTION, _paged_attention)
