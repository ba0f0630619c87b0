"""What a stored model consists of: its files, and a SHA-256 of every chunk of them.

    hicache-model.json                           the manifest; written last, so that what it lists is there
    files/<name>/<number>-<sha256 of the chunk>  every file in chunks of equal size, the last one shorter

The name of a chunk says what is in it.  So a chunk that is there is right, an interrupted upload goes on where it
was, and another model under the same URL never overwrites a chunk that somebody reads.  A folder that somebody copied
into a store has no manifest; `scan.py` makes one for it, whose chunks are parts of whole objects.  Reads and writes
nothing itself.
"""

from __future__ import annotations

import hashlib
import re
from typing import Literal, NamedTuple

import msgspec

from sglang_hicache.errors import StorageError, UserError

MANIFEST_NAME = "hicache-model.json"
CHUNKS = "files/"

#: A rank that wants one row of a tensor reads one chunk, and has a few of them in memory.
CHUNK_BYTES = 8 << 20
_SMALLEST_CHUNK_BYTES, _LARGEST_CHUNK_BYTES = 4096, 256 << 20

LARGEST_MANIFEST_BYTES = 256 << 20

_REPAIR = "save_model with --overwrite replaces it"
_FORMAT, _VERSION = "sglang-hicache model", 1
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK = re.compile(r"files/[A-Za-z0-9._!-]+/\d{6,}-[0-9a-f]{64}")
_UNSAFE = re.compile(rb"[^A-Za-z0-9._-]")
_LONGEST_PART = 120
_LONGEST_NAME_BYTES = 1000


class ModelFile(msgspec.Struct, frozen=True):
    """One file of a model."""

    #: Relative, with forward slashes.
    name: str
    size_bytes: int
    #: Of the whole file.
    sha256: str
    #: Of each chunk, in order.
    chunks: tuple[str, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A model, as somebody who reads it must find it."""

    chunk_bytes: int
    #: "chunks": each chunk is an object of its own; "whole": an object holds a whole file.
    layout: Literal["chunks", "whole"] = "chunks"
    files: tuple[ModelFile, ...]

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.files)

    def file(self, name: str) -> ModelFile | None:
        """The file of this name."""
        return next((file for file in self.files if file.name == name), None)

    def place(self, file: ModelFile, number: int) -> Place:
        """Where a chunk is."""
        start = number * self.chunk_bytes
        size_bytes = min(self.chunk_bytes, file.size_bytes - start)
        if self.layout == "whole":
            return Place(file.name, start, size_bytes, file.chunks[number])
        return Place(chunk_key(file.name, number, file.chunks[number]), 0, size_bytes, file.chunks[number])

    def keys(self) -> set[str]:
        """Keys of all chunks."""
        return {self.place(file, number).key for file in self.files for number in range(len(file.chunks))}


class Place(NamedTuple):
    """A chunk: a key, and the part of the object under it."""

    key: str
    start: int
    size_bytes: int
    sha256: str


class _Envelope(msgspec.Struct, frozen=True):
    """What is stored: the manifest, and proof that it is whole."""

    format: str
    version: int
    sha256: str
    model: msgspec.Raw


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes to store."""
    model = msgspec.json.encode(manifest)
    return msgspec.json.encode(_Envelope(_FORMAT, _VERSION, hashlib.sha256(model).hexdigest(), msgspec.Raw(model)))


def decode_manifest(data: bytes, where: str) -> Manifest:
    """StorageError: this is no manifest that can be trusted; `where`: its place, for the message."""
    try:
        envelope = msgspec.json.decode(data, type=_Envelope)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise StorageError(
            f"{where} is no manifest of a model: {error}; {_REPAIR}", "refused", "foreign_format"
        ) from None
    if envelope.format != _FORMAT or envelope.version != _VERSION:
        known = f"{_FORMAT!r} {_VERSION}"
        said = f"{envelope.format!r:.80} {envelope.version}"
        raise StorageError(f"{where} is of the form {said}; this version reads {known}", "refused", "foreign_format")
    if hashlib.sha256(bytes(envelope.model)).hexdigest() != envelope.sha256:
        raise StorageError(f"{where} is damaged: its checksum does not fit; {_REPAIR}", "refused", "corrupt")
    try:
        manifest = msgspec.json.decode(envelope.model, type=Manifest)
        _check(manifest)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, UserError) as error:
        raise StorageError(f"{where} cannot be used: {error}", "refused", "foreign_format") from None
    return manifest


def _check(manifest: Manifest) -> None:
    """Whoever wrote it may not have been `save_model`."""
    if not _SMALLEST_CHUNK_BYTES <= manifest.chunk_bytes <= _LARGEST_CHUNK_BYTES:
        raise UserError(f"it has chunks of {manifest.chunk_bytes} bytes")
    seen: set[str] = set()
    for file in manifest.files:
        check_name(file.name)
        if file.name in seen:
            raise UserError(f"it lists {file.name!r} twice")
        seen.add(file.name)
        if file.size_bytes < 0 or len(file.chunks) != -(-file.size_bytes // manifest.chunk_bytes):
            raise UserError(f"{file.name!r} has {len(file.chunks)} chunks and {file.size_bytes} bytes")
        if not all(_DIGEST.fullmatch(text) for text in (file.sha256, *file.chunks)):
            raise UserError(f"{file.name!r} has a checksum that is none")


def chunk_key(name: str, number: int, sha256: str) -> str:
    """Key of a chunk: any store takes it, whatever the file is called."""
    return f"{CHUNKS}{_escaped(name)}/{number:06d}-{sha256}"


def is_chunk_key(key: str) -> bool:
    """Could `chunk_key` have made this?"""
    return _CHUNK.fullmatch(key) is not None


def _escaped(name: str) -> str:
    """The name in letters, digits, and . _ - !, at most so long that a file system takes it."""
    plain = name.encode("utf-8", "surrogateescape")
    text = _UNSAFE.sub(lambda found: b"!%02X" % ord(found[0]), plain).decode()
    if len(text) > _LONGEST_PART or text.startswith("."):
        text = f"!{hashlib.sha256(plain).hexdigest()[:16]}!{text[:_LONGEST_PART]}"
    return text


def check_name(name: str) -> None:
    """Refuse a name that would lead out of the folder that it is written to.  UserError with the name."""
    parts = name.split("/")
    if not name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise UserError(f"the name {name!r:.200} would lead out of the folder that it is written to; it is refused")
    if len(name.encode("utf-8", "surrogateescape")) > _LONGEST_NAME_BYTES:
        raise UserError(f"the name {name!r:.80} has more than {_LONGEST_NAME_BYTES} bytes")
