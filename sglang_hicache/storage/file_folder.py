"""The folder of a file store: which one, whose, and the corners of it in which single processes write.

Used by `file.py` when a store is opened, written and closed.  A folder that somebody else may write is refused, because
pages from it go into answers.  A temporary folder belongs to the process that holds the `flock` on its `lock` file; the
kernel drops that lock with the process, so that the others can tell what the dead left behind.  The lock file is also
the process's *lease*: whose pages it reads, how much it lets the store take, and what it has written.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import pwd
import re
import secrets
import shutil
import stat
import struct
from pathlib import Path
from typing import NamedTuple

import msgspec

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.file_pages import EVICTOR_LOCK, NAMESPACE, QUARANTINE, TMP, USAGE, entries_blocking
from sglang_hicache.storage.settings import FileSettings

#: A default only: a folder named in the extra config wins over it.
STORAGE_DIR_ENV = "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"

#: Defaults only, as well.
_SETTING_ENVS = {
    "max_size": "SGLANG_HICACHE_FILE_BACKEND_MAX_SIZE",
    "min_free_space": "SGLANG_HICACHE_FILE_BACKEND_MIN_FREE_SPACE",
    "eviction_ratio": "SGLANG_HICACHE_FILE_BACKEND_EVICTION_RATIO",
}

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

#: Folders in `tmp/` that are ours.  A store may be attached at a folder that has a `tmp/` of its own, in which others
#: keep what they work at.
_TEMPORARY = re.compile(r"[0-9]+-[0-9a-f]{16}")

#: Without O_NONBLOCK a named pipe in the lock's place would hold whoever looks.
_LOOK_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK

_LEASE = struct.Struct("<8s64sqqqqq")
_LEASE_MAGIC = b"HICUSER\n"


class Lease(NamedTuple):
    """What a living process says of itself to all others on the same root."""

    #: Namespace whose pages it uses.
    namespace: str
    #: Size of the files that it writes.
    page_bytes: int
    #: Most that it lets the whole store take; 0: it does not say.
    max_bytes: int
    #: Seconds after which it lets unused pages go; 0: never.
    ttl_s: int
    #: Bytes and files that it has written less what it has deleted, since it opened the store.
    bytes: int = 0
    files: int = 0

    def pack(self) -> bytes:
        """As it stands in the lock file."""
        namespace, *numbers = self
        return _LEASE.pack(_LEASE_MAGIC, namespace.encode("ascii"), *numbers)

    @classmethod
    def unpack(cls, raw: bytes) -> Lease | None:
        """None: no lease, or of a process that has not written it yet."""
        if len(raw) != _LEASE.size or not raw.startswith(_LEASE_MAGIC):
            return None
        _, namespace, *numbers = _LEASE.unpack(raw)
        return cls(namespace.rstrip(b"\0").decode("ascii", "replace"), *numbers)


class TemporaryFolder:
    """The folder in which one process writes pages that have no name yet.  It lives as long as its lock is held."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        self._numbers = itertools.count()

    def tell(self, lease: Lease) -> None:
        """Let the others know."""
        os.pwrite(self._lock, lease.pack(), 0)

    @classmethod
    def create(cls, parent: Path, rank: int) -> TemporaryFolder:
        while True:
            path = parent / f"{rank}-{secrets.token_hex(8)}"
            path.mkdir(mode=0o700)
            try:
                lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            except FileNotFoundError:
                continue
            # A sweeper may have taken the lock of the new folder for a dead one's before we had it; then the lock file
            # is unlinked by the time we get it, and the folder is gone: start again.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock).st_nlink:
                return cls(path, lock)
            os.close(lock)

    def next_path(self) -> str:
        """A path that was never used."""
        return f"{self.path}/{next(self._numbers)}"

    def close(self) -> None:
        _remove(self.path)
        os.close(self._lock)


def storage_folder(explicit: str) -> Path:
    """Which folder: the one in the extra config, else the environment's, else a private one of this user."""
    chosen = explicit or os.environ.get(STORAGE_DIR_ENV, "")
    if chosen:
        try:
            return Path(chosen).expanduser().absolute()
        except RuntimeError as error:
            complaint = f"storage folder {chosen!r}: {error}; name it in full"
            raise StorageError(complaint, "refused", "bad_config") from error
    home = os.environ.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rules say that a relative path there is to be ignored.
    base = Path(cache) if os.path.isabs(cache) else Path(home) / ".cache"
    return base / "sglang_hicache" / "storage"


