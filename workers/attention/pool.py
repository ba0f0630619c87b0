"""The device pool (L1) of one rank: keys and values of all layers, in pages.

The model worker owns it; the attention reads and writes it inside a forward, the copy engine between
forwards, both on the thread that calls the worker.  Who may use which page is decided by the scheduler.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_hicache.workers.batch import KVLayout

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: A workspace starts at this many tokens, so that short sequences do not grow it one step at a time.
_WORKSPACE_TOKENS = 1024


class DevicePool:
    """`kv[key or value, layer, page, slot, head, channel]`.

    In one layer a page is one contiguous block, which both the gather of a forward and a copy of whole pages
    want.  Zeroed at start: masked slots still enter the attention as 0 x value, and garbage that happens to be
    NaN would spread from there.
    """

    def __init__(self, layout: KVLayout, pages: int, device: torch.device) -> None:
        self.page_size = layout.page_size
        self.pages = pages
        self.device = device
        self.kv = torch.zeros(
            (2, layout.layers, pages, layout.page_size, layout.kv_heads_local, layout.head_dim),
            dtype=TORCH_DTYPES[layout.dtype],
            device=device,
        )
        # Views made once: two selects per layer and step would cost as much as a small layer's attention.
        self._key_pages, self._value_pages = (list(half.unbind(0)) for half in self.kv)
        self._key_slots = [pages.flatten(0, 1) for pages in self._key_pages]
        self._value_slots = [pages.flatten(0, 1) for pages in self._value_pages]
        self._workspace = self.kv.new_empty((2, 0, *self.kv.shape[3:]))

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [tokens, heads, channels] of new tokens at their slots."""
        self._key_slots[layer].index_copy_(0, slots, keys)
        self._value_slots[layer].index_copy_(0, slots, values)

    def gather(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [len(pages) * page_size, heads, channels] of these pages, valid until the next gather.

        Into a reused workspace: glibc gives large temporaries back to the kernel after every step, and taking
        the page faults again costs more than the copy.
        """
        count = len(pages)
        if self._workspace.shape[1] < count:
            room = max(count, 2 * self._workspace.shape[1], _WORKSPACE_TOKENS // self.page_size)
            self._workspace = self.kv.new_empty((2, room, *self.kv.shape[3:]))
        keys, values = self._workspace[0, :count], self._workspace[1, :count]
        torch.index_select(self._key_pages[layer], 0, pages, out=keys)
        torch.index_select(self._value_pages[layer], 0, pages, out=values)
        return keys.flatten(0, 1), values.flatten(0, 1)
