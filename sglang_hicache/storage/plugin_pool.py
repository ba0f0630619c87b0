"""The host pool that a plug-in sees: memory of the storage process, with a slot for each page of a batch.

A plug-in reads and writes slots and never the rank's host pool.  So a thread of it that comes too late - after a read
was called off, after the rank gave the page to somebody else - spoils a slot that is copied and checked before anybody
uses it, and nothing else.  The price is one copy.

A slot holds one value: header and page, then zeros.  All values of a store have the same size, a multiple of 4096:
plug-ins count on that (their files and registered memory have places of one size), and direct I/O needs it.  The pool
says of itself what SGLang's says: layout `page_first`, a page of one index, one buffer for a page.

Owned by the backend.  Each direction has slots of its own, so that a read and a write may run at once.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from sglang_hicache.storage.page_format import HEADER_BYTES, OutgoingPage
from sglang_hicache.storage.plugin_interface import HostKVCache

VALUE_ALIGNMENT = 4096

#: Slots of one direction: as many as SGLang hands over at once, and no more bytes of pages than a lane's batch.
MOST_SLOTS = 128
MOST_BYTES = 32 << 20

#: The self-test writes a page of this size, however small those of the model are.
_LEAST_PAYLOAD = 4096


class StagingPool(HostKVCache):
    """Slots, as a tensor and as pointers.  Public names are those of SGLang's host pool."""

    #: What plug-ins ask SGLang's pool about.
    layout = "page_first"
    device = "cpu"
    page_size = 1
    layer_num = target_layer_num = head_num = 1
    start_layer, end_layer = 0, 1
    dcp_size, dcp_rank = 1, 0
    pin_memory = False
    stores_page_envelope = False
    shared_allocation_domain = None
    storage_format_tag = None
    pool_label = "kv"

    def __init__(self, page_bytes: int) -> None:
        content = HEADER_BYTES + max(page_bytes, _LEAST_PAYLOAD)
        self.value_bytes = -(-content // VALUE_ALIGNMENT) * VALUE_ALIGNMENT
        #: Slots of reads come first, then as many of writes.
        # By the pages alone, as a lane counts them: with their headers the last page of a batch would go by itself.
        self.slots = max(1, min(MOST_SLOTS, MOST_BYTES // max(page_bytes, _LEAST_PAYLOAD)))
        self.size = self.page_num = 2 * self.slots
        self.dtype = torch.uint8
        self.size_per_token = self.head_dim = self.value_bytes
        total = self.size * self.value_bytes
        #: Descriptor of the memory, for plug-ins that share it with a process of theirs.
        self.fd = os.memfd_create("hicache-plug-in", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, total)
        flat = torch.from_file(f"/proc/self/fd/{self.fd}", shared=True, size=total, dtype=torch.uint8)
        self.kv_buffer = flat.view(self.size, self.value_bytes)
        self._memory = memoryview(flat.numpy())

    def close(self) -> None:
        """The descriptor goes; the memory goes with the last tensor that leads to it."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    # ---- what plug-ins call

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        """Pointer and size of each slot."""
        base = self.kv_buffer.data_ptr()
        pointers = [base + int(index) * self.value_bytes for index in indices]
        return pointers, [self.value_bytes] * len(pointers)

    def get_page_buffer_element_size(self, split_factor: int = 1) -> int:
        """Bytes of the one buffer of a page."""
        return self.value_bytes // split_factor

    def get_size_per_token(self) -> int:
        """A page is one index here."""
        return self.value_bytes

    def get_ksize_per_token(self) -> int:
        """Keys and values are not told apart."""
        return self.value_bytes

    def get_data_page(self, index: Any, flat: bool = True) -> torch.Tensor:
        """The slot itself."""
        return self.kv_buffer[int(index)]

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """Room for one value."""
        return torch.zeros(self.value_bytes, dtype=torch.uint8)

    def set_from_flat_data_page(self, index: Any, data_page: torch.Tensor) -> None:
        """Fill a slot."""
        self.kv_buffer[int(index)].copy_(data_page.view(torch.uint8).flatten())

    def get_hybrid_pool_buffer(self) -> list[torch.Tensor]:
        """All memory that pointers lead into."""
        return [self.kv_buffer]

    def is_stride_page_aligned(self, page_size_bytes: int = VALUE_ALIGNMENT) -> bool:
        """Are all slots aligned so?"""
        return self.value_bytes % page_size_bytes == 0 and self.kv_buffer.data_ptr() % page_size_bytes == 0

    # ---- what the backend does

    def indices(self, slots: range) -> torch.Tensor:
        """Slots, as a plug-in gets them."""
        return torch.tensor(slots, dtype=torch.int64)

    def tensors(self, slots: range) -> list[torch.Tensor]:
        """The same as tensors."""
        return [self.kv_buffer[slot] for slot in slots]

    def copies(self, slots: range) -> list[torch.Tensor]:
        """The same as tensors of their own: a plug-in may keep what it is given, as SGLang gives it copies too."""
        # Not `clone`: torch would wake its threads for each of them.
        return [torch.frombuffer(bytearray(self.value(slot)), dtype=torch.uint8) for slot in slots]

    def fill(self, slot: int, page: OutgoingPage) -> None:
        """Put a page into a slot."""
        start = slot * self.value_bytes
        for offset, chunk in page.chunks():
            at = start + HEADER_BYTES + offset
            self._memory[at : at + len(chunk)] = chunk
        self._memory[start : start + HEADER_BYTES] = page.header()
        end = start + page.size_bytes
        self._memory[end : start + self.value_bytes] = bytes(start + self.value_bytes - end)

    def value(self, slot: int) -> memoryview:
        """What is in a slot now."""
        return self._memory[slot * self.value_bytes : (slot + 1) * self.value_bytes]

    def wipe(self, slots: range) -> None:
        """What an earlier page left must not pass for a value that a plug-in says it has put there."""
        for slot in slots:
            self._memory[slot * self.value_bytes : slot * self.value_bytes + HEADER_BYTES] = bytes(HEADER_BYTES)


def tensor_bytes(value: Any) -> memoryview | None:
    """The bytes of a tensor, wherever it lies; None: it is none, or one without plain bytes."""
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return memoryview(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    except (RuntimeError, TypeError, ValueError):
        return None
