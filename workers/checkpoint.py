"""Where a rank's weights come from: the parameters that it wants, and a checkpoint that fills them.

Called by `weights.py`, on the thread that loads; `LocalCheckpoint` reads a folder, `streamed_checkpoint.py` a store.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sglang_hicache.errors import UserError
from sglang_hicache.weights_digest import weight_files
from sglang_hicache.workers.parallel import Share


class Wanted(NamedTuple):
    """One parameter to fill, and what of the checkpoint belongs there."""

    owner: nn.Module
    leaf: str
    name: str
    source: str
    share: Share | None

    @property
    def like(self) -> Tensor:
        """What the model has in this place: shape and dtype of the result."""
        return self.owner.get_parameter(self.leaf)

    def stored_shape(self) -> list[int]:
        """What the checkpoint must have for it."""
        shape = list(self.like.shape)
        if self.share is not None:
            shape[self.share.dim] *= self.share.parts
        return shape


class Checkpoint(Protocol):
    """All tensors of a model, by name."""

    def fill(self, wanted: Sequence[Wanted], device: torch.device) -> Iterator[tuple[Wanted, Tensor]]:
        """Each of them with its tensor, or this rank's share of it, in the dtype and shape of `like`; in any order."""


class LocalCheckpoint:
    """Safetensors of a folder, mapped and read slice by slice, in the order in which they are wanted."""

    def __init__(self, path: str, stack: contextlib.ExitStack) -> None:
        self._path = path
        self._files = {}
        for file in weight_files(path):
            opened = stack.enter_context(safe_open(file, framework="pt"))
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def fill(self, wanted: Sequence[Wanted], device: torch.device) -> Iterator[tuple[Wanted, Tensor]]:
        """As `Checkpoint` says."""
        for want in wanted:
            yield want, self._read(want, device)

    def _read(self, want: Wanted, device: torch.device) -> Tensor:
        file = self._files.get(want.source)
        if file is None:
            raise no_such_tensor(self._path, want)
        stored = file.get_slice(want.source)
        check_shape(self._path, want, stored.get_shape())
        if want.share is None:
            part = stored[:]
        else:
            start, end = want.share.bounds(stored.get_shape()[want.share.dim])
            part = stored[start:end] if want.share.dim == 0 else stored[:, start:end]
        # Into fresh memory: a tensor that is a view of the file starts wherever the file has it, and some kernels
        # add up differently at other alignments.
        return torch.empty(want.like.shape, dtype=want.like.dtype, device=device).copy_(part)


def no_such_tensor(place: str, want: Wanted) -> UserError:
    """The checkpoint lacks it."""
    return UserError(f"{place} has no tensor {want.source}: the checkpoint does not fit its config.json")


def check_shape(place: str, want: Wanted, shape: Sequence[int]) -> None:
    """Before a byte is read: a file may have a tensor that is larger than any memory."""
    if list(shape) != want.stored_shape():
        raise UserError(f"{place}: tensor {want.source} of shape {list(shape)} does not fit the model's config.json")
