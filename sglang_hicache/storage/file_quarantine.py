"""Pages that turned out to be bad, kept for whoever looks into the damage: `<root>/quarantine/<when>-<page>`.

Used by `file.py`.  What lies here has no page's path, so that no look-up finds it; it counts as used, and it is
bounded: the oldest go first.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from sglang_hicache.storage.file_folder import make_private
from sglang_hicache.storage.file_pages import QUARANTINE, entries_blocking
from sglang_hicache.storage.page_format import PageName

#: At most so many files, and at most this share of what the store may take.
MOST_FILES = 64
MOST_SHARE = 0.01

_OURS = re.compile(r"[0-9]{20}-[0-9a-f]{16}-[0-9a-f]{64}\.[0-9]+-[0-9]+\.page")


def kept_blocking(root: Path) -> Iterator[tuple[str, int]]:
    """Path and size of every page here, the latest first.  A folder of this name may have been there before the store
    was: whatever else lies in it belongs to somebody else."""
    entries = (entry for entry in entries_blocking(root / QUARANTINE) if _OURS.fullmatch(entry.name))
    for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
        with contextlib.suppress(FileNotFoundError):
            found = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(found.st_mode):
                yield entry.path, found.st_size


def set_aside_blocking(root: Path, path: str, name: PageName) -> bool:
    """Move a page here; False if it is gone.  What is no regular file is not worth keeping and is removed."""
    try:
        if not stat.S_ISREG(os.stat(path, follow_symlinks=False).st_mode):
            os.unlink(path)
            return True
        to = f"{root}/{QUARANTINE}/{time.time_ns():020d}-{name.namespace[:16]}-{os.path.basename(path)}"
        try:
            os.rename(path, to)
        except FileNotFoundError:
            make_private(root / QUARANTINE)
            os.rename(path, to)
    except FileNotFoundError:
        return False
    return True


def trim_blocking(root: Path, max_bytes: int) -> int:
    """Delete the oldest until what is left is within its bounds; bytes that this gave.  0: no bound in bytes."""
    kept_files = kept_bytes = freed_bytes = 0
    for path, size in kept_blocking(root):
        kept_files += 1
        kept_bytes += size
        if kept_files > MOST_FILES or (max_bytes and kept_bytes > MOST_SHARE * max_bytes):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
                freed_bytes += size
            kept_bytes -= size
            kept_files -= 1
    return freed_bytes
