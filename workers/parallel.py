"""Tensor parallelism of one rank: the group of ranks, and linear layers that hold a share of a matrix.

The model worker creates the group; the layers talk through it inside a forward, on the thread that calls the
worker.  This and the sampler's broadcast are the only collectives of the server: every rank runs the same
forwards in the same order (the tick plan sees to that), so they always meet.

`transformers` describes by name how each layer of a model may be divided (`base_model_tp_plan`).  We read that
plan and replace the linear layers ourselves: its own implementation needs another package and cannot repeat KV
heads when there are fewer than ranks.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from sglang_hicache.errors import UserError

_log = logging.getLogger(__name__)


class Numerics(Enum):
    """What the arithmetic of a server promises."""

    #: Right up to rounding, which depends on the batch.
    FAST = "fast"
    #: Bit-identical for a token whatever the batch, chunking and tier.
    EXACT = "exact"


class TensorGroup:
    """The ranks that share a model.  A group of one talks to nobody."""

    def __init__(self, rank: int, size: int, numerics: Numerics = Numerics.FAST) -> None:
        self.rank = rank
        self.size = size
        # gloo's ring adds the shares of an element in an order that depends on where it stands in the tensor, so
        # a row would change with the size of its batch.  Two addends commute; from three on we add them in rank order.
        self._is_ordered = numerics is Numerics.EXACT and size > 2

    def join_blocking(self, rendezvous: str, device: torch.device) -> None:
        """Meet the other ranks at a file that the launcher made a place for (or any URL that torch knows)."""
        if self.size == 1:
            return
        url = rendezvous if "://" in rendezvous else f"file://{rendezvous}"
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=url, rank=self.rank, world_size=self.size)

    def all_reduce(self, share: Tensor) -> Tensor:
        """The sum over all ranks; may reuse `share`."""
        if self.size == 1:
            return share
        if not self._is_ordered:
            dist.all_reduce(share)
            return share
        shares = [torch.empty_like(share) for _ in range(self.size)]
        dist.all_gather(shares, share.contiguous())
        total = shares[0]
        for other in shares[1:]:
            total += other
        return total

    def gather_columns(self, share: Tensor) -> Tensor:
        """On rank 0 all ranks' columns side by side; the others keep their own, which nobody reads."""
        if self.size == 1:
            return share
        if self.rank:
            dist.gather(share.contiguous(), dst=0)
            return share
        shares = [torch.empty_like(share) for _ in range(self.size)]
        dist.gather(share.contiguous(), shares, dst=0)
        return torch.cat(shares, dim=-1)

    def broadcast(self, values: Tensor) -> Tensor:
        """Rank 0's values on every rank; written into `values`."""
        if self.size > 1:
            dist.broadcast(values, src=0)
        return values

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class Share:
    """Part `index` of `parts` equal ones along dimension `dim`; the whole when parts is 1."""

    dim: int
    index: int
    parts: int

    def bounds(self, length: int) -> tuple[int, int]:
        """Where the part starts and ends in a dimension of this length."""
        size = length // self.parts
        return self.index * size, (self.index + 1) * size

    def narrow(self, tensor: Tensor) -> Tensor:
        """The part of a tensor."""
        start, end = self.bounds(tensor.shape[self.dim])
        return tensor.narrow(self.dim, start, end - start)


class ColumnParallelLinear(nn.Module):
    """Some of a linear layer's outputs; `gathers`: rank 0 puts all of them together."""

    def __init__(self, whole: nn.Linear, share: Share, group: TensorGroup, *, gathers: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(share.narrow(whole.weight.data), requires_grad=False)
        bias = None if whole.bias is None else share.narrow(whole.bias.data)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.shares = {"weight": share, "bias": share}
        self._group = group
        self._gathers = gathers

    def forward(self, hidden: Tensor) -> Tensor:
        part = linear(hidden, self.weight, self.bias)
        return self._group.gather_columns(part) if self._gathers else part


class RowParallelLinear(nn.Module):
    """Some of a linear layer's inputs: every rank's sum is a part of the result, which is added up."""

    def __init__(self, whole: nn.Linear, share: Share, group: TensorGroup) -> None:
        super().__init__()
        self.weight = nn.Parameter(share.narrow(whole.weight.data), requires_grad=False)
        self.bias = None if whole.bias is None else nn.Parameter(whole.bias.data, requires_grad=False)
        self.shares = {"weight": share}
        self._group = group

    def forward(self, hidden: Tensor) -> Tensor:
        total = self._group.all_reduce(linear(hidden, self.weight))
        return total if self.bias is None else total + self.bias


_COLUMN_STYLES = {"colwise": False, "colwise_gather_output": True, "colwise_rep": True}
_ROW_STYLES = {"rowwise"}
#: The parameter stays whole on every rank.
_WHOLE_STYLES = {"replicate", "replicated_with_grad_allreduce", "embedding_rowwise", "embedding_colwise"}


def kv_share(kv_heads: int, group: TensorGroup) -> Share:
    """Which KV heads this rank holds: an equal part, or one head that it repeats from other ranks."""
    parts = min(kv_heads, group.size)
    return Share(0, group.rank // (group.size // parts), parts)


def divide_linears(model: PreTrainedModel, group: TensorGroup) -> None:
    """Replace the linear layers that the model's plan divides; works on a model without memory (meta)."""
    if group.size == 1:
        return
    plan = {f"{model.base_model_prefix}.{name}": style for name, style in model.config.base_model_tp_plan.items()}
    plan["lm_head"] = "colwise_gather_output"
    rules = [(re.compile(re.escape(name).replace(r"\*", r"\d+")), style) for name, style in plan.items()]
    kv_heads = model.config.num_key_value_heads
    if kv_heads < group.size and group.rank == 0:
        _log.info("%d KV heads on %d ranks: each head is repeated on %d", kv_heads, group.size, group.size // kv_heads)
    for name, module in list(model.named_modules()):
        style = next((style for rule, style in rules if rule.fullmatch(name)), None)
        if style is None or style in _WHOLE_STYLES:
            continue
        parent, _, leaf = name.rpartition(".")
        is_kv = leaf in ("k_proj", "v_proj")
        share = kv_share(kv_heads, group) if is_kv else Share(0, group.rank, group.size)
        replacement = _divided(name, module, style, share, group)
        if replacement is not None:
            model.get_submodule(parent).register_module(leaf, replacement)


def _divided(name: str, module: nn.Module, style: str, share: Share, group: TensorGroup) -> nn.Module | None:
    if not isinstance(module, nn.Linear) or style not in _COLUMN_STYLES.keys() | _ROW_STYLES:
        raise UserError(f"{name}: dividing a {type(module).__name__} as {style} is not supported; use --tp-size 1")
    if style in _ROW_STYLES:
        return RowParallelLinear(module, Share(1, share.index, share.parts), group)
    if name == "lm_head" and module.out_features % group.size:
        _log.info("%d tokens cannot be divided by %d ranks: each computes all logits", module.out_features, group.size)
        return None
    return ColumnParallelLinear(module, share, group, gathers=_COLUMN_STYLES[style])
