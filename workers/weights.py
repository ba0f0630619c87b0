"""A model from a directory of safetensors: built without memory, then filled with this rank's share.

Called once by the model worker while it loads.  Never holds more of the checkpoint than one tensor beyond the
share that stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
        if share is None:
            part = stored[:]
        else:
            start, end = share.bounds(stored.get_shape()[share.dim])
            part = stored[start:end] if share.dim == 0 else stored[:, start:end]
        if part.shape != like.shape:
            raise UserError(
                f"{self._path}: tensor {name} of shape {list(stored.get_shape())} does not fit the model's config.json"
            )
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
        for owner, leaf, name in _parameters(model):
            share = owner.shares.get(leaf) if isinstance(owner, ColumnParallelLinear | RowParallelLinear) else None
            is_tied = name == "lm_head.weight" and config.tie_word_embeddings
            if is_tied and share is None:
                continue
            source = "model.embed_tokens.weight" if is_tied else name
            value = checkpoint.read(source, share, owner.get_parameter(leaf), device)
            owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    if config.tie_word_embeddings and isinstance(model.lm_head, nn.Linear):
        model.lm_head.weight = model.model.embed_tokens.weight
    _rebuild_buffers(model, device)
    return model.eval()


def _parameters(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, str]]:
    """Every parameter as (module that owns it, name there, full name)."""
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        parent, _, leaf = name.rpartition(".")
        yield model.get_submodule(parent), leaf, name


def _rebuild_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Rotary frequencies are in no checkpoint: a module that was built without memory has to compute them now."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent, _, leaf = name.rpartition(".")
            with torch.device(device):
                model.get_submodule(parent).register_module(leaf, type(module)(module.config))
