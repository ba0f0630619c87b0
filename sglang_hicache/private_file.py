"""Files that hold what nobody else may read: keys, and configs with passwords in them.

Used wherever such a file is read or written.  Both ways look at the open file and never at its name alone: the name may
mean another file a moment later.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from sglang_hicache.errors import HiCacheError

# A link in the file's place may be somebody else's; without O_NONBLOCK a named pipe would hold the caller for ever.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class NotPrivate(HiCacheError):
    """Says what is wrong with a file, as the second half of a sentence that begins with its name."""


def read_private_blocking(path: str | Path, most_bytes: int) -> bytes:
    """The start of a file that nobody but this user could have read or written."""
    try:
        descriptor = os.open(path, _READ_FLAGS)
    except OSError as error:
        raise NotPrivate(f"cannot be opened ({error.strerror}); a symbolic link is not followed") from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise NotPrivate("is no regular file")
        if found.st_uid != os.geteuid():
            raise NotPrivate(f"belongs to user {found.st_uid}; it must belong to {os.geteuid()}, who runs this server")
        if found.st_mode & 0o077:
            raise NotPrivate(f"has mode {stat.S_IMODE(found.st_mode):04o}; nobody else may read it: chmod 600")
        return os.read(descriptor, most_bytes)
    except OSError as error:
        raise NotPrivate(f"cannot be read ({error.strerror})") from error
    finally:
        os.close(descriptor)


def write_private_blocking(path: Path, content: bytes, *, replaces: bool = True) -> None:
    """The whole file or none of it, whenever the machine stops.  OSError; FileExistsError if it must not replace one.

    The name is taken by a link where it must be new, because a rename would silently win over another process.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, _WRITE_FLAGS, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replaces:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    sync_folder_blocking(path.parent)


def sync_folder_blocking(folder: Path) -> None:
    """Names in this folder reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
