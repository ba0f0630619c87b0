"""A checkpoint in a store: its bytes are copied into the parameters as they arrive.

The rank's rows of a divided matrix are a range of bytes; its columns are a part of every row, so that all rows pass by.
What parameters want of a file is read in one sweep, each chunk once, and never more than a few chunks are in memory
beside the parameters.  Called by `weights.py`, on the thread that loads.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sglang_hicache.connectors.manifest import Manifest
from sglang_hicache.connectors.safetensors_header import (
    DTYPE_BYTES,
    LENGTH_BYTES,
    StoredTensor,
    header_bytes,
    parse_header,
)
from sglang_hicache.connectors.source import open_blocking, weight_files
from sglang_hicache.connectors.stored_model import Extent, StoredModel
from sglang_hicache.errors import UserError
from sglang_hicache.workers.checkpoint import Wanted, check_shape, no_such_tensor

_log = logging.getLogger(__name__)

#: A large model takes minutes; this often the log says how far it has come.
_LOG_BYTES = 8 << 30

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class StreamedCheckpoint:
    """Safetensors of a store.  `directory`: what the launcher has pulled of the model."""

    def __init__(self, url: str, directory: str, stack: contextlib.ExitStack) -> None:
        place, manifest = open_blocking(url, directory)
        stack.enter_context(place)
        self._url = place.url
        self._model = StoredModel(place, manifest)
        self._tensors = self._read_headers(manifest, directory)

    def fill(self, wanted: Sequence[Wanted], device: torch.device) -> Iterator[tuple[Wanted, Tensor]]:
        """As `checkpoint.Checkpoint` says: in the order in which they are stored."""
        fillings = [self._filling(want, device) for want in wanted]
        for filling in fillings:
            if filling.is_full:  # of nothing: no bytes will come for it
                yield filling.want, filling.value
        read_bytes = told_bytes = 0
        for fragment in self._model.fragments([filling.extent for filling in fillings]):
            filling = fillings[fragment.index]
            filling.add(fragment.data)
            read_bytes += len(fragment.data)
            if read_bytes - told_bytes >= _LOG_BYTES:
                told_bytes = read_bytes
                _log.info("streamed %.1f GB of weights so far", read_bytes / 1e9)
            if filling.is_full:
                yield filling.want, filling.value
        _log.info("streamed %.1f MB of weights from %s", read_bytes / 1e6, self._url)

    def _filling(self, want: Wanted, device: torch.device) -> _Filling:
        stored = self._tensors.get(want.source)
        if stored is None:
            raise no_such_tensor(self._url, want)
        check_shape(self._url, want, stored.shape)
        if stored.dtype not in _DTYPES:
            raise UserError(
                f"{self._url}, {stored.file}: tensor {want.source} is {stored.dtype:.20}, which is not supported"
            )
        return _Filling(want, stored, device)

    def _read_headers(self, manifest: Manifest, directory: str) -> dict[str, StoredTensor]:
        files = weight_files(manifest, Path(directory), self._url)
        found: dict[str, StoredTensor] = {}
        for file, _, data in self._model.chunks((file, 0) for file in files if file.chunks):
            where = f"{self._url}, {file.name}"
            needed_bytes = header_bytes(bytes(data[:LENGTH_BYTES]), where)
            beginning = data if len(data) >= needed_bytes else self._model.read_file_blocking(file, needed_bytes)
            found.update(parse_header(bytes(beginning[:needed_bytes]), file.name, file.size_bytes, where))
        return found


class _Filling:
    """One parameter, and how far its bytes have come."""

    def __init__(self, want: Wanted, stored: StoredTensor, device: torch.device) -> None:
        self.want = want
        self.value = torch.empty(want.like.shape, dtype=want.like.dtype, device=device)
        self._dtype = _DTYPES[stored.dtype]
        self._item_bytes = DTYPE_BYTES[stored.dtype]
        #: The tensor seen as rows, and which columns of it are wanted: for whole rows one row that has everything.
        self._row, self._first, self._last = math.prod(want.like.shape), 0, math.prod(want.like.shape)
        start, end = stored.start, stored.end
        share = want.share
        if share is not None and share.dim == 0:
            start += share.index * self._row * self._item_bytes
            end = start + self._row * self._item_bytes
        elif share is not None:
            below = math.prod(stored.shape[share.dim + 1 :])
            self._row = stored.shape[share.dim] * below
            self._first, self._last = (bound * below for bound in share.bounds(stored.shape[share.dim]))
        self.extent = Extent(stored.file, start, end)
        self._rows = self.value.view(-1, self._last - self._first) if self.value.numel() else self.value
        #: Elements that have come, and the bytes of one that has not come whole.
        self._at = 0
        self._carry = b""

    @property
    def is_full(self) -> bool:
        """Everything has come."""
        return self._at * self._item_bytes == self.extent.end - self.extent.start

    def add(self, data: memoryview) -> None:
        """The next bytes of the extent."""
        if self._carry or len(data) % self._item_bytes:
            data = memoryview(self._carry + bytes(data))
            whole_bytes = len(data) - len(data) % self._item_bytes
            data, self._carry = data[:whole_bytes], bytes(data[whole_bytes:])
        if data:
            # A copy: the bytes may start anywhere in the file, and torch wants elements where the machine has them.
            self._put(torch.frombuffer(bytearray(data), dtype=self._dtype))

    def _put(self, elements: Tensor) -> None:
        while elements.numel():
            row, column = divmod(self._at, self._row)
            if column or elements.numel() < self._row:
                count = min(elements.numel(), self._row - column)
                first, last = max(column, self._first), min(column + count, self._last)
                if first < last:
                    target = self._rows[row, first - self._first : last - self._first]
                    target.copy_(elements[first - column : last - column])
            else:
                whole = elements.numel() // self._row
                count = whole * self._row
                self._rows[row : row + whole].copy_(elements[:count].view(whole, -1)[:, self._first : self._last])
            self._at += count
            elements = elements[count:]