def with_environment(settings: FileSettings) -> FileSettings:
    """The settings, and where they say nothing what the environment says."""
    given = msgspec.structs.asdict(settings)
    found = {key: os.environ[env] for key, env in _SETTING_ENVS.items() if os.environ.get(env) and given[key] is None}
    if given["low_watermark"] is not None:
        found.pop("eviction_ratio", None)
    try:
        return msgspec.convert(given | found, FileSettings, strict=False)
    except msgspec.ValidationError as error:
        names = ", ".join(_SETTING_ENVS[key] for key in found)
        raise StorageError(f"{names} in the environment: {error}", "refused", "bad_config") from error


def make_private(folder: Path) -> None:
    """Make the folder and what is missing above it, for this user alone whatever the umask says."""
    missing = [folder, *folder.parents]
    for path in reversed(missing[: next(i for i, path in enumerate(missing) if path.exists())]):
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            # Another rank was faster.
            continue


def refuse_unsafe(root: Path) -> None:
    """A page is only as trustworthy as the folder: whoever may write there may plant KV in somebody's answer."""
    found = root.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise StorageError(f"storage folder {root} is not a folder; name another one", "refused", "bad_config")
    if found.st_uid != os.geteuid():
        raise StorageError(
            f"storage folder {root} belongs to user {found.st_uid}, this server runs as {os.geteuid()}; "
            "name a folder of your own",
            "refused",
            "no_permission",
        )
    if found.st_mode & _OTHERS_WRITE:
        raise StorageError(
            f"storage folder {root} can be written by others (mode {stat.S_IMODE(found.st_mode):o}); "
            f"run: chmod go-w {root}",
            "refused",
            "no_permission",
        )
    for parent in Path(os.path.realpath(root)).parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise StorageError(
                f"storage folder {root} lies in {parent}, which everybody can write (mode {stat.S_IMODE(mode):o}): "
                f"somebody could put another folder in its place; run: chmod o-w {parent}",
                "refused",
                "no_permission",
            )
    _refuse_unsafe_inside(root)


def _refuse_unsafe_inside(root: Path) -> None:
    """What somebody put here while the root was open to others is theirs still, also after its mode was changed."""
    for entry in entries_blocking(root):
        if not NAMESPACE.fullmatch(entry.name) and entry.name not in (TMP, QUARANTINE, EVICTOR_LOCK, USAGE):
            continue
        found, complaint = entry.stat(follow_symlinks=False), ""
        if entry.name in (TMP, QUARANTINE) and not stat.S_ISDIR(found.st_mode):
            complaint = f"is no folder; remove it: rm {entry.path}"
        elif entry.name in (EVICTOR_LOCK, USAGE) and not stat.S_ISREG(found.st_mode):
            complaint = f"is no regular file; remove it: rm {entry.path}"
        elif found.st_uid != os.geteuid():
            complaint = f"belongs to user {found.st_uid}; remove it: rm -r {entry.path}"
        elif found.st_mode & _OTHERS_WRITE and not stat.S_ISLNK(found.st_mode):
            mode = stat.S_IMODE(found.st_mode)
            complaint = f"can be written by others (mode {mode:o}); run: chmod -R go-w {entry.path}"
        if complaint:
            complaint = f"storage folder {root} cannot be trusted: {entry.name} {complaint}"
            raise StorageError(complaint, "refused", "no_permission")


def leases_blocking(parent: Path) -> dict[str, Lease]:
    """What the processes on this root say of themselves, by the name of their folder; some may be dead."""
    leases = {}
    for name in filter(_TEMPORARY.fullmatch, os.listdir(parent)):
        try:
            descriptor = os.open(parent / name / "lock", os.O_RDONLY | _LOOK_FLAGS)
        except OSError:
            # Not ours, swept by another process this moment, or just being made and without a lock yet.
            continue
        try:
            lease = Lease.unpack(os.read(descriptor, _LEASE.size + 1))
        finally:
            os.close(descriptor)
        if lease is not None:
            leases[name] = lease
    return leases


def sweep(parent: Path) -> None:
    """Remove the temporary folders whose process is dead: nobody holds their lock."""
    for folder in [path for path in parent.iterdir() if _TEMPORARY.fullmatch(path.name)]:
        try:
            lock = os.open(folder / "lock", os.O_RDWR | _LOOK_FLAGS)
        except FileNotFoundError:
            # Just being made, and then its maker makes another one; or left by one that died in between.
            with contextlib.suppress(OSError):
                folder.rmdir()
            continue
        except OSError:
            # As above.
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a temporary folder, its lock last: what a process that is killed meanwhile leaves can be told from what
    others are making, and swept."""
    for entry in entries_blocking(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        elif entry.name != "lock":
            with contextlib.suppress(OSError):
                os.unlink(entry.path)
    shutil.rmtree(folder, ignore_errors=True)
