"""What a stored page looks like: a header that says what the page is, its bytes, and a checksum over both.

Used by `checked.py`, and by backends that hash while a page is warm in the CPU's cache.  Pure: no file, thread, clock
or socket.  It never copies a payload: a payload is a view of the host pool, and the header travels in a small buffer
of its own (`preadv`, `pwritev`).  All numbers are little endian:

    offset  0  magic (8) · format version (2) · number of parts (2) · header size (4)
           16  namespace (32) · page key (32) · key of the parent page (32, zeros at the root)
          112  depth in pages (4) · head_start (4) · head_end (4) · key id (4, zero: not encrypted) · payload size (8)
          136  part table: up to 4 of name (8, zero padded) and size (8)
          200  tenant (12, start of its namespace seed, zeros: none)
          212  nonce (12) · authentication tag (16), both zero if not encrypted
          240  checksum (16): xxh3-128 over the payload as it is stored and then the first 240 bytes of the header
          256  payload

A reader compares every field with what it expects, so that a file that was copied, renamed, or written by a server with
another model or layout is a miss and never someone else's KV.  An encrypted payload is bound to the first 212 bytes of
its header.  The checksum is over what is stored: damage is told apart from another key, and found without any key.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import xxhash

#: Goes up when a byte of a stored page changes its meaning.
FORMAT_VERSION = 2

MAGIC = b"HICPAGE\n"
HEADER_BYTES = 256
ROOT_PARENT = bytes(32)

#: A page is read and hashed in pieces of this size: a piece stays in a core's L2 cache, a page of 8 MiB does not, and
#: hashing it from memory costs a fifth of the read speed.
CHUNK_BYTES = 256 * 1024

#: Pieces in which a page is hashed and written are larger: a file system sets up its cache in one go for a large write,
#: and smaller ones cost a tenth of the write speed.
WRITE_CHUNK_BYTES = 1024 * 1024

_HEADER = struct.Struct("<8sHHI32s32s32sIIIIQ64s12s12s16s16s")
_PART = struct.Struct("<8sQ")
_MOST_PARTS = 4
_PART_NAME_BYTES = 8
_CHECKED_BYTES = HEADER_BYTES - 16

#: What an encrypted payload is bound to: everything before the nonce.
_BOUND_BYTES = 212
_NONCE_BYTES, _TAG_BYTES = 12, 16
_NOT_ENCRYPTED = bytes(_NONCE_BYTES + _TAG_BYTES)


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
    #: The bytes are what somebody wrote, but nobody who has the key.
    FORGED = "authentication tag"
    #: A whole page of another encryption key, or plain where ours are encrypted, or the reverse: no damage.
    OTHER_KEY = "made with another encryption key, or with none"


class Cipher(Protocol):
    """Encrypts payloads; see `encryption.py`."""

    #: Tells keys apart without telling them; never 0.
    key_id: int

    def encrypt(self, payload: memoryview, bound: bytes, into: memoryview) -> tuple[bytes, bytes]:
        """Encrypt and bind to `bound`; the nonce and the tag."""

    def decrypt(self, payload: memoryview, bound: bytes, nonce: bytes, tag: bytes) -> bool:
        """Decrypt in place; False if it is not what was encrypted, and then the payload is worthless."""


class PageHeader(NamedTuple):
    """What the header of a stored page says, true or not."""

    #: 64 hex digits.
    namespace: str
    key: bytes
    parent: bytes
    depth: int
    head_start: int
    head_end: int
    #: 0: not encrypted.
    key_id: int
    payload_bytes: int
    #: 12 bytes.
    tenant: bytes
    checksum: bytes


def parse_header(raw: bytes) -> PageHeader | None:
    """The header at the start of an object; None if it is none of ours, or of another format version."""
    if len(raw) < HEADER_BYTES:
        return None
    (
        magic, version, _, header_bytes, namespace, key, parent, depth, head_start, head_end, key_id, payload_bytes, _,
        tenant, _, _, checksum,
    ) = _HEADER.unpack_from(raw)  # fmt: skip
    if magic != MAGIC or version != FORMAT_VERSION or header_bytes != HEADER_BYTES:
        return None
    return PageHeader(
        namespace.hex(), key, parent, depth, head_start, head_end, key_id, payload_bytes, tenant, checksum
    )


def is_whole(raw: bytes, payload: Iterable[bytes]) -> bool:
    """Does the checksum in this header fit?  Needs to know neither the layout of the page nor its encryption key."""
    hashed = xxhash.xxh3_128()
    for piece in payload:
        hashed.update(piece)
    hashed.update(raw[:_CHECKED_BYTES])
    return hashed.digest() == raw[_CHECKED_BYTES:HEADER_BYTES]


class PageLayout:
    """What all pages of one rank have in common: namespace, heads and parts."""

    __slots__ = ("head_end", "head_start", "namespace", "namespace_bytes", "part_count", "part_table", "payload_bytes")

    def __init__(self, namespace: str, head_start: int, head_end: int, parts: tuple[Part, ...]) -> None:
        if not 0 < len(parts) <= _MOST_PARTS:
            raise ValueError(f"{len(parts)} parts, a page has 1 to {_MOST_PARTS}")
        if any(len(part.name) > _PART_NAME_BYTES for part in parts):
            raise ValueError(f"a part of {parts} has a name of more than {_PART_NAME_BYTES} bytes")
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

    __slots__ = ("_encrypted", "_key_id", "_sealed", "_tenant", "depth", "parent")

    def __init__(
        self, layout: PageLayout, key: bytes, payload: memoryview, parent: bytes, depth: int, tenant: bytes = b""
    ) -> None:
        super().__init__(layout, key, payload)
        #: Key of the parent (zeros at the root) and pages before this one.
        self.parent = parent or ROOT_PARENT
        self.depth = depth
        self._tenant = tenant
        self._key_id = 0
        #: Nonce and tag.
        self._encrypted = _NOT_ENCRYPTED
        self._sealed = b""

    def encrypt(self, cipher: Cipher, into: memoryview) -> None:
        """From now on the payload is the ciphertext, in `into`.  Before the first chunk, and once."""
        self._key_id = cipher.key_id
        self._encrypted = b"".join(cipher.encrypt(self.payload, self._checked_part()[:_BOUND_BYTES], into))
        self.payload = into

    def chunks(self) -> Iterator[tuple[int, memoryview]]:
        """The payload in order, as (offset, bytes), each piece hashed just before it is handed out."""
        for start in range(0, len(self.payload), WRITE_CHUNK_BYTES):
            chunk = self.payload[start : start + WRITE_CHUNK_BYTES]
            self._hash_up_to(start + len(chunk))
            yield start, chunk

    def header(self) -> bytes:
        """The header; hashes what `chunks` has not handed out yet.  Every call returns the same bytes."""
        if not self._sealed:
            self._hash_up_to(len(self.payload))
            header = self._checked_part()
            self._hash.update(header)
            self._sealed = header + self._hash.digest()
        return self._sealed

    def _checked_part(self) -> bytes:
        layout, name, encrypted = self._layout, self.name, self._encrypted
        return _HEADER.pack(
            MAGIC, FORMAT_VERSION, layout.part_count, HEADER_BYTES, layout.namespace_bytes, name.key, self.parent,
            self.depth, name.head_start, name.head_end, self._key_id, layout.payload_bytes, layout.part_table,
            self._tenant, encrypted[:_NONCE_BYTES], encrypted[_NONCE_BYTES:], b"",
        )[:_CHECKED_BYTES]  # fmt: skip


class IncomingPage(_Page):
    """Where a backend puts a page that it reads, and the judgement of what arrived."""

    __slots__ = ("_stored", "depth", "header", "parent")

    def __init__(self, layout: PageLayout, key: bytes, payload: memoryview) -> None:
        super().__init__(layout, key, payload)
        #: To be filled with exactly HEADER_BYTES.
        self.header = bytearray(HEADER_BYTES)
        #: Key of the parent and pages before this one, as a good header says.
        self.parent = ROOT_PARENT
        self.depth = 0
        #: What `judge_stored` has found.
        self._stored: Verdict | None = None

    def restart(self) -> None:
        super().restart()
        self._stored = None

    def arrived(self, end: int) -> None:
        """A hint: payload[:end] is in place.  Hashing it now is cheaper than later; calling this is optional."""
        self._hash_up_to(end)

    def judge(self, cipher: Cipher | None = None) -> Verdict:
        """Is this the page that was asked for, whole?  Call it once, when header and payload are in place: then the
        payload of a good page is decrypted."""
        verdict = self._stored or self.judge_stored()
        if verdict is not Verdict.GOOD:
            return verdict
        *_, key_id, _, _, _, nonce, tag, _ = _HEADER.unpack(self.header)
        if key_id != (cipher.key_id if cipher else 0):
            return Verdict.OTHER_KEY
        if cipher and not cipher.decrypt(self.payload, bytes(self.header[:_BOUND_BYTES]), nonce, tag):
            return Verdict.FORGED
        return Verdict.GOOD

    def judge_stored(self) -> Verdict:
        """The same without the encryption key: is it whole as it is stored, and under its own name?  May come before
        `judge`, which then hashes no byte a second time; who has filled the page anew since calls `restart`."""
        self._stored = self._judge_stored()
        return self._stored

    def _judge_stored(self) -> Verdict:
        (
            magic, version, part_count, header_bytes, namespace, key, self.parent, self.depth, head_start, head_end,
            _, payload_bytes, part_table, _, _, _, checksum,
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
        hashed = self._hash.copy()
        hashed.update(self.header[:_CHECKED_BYTES])
        return Verdict.GOOD if hashed.digest() == checksum else Verdict.CHECKSUM
