"""What a stored page looks like: a header that says what the page is, its bytes, and a checksum over both.

Used by `checked.py`, and by backends that hash while a page is warm in the CPU's cache.  Pure: no file, thread, clock
or socket.  It never copies a payload: a payload is a view of the host pool, and the header travels in a small buffer
of its own (`preadv`, `pwritev`).  All numbers are little endian:

    offset  0  magic (8) · format version (2) · number of parts (2) · header size (4)
           16  namespace (32) · page key (32) · key of the parent page (32, zeros at the root)
          112  depth in pages (4) · head_start (4) · head_end (4) · zeros (4) · payload size (8)
          136  part table: up to 4 of name (16, zero padded) and size (8) · zeros (8)
          240  checksum (16): xxh3-128 over the payload and then the first 240 bytes of the header
          256  payload

A reader compares every field with what it expects, so that a file that was copied, renamed, or written by a server with
another model or layout is a miss and never someone else's KV.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import NamedTuple

import xxhash

#: Goes up when a byte of a stored page changes its meaning.
FORMAT_VERSION = 1

MAGIC = b"HICPAGE\n"
HEADER_BYTES = 256
ROOT_PARENT = bytes(32)

#: A page is read and hashed in pieces of this size: a piece stays in a core's L2 cache, a page of 8 MiB does not, and
#: hashing it from memory costs a fifth of the read speed.
CHUNK_BYTES = 256 * 1024

#: Pieces in which a page is hashed and written are larger: a file system sets up its cache in one go for a large write,
#: and smaller ones cost a tenth of the write speed.
WRITE_CHUNK_BYTES = 1024 * 1024

_HEADER = struct.Struct("<8sHHI32s32s32sIIIIQ96s8x16s")
_PART = struct.Struct("<16sQ")
_MOST_PARTS = 4
_CHECKED_BYTES = HEADER_BYTES - 16


class PageName(NamedTuple):
    """Name of one stored object: which model, which tokens, which KV heads."""

    #: 64 hex digits.
    namespace: str
    #: 32 bytes, the end of the hash chain over the tokens.
    key: bytes
    head_start: int
    head_end: int

    def __str__(self) -> str:
        return f"{self.namespace}/{self.key.hex()}/{self.head_start}-{self.head_end}"


class Part(NamedTuple):
    """A named piece of the payload; a page holds all of its parts or does not exist."""

    name: str
    size_bytes: int


class Verdict(enum.Enum):
    """Why a page that was read is good, or is none."""

    GOOD = "good"
    #: Not our format, another version, or other parts.
    FOREIGN = "foreign header"
    #: A header of ours that speaks of another page.
    OTHER_PAGE = "header of another page"
    CHECKSUM = "checksum"


class PageLayout:
    """What all pages of one rank have in common: namespace, heads and parts."""

    __slots__ = ("head_end", "head_start", "namespace", "namespace_bytes", "part_count", "part_table", "payload_bytes")

    def __init__(self, namespace: str, head_start: int, head_end: int, parts: tuple[Part, ...]) -> None:
        if not 0 < len(parts) <= _MOST_PARTS:
            raise ValueError(f"{len(parts)} parts, a page has 1 to {_MOST_PARTS}")
        self.namespace = namespace
        self.namespace_bytes = bytes.fromhex(namespace)
        self.head_start = head_start
        self.head_end = head_end
        self.part_count = len(parts)
        self.part_table = b"".join(_PART.pack(part.name.encode("ascii"), part.size_bytes) for part in parts)
        self.part_table = self.part_table.ljust(_MOST_PARTS * _PART.size, b"\0")
        self.payload_bytes = sum(part.size_bytes for part in parts)

    def name(self, key: bytes) -> PageName:
        """Name of the object that holds the page `key`."""
        return PageName(self.namespace, key, self.head_start, self.head_end)


class _Page:
    """A header to be, a payload, and the hash of the payload up to some byte."""

    __slots__ = ("_hash", "_hashed", "_layout", "name", "payload")

    def __init__(self, layout: PageLayout, key: bytes, payload: memoryview) -> None:
        if len(payload) != layout.payload_bytes:
            raise ValueError(f"a payload of {len(payload)} bytes, pages here have {layout.payload_bytes}")
        self.name = PageName(layout.namespace, key, layout.head_start, layout.head_end)
        self.payload = payload
        self._layout = layout
        self._hash = xxhash.xxh3_128()
        self._hashed = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {len(self.payload)} bytes>"

    @property
    def size_bytes(self) -> int:
        """Size of the whole object: header and payload."""
        return HEADER_BYTES + len(self.payload)

    def restart(self) -> None:
        """The page will be transferred once more, from the start."""
        self._hash = xxhash.xxh3_128()
        self._hashed = 0

    def _hash_up_to(self, end: int) -> None:
        start = self._hashed
        if end > start:
            self._hash.update(self.payload[start:end])
            self._hashed = end


class OutgoingPage(_Page):
    """A page to be written: the object is `header()` followed by `payload`."""

    __slots__ = ("_depth", "_parent", "_sealed")

    def __init__(self, layout: PageLayout, key: bytes, payload: memoryview, parent: bytes, depth: int) -> None:
        super().__init__(layout, key, payload)
        self._parent = parent or ROOT_PARENT
        self._depth = depth
        self._sealed = b""

    def chunks(self) -> Iterator[tuple[int, memoryview]]:
        """The payload in order, as (offset, bytes), each piece hashed just before it is handed out."""
        for start in range(0, len(self.payload), WRITE_CHUNK_BYTES):
            chunk = self.payload[start : start + WRITE_CHUNK_BYTES]
            self._hash_up_to(start + len(chunk))
            yield start, chunk

    def header(self) -> bytes:
        """The header; hashes what `chunks` has not handed out yet.  Every call returns the same bytes."""
        if not self._sealed:
            layout, name = self._layout, self.name
            self._hash_up_to(len(self.payload))
            header = _HEADER.pack(
                MAGIC, FORMAT_VERSION, layout.part_count, HEADER_BYTES, layout.namespace_bytes, name.key, self._parent,
                self._depth, name.head_start, name.head_end, 0, layout.payload_bytes, layout.part_table, b"",
            )[:_CHECKED_BYTES]  # fmt: skip
            self._hash.update(header)
            self._sealed = header + self._hash.digest()
        return self._sealed


class IncomingPage(_Page):
    """Where a backend puts a page that it reads, and the judgement of what arrived."""

    __slots__ = ("depth", "header", "parent")

    def __init__(self, layout: PageLayout, key: bytes, payload: memoryview) -> None:
        super().__init__(layout, key, payload)
        #: To be filled with exactly HEADER_BYTES.
        self.header = bytearray(HEADER_BYTES)
        #: Key of the parent and pages before this one, as a good header says.
        self.parent = ROOT_PARENT
        self.depth = 0

    def arrived(self, end: int) -> None:
        """A hint: payload[:end] is in place.  Hashing it now is cheaper than later; calling this is optional."""
        self._hash_up_to(end)

    def judge(self) -> Verdict:
        """Is this the page that was asked for, whole?  Call it once, when header and payload are in place."""
        (
            magic, version, part_count, header_bytes, namespace, key, self.parent, self.depth, head_start, head_end,
            _, payload_bytes, part_table, checksum,
        ) = _HEADER.unpack(self.header)  # fmt: skip
        layout, name = self._layout, self.name
        if magic != MAGIC or version != FORMAT_VERSION or header_bytes != HEADER_BYTES:
            return Verdict.FOREIGN
        if (
            namespace != layout.namespace_bytes
            or key != name.key
            or head_start != name.head_start
            or head_end != name.head_end
        ):
            return Verdict.OTHER_PAGE
        if part_count != layout.part_count or payload_bytes != layout.payload_bytes or part_table != layout.part_table:
            return Verdict.FOREIGN
        self._hash_up_to(payload_bytes)
        self._hash.update(self.header[:_CHECKED_BYTES])
        return Verdict.GOOD if self._hash.digest() == checksum else Verdict.CHECKSUM
