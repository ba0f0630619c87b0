"""What a safetensors file holds and where: its header, read and checked without torch.

    8 bytes: length of the header, little endian | header, JSON | the bytes of all tensors

Nothing in it is believed: it may come from anywhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from sglang_hicache.errors import UserError

LENGTH_BYTES = 8
#: The format's own limit.
LARGEST_HEADER_BYTES = 100_000_000
#: torch has no more; a million of them would take an hour to multiply.
_MOST_DIMENSIONS = 64

_METADATA = "__metadata__"

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
    "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


class _Entry(msgspec.Struct):
    """One tensor, as the header has it."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class StoredTensor(NamedTuple):
    """A tensor in a file; `start` and `end` count from the file's beginning.  Its dtype may be one that is not in
    `DTYPE_BYTES`: nobody need want the tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def header_bytes(beginning: bytes, where: str) -> int:
    """Bytes in front of the tensors, from the first eight of a file."""
    length = int.from_bytes(beginning[:LENGTH_BYTES], "little")
    if len(beginning) < LENGTH_BYTES or not 2 <= length <= LARGEST_HEADER_BYTES:
        raise UserError(f"{where} is no safetensors file")
    return LENGTH_BYTES + length


def parse_header(beginning: bytes, file: str, size_bytes: int, where: str) -> dict[str, StoredTensor]:
    """The tensors of a file by name; `beginning`: its first bytes, at least the whole header."""
    first = header_bytes(beginning, where)
    try:
        raw = msgspec.json.decode(beginning[LENGTH_BYTES:first], type=dict[str, msgspec.Raw])
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items() if name != _METADATA}
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise UserError(f"{where} is no safetensors file: {error}") from None
    found = {}
    for name, entry in entries.items():
        start, end = (first + offset for offset in entry.data_offsets)
        known = DTYPE_BYTES.get(entry.dtype)
        if len(entry.shape) > _MOST_DIMENSIONS:
            raise UserError(f"{where}: tensor {name} has {len(entry.shape)} dimensions")
        count = math.prod(entry.shape) if all(length >= 0 for length in entry.shape) else -1
        if not first <= start <= end <= size_bytes or (known is not None and end - start != count * known):
            raise UserError(f"{where}: tensor {name} is not where the header says")
        found[name] = StoredTensor(file, entry.dtype, tuple(entry.shape), start, end)
    return found
