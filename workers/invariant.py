"""Parts of a model that exact numerics replace, and the number of rows a product must have.

Used by the weights loader when a server is asked for exact numerics.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class InvariantSiLU(nn.Module):
    """x / (1 + exp(-x)), step by step in fp32.

    The fused kernel computes most elements with a vector exponential and the few at the end of a thread's share
    with a scalar one, which differs in the last bit: an element's value would depend on how many come after it.
    Negation, addition and division round the same way in both, and the vector exponential serves every element.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        return (wide / torch.exp(-wide).add_(1)).to(hidden.dtype)


def make_invariant(model: PreTrainedModel) -> None:
    """Replace activations in place."""
    for module in list(model.modules()):
        if "act_fn" in dict(module.named_children()):
            module.register_module("act_fn", InvariantSiLU())
