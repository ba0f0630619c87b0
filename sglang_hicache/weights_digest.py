"""Which files hold a model's weights, and one digest of what they say.

The digest is the part of a page's name that no other fact may replace: two checkpoints under the same name, or
one path whose files changed, must never read each other's pages.  It is made of contents only.  Reading
gigabytes at every start would be slow, so each file's own digest is kept in a private cache under the file's
inode, size and times of change: a hint where to look, never a part of the digest.  Called by the launcher once per
start, and for every update of the weights by the tokenizer process and the ranks, on a thread; no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

import msgspec

from sglang_hicache.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_READ_BYTES = 8 << 20

#: An index of the largest checkpoints has a few MiB.
_LARGEST_INDEX_BYTES = 64 << 20


class _Index(msgspec.Struct):
    """The part of a sharded checkpoint's index that says which file holds which tensor."""

    weight_map: dict[str, str]


class _CachedDigest(msgspec.Struct, frozen=True):
    """A file as it was when it was read, and what it said."""

    inode: int
    size_bytes: int
    mtime_ns: int
    #: Nobody can set this one back: `cp -p` and `rsync -t` do so with the other.
    ctime_ns: int
    digest: str

    @classmethod
    def of(cls, status: os.stat_result, digest: str) -> _CachedDigest:
        """What is remembered of a file that was like this before it was read."""
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, digest)


def default_cache_file() -> str:
    """Where the digests of this user's weight files are kept."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(folder, "sglang-hicache", "weights_digests.json"))


def weight_files(path: str) -> list[Path]:
    """The safetensors files of a model directory, in name order; other files there are not weights."""
    folder = Path(path)
    index = folder / INDEX_NAME
    if index.exists():
        files = [folder / name for name in names_in_index(index, str(index))]
    elif (folder / SINGLE_NAME).is_file():
        files = [folder / SINGLE_NAME]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} holds no safetensors weights; expected {SINGLE_NAME} or {INDEX_NAME}")
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing: {INDEX_NAME} names it; download the model again")
    return files


def names_in_index(index: Path, where: str) -> list[str]:
    """The weight files that an index names, in name order; `where`: what to call it in a message."""
    try:
        names = sorted(set(msgspec.json.decode(_read_index(index), type=_Index).weight_map.values()))
    except (msgspec.MsgspecError, OSError, RecursionError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read as a weights index: {error}") from error
    for name in names:
        # An index may come from the hub: it must not have other files of this machine looked for, or read.
        if "/" in name or name in ("", ".", "..") or "\0" in name:
            raise UserError(f"{where} names a file outside its folder: {name!r:.80}")
    return names


def _read_index(index: Path) -> bytes:
    """Of a plain file of bounded size: a pipe would hold the caller, and a device fill the memory."""
    descriptor = os.open(index, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with open(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_INDEX_BYTES:
            raise OSError(f"it is no plain file of at most {_LARGEST_INDEX_BYTES} bytes")
        return stream.read(_LARGEST_INDEX_BYTES)


def weights_digest(path: str, cache_file: str) -> str:
    """SHA-256 over the names and contents of the weight files, 64 hex digits."""
    cache = _read_cache(cache_file)
    fresh: dict[str, _CachedDigest] = {}
    digests: list[tuple[str, str]] = []
    for file in weight_files(path):
        name = str(file.resolve())
        known = cache.get(name)
        status = file.stat()
        if known is None or known != _CachedDigest.of(status, known.digest):
            known = fresh[name] = _CachedDigest.of(status, _hash_file(file))
        digests.append((file.name, known.digest))
    if fresh:
        _write_cache(cache_file, cache | fresh)
    return digest_of_files(digests)


def digest_of_files(files: Iterable[tuple[str, str]]) -> str:
    """One digest from the names and digests of all weight files, in name order, wherever they are."""
    whole = hashlib.sha256()
    for name, digest in files:
        # The name says which shard it is; both parts have a fixed end, so no two lists of files run together.
        whole.update(name.encode() + b"\0" + bytes.fromhex(digest))
    return whole.hexdigest()


def _hash_file(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _read_cache(cache_file: str) -> dict[str, _CachedDigest]:
    """What is known; nothing when the cache is missing, broken, or could have been written by somebody else.

    Who can write this file can make two models share their pages, so a file of another user, or one that others
    may write, counts as missing.
    """
    try:
        descriptor = os.open(cache_file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return {}
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
            return {}
        try:
            return msgspec.json.decode(stream.read(), type=dict[str, _CachedDigest])
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            return {}


def _write_cache(cache_file: str, entries: dict[str, _CachedDigest]) -> None:
    """Replace the cache in one step.  A cache that cannot be written costs the next start some time, no more."""
    folder = os.path.dirname(cache_file) or "."
    with contextlib.suppress(OSError):
        os.makedirs(folder, mode=0o700, exist_ok=True)
        # mkstemp makes the file 0600.
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".weights-")
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(msgspec.json.encode(entries))
        os.replace(temporary, cache_file)
