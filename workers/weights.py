"""A model from a directory of safetensors: built without memory, then filled with this rank's share.

Called by the model worker while it loads, and on its staging thread for every update of the weights.  Never holds
more of the checkpoint than one tensor beyond the share that stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sglang_hicache.errors import UserError
from sglang_hicache.weights_digest import weight_files
from sglang_hicache.workers.attention.interface import PAGED_ATTENTION
from sglang_hicache.workers.parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    Share,
    TensorGroup,
    divide_linears,
)


class _Checkpoint:
    """All tensors of a model directory by name, read slice by slice."""

    def __init__(self, path: str, stack: contextlib.ExitStack) -> None:
        self._path = path
        self._files = {}
        for file in weight_files(path):
            opened = stack.enter_context(safe_open(file, framework="pt"))
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def read(self, name: str, share: Share | None, like: Tensor, device: torch.device) -> Tensor:
        """A tensor, or this rank's share of it, in the dtype and shape of `like`."""
        file = self._files.get(name)
        if file is None:
            raise UserError(f"{self._path} has no tensor {name}: the checkpoint does not fit its config.json")
        stored = file.get_slice(name)
        shape, expected = list(stored.get_shape()), list(like.shape)
        if share is not None:
            expected[share.dim] *= share.parts
        # Before a byte is read: a file may have a tensor that is larger than any memory.
        if shape != expected:
            raise UserError(f"{self._path}: tensor {name} of shape {shape} does not fit the model's config.json")
        if share is None:
            part = stored[:]
        else:
            start, end = share.bounds(shape[share.dim])
            part = stored[start:end] if share.dim == 0 else stored[:, start:end]
        # Into fresh memory: a tensor that is a view of the file starts wherever the file has it, and some kernels
        # add up differently at other alignments.
        return torch.empty(like.shape, dtype=like.dtype, device=device).copy_(part)


def load_model(
    path: str, config: PretrainedConfig, *, dtype: torch.dtype, device: torch.device, group: TensorGroup
) -> PreTrainedModel:
    """The causal language model of a directory, this rank's share of it, attending through the device pool."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=PAGED_ATTENTION)
    divide_linears(model, group)
    with contextlib.ExitStack() as stack:
        checkpoint = _Checkpoint(path, stack)
        for want in _wanted(model):
            value = checkpoint.read(want.source, want.share, want.owner.get_parameter(want.leaf), device)
            want.owner.register_parameter(want.leaf, nn.Parameter(value, requires_grad=False))
    if config.tie_word_embeddings and isinstance(model.lm_head, nn.Linear):
        model.lm_head.weight = model.model.embed_tokens.weight
    _rebuild_buffers(model, device)
    return model.eval()


def read_weights(path: str, model: PreTrainedModel, check: Callable[[], None]) -> dict[str, Tensor]:
    """This rank's share of other weights for a loaded model, by parameter name, in main memory.

    `check` is called before each tensor and may raise.  The model itself is only asked for names and shapes.
    """
    found: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        checkpoint = _Checkpoint(path, stack)
        for want in _wanted(model):
            check()
            like = want.owner.get_parameter(want.leaf)
            found[want.name] = checkpoint.read(want.source, want.share, like, torch.device("cpu"))
    return found


@torch.no_grad()
def replace_weights(model: PreTrainedModel, staged: dict[str, Tensor]) -> None:
    """Overwrite the weights in place, so that whatever refers to them goes on with the new ones.  Empties `staged`."""
    while staged:
        name, value = staged.popitem()
        model.get_parameter(name).copy_(value)


class _Wanted(NamedTuple):
    """One parameter to fill, and what of the checkpoint belongs there."""

    owner: nn.Module
    leaf: str
    name: str
    source: str
    share: Share | None


def _wanted(model: PreTrainedModel) -> Iterator[_Wanted]:
    """Every parameter that has bytes of its own."""
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        share = owner.shares.get(leaf) if isinstance(owner, ColumnParallelLinear | RowParallelLinear) else None
        is_tied = name == "lm_head.weight" and model.config.tie_word_embeddings
        if is_tied and share is None:
            continue
        yield _Wanted(owner, leaf, name, "model.embed_tokens.weight" if is_tied else name, share)


def _rebuild_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Rotary frequencies are in no checkpoint: a module that was built without memory has to compute them now."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent, _, leaf = name.rpartition(".")
            with torch.device(device):
                model.get_submodule(parent).register_module(leaf, type(module)(module.config))
