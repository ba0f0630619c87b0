"""A model from safetensors in a directory or a store: built without memory, then filled with this rank's share.

Called by the model worker while it loads, and on its staging thread for every update of the weights.  Never holds
more of the checkpoint than one tensor, or a few chunks of a stored one, beyond the share that stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sglang_hicache.workers.attention.interface import PAGED_ATTENTION
from sglang_hicache.workers.checkpoint import Checkpoint, LocalCheckpoint, Wanted
from sglang_hicache.workers.parallel import ColumnParallelLinear, RowParallelLinear, TensorGroup, divide_linears
from sglang_hicache.workers.streamed_checkpoint import StreamedCheckpoint


def open_checkpoint(path: str, weights_url: str, stack: contextlib.ExitStack) -> Checkpoint:
    """The weights of a folder, or of the store that `weights_url` names; closed with `stack`."""
    return StreamedCheckpoint(weights_url, path, stack) if weights_url else LocalCheckpoint(path, stack)


def load_model(
    path: str,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    group: TensorGroup,
    weights_url: str = "",
) -> PreTrainedModel:
    """The causal language model of a directory, this rank's share of it, attending through the device pool."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=PAGED_ATTENTION)
    divide_linears(model, group)
    with contextlib.ExitStack() as stack:
        checkpoint = open_checkpoint(path, weights_url, stack)
        for want, value in checkpoint.fill(list(_wanted(model)), device):
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
        check()
        for want, value in LocalCheckpoint(path, stack).fill(list(_wanted(model)), torch.device("cpu")):
            found[want.name] = value
            check()
    return found


@torch.no_grad()
def replace_weights(model: PreTrainedModel, staged: dict[str, Tensor]) -> None:
    """Overwrite the weights in place, so that whatever refers to them goes on with the new ones.  Empties `staged`."""
    while staged:
        name, value = staged.popitem()
        model.get_parameter(name).copy_(value)


def _wanted(model: PreTrainedModel) -> Iterator[Wanted]:
    """Every parameter that has bytes of its own."""
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        share = owner.shares.get(leaf) if isinstance(owner, ColumnParallelLinear | RowParallelLinear) else None
        is_tied = name == "lm_head.weight" and model.config.tie_word_embeddings
        if is_tied and share is None:
            continue
        yield Wanted(owner, leaf, name, "model.embed_tokens.weight" if is_tied else name, share)


def _rebuild_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Rotary frequencies are in no checkpoint: a module that was built without memory has to compute them now."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent, _, leaf = name.rpartition(".")
            with torch.device(device):
                model.get_submodule(parent).register_module(leaf, type(module)(module.config))
