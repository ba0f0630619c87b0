"""The folder of a file store: which one, whose, and the corners of it in which single processes write.

Used by `file.py` when a store is opened, written and closed.  A folder that somebody else may write is refused, because
pages from it go into answers.  A temporary folder belongs to the process that holds the `flock` on its `lock` file; the
kernel drops that lock with the process, so that the next one to open the store can tell what the dead left behind.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import pwd
import secrets
import shutil
import stat
from pathlib import Path

from sglang_hicache.errors import StorageError

#: A default only: a folder named in the extra config wins over it.
STORAGE_DIR_ENV = "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class TemporaryFolder:
    """The folder in which one process writes pages that have no name yet.  It lives as long as its lock is held."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        self._numbers = itertools.count()

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
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def storage_folder(explicit: str) -> Path:
    """Which folder: the one in the extra config, else the environment's, else a private one of this user."""
    chosen = explicit or os.environ.get(STORAGE_DIR_ENV, "")
    if chosen:
        return Path(chosen).expanduser().absolute()
    home = os.environ.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rules say that a relative path there is to be ignored.
    base = Path(cache) if os.path.isabs(cache) else Path(home) / ".cache"
    return base / "sglang_hicache" / "storage"


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
        raise StorageError(f"storage folder {root} is not a folder; name another one", "refused")
    if found.st_uid != os.geteuid():
        raise StorageError(
            f"storage folder {root} belongs to user {found.st_uid}, this server runs as {os.geteuid()}; "
            "name a folder of your own",
            "refused",
        )
    if found.st_mode & _OTHERS_WRITE:
        raise StorageError(
            f"storage folder {root} can be written by others (mode {stat.S_IMODE(found.st_mode):o}); "
            f"run: chmod go-w {root}",
            "refused",
        )
    for parent in Path(os.path.realpath(root)).parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise StorageError(
                f"storage folder {root} lies in {parent}, which everybody can write (mode {stat.S_IMODE(mode):o}): "
                f"somebody could put another folder in its place; run: chmod o-w {parent}",
                "refused",
            )


def sweep(parent: Path) -> None:
    """Remove the temporary folders whose process is dead: nobody holds their lock."""
    for folder in list(parent.iterdir()):
        try:
            lock = os.open(folder / "lock", os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            # Not ours, swept by another rank this moment, or just being made and without a lock yet.
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)
