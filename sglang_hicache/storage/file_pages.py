"""Where a page of a file store lies, and which files under a root are pages of ours.

    <root>/<namespace>/<first two digits of the key>/<key>.<head_start>-<head_end>.page

and beside the namespaces what `OWN_NAMES` lists.  Used by `file.py` (one namespace), by `file_index.py` (all of them,
folder by folder) and by whoever looks at a store that no server has open.  Ours is a regular file at such a path whose
first bytes are our magic, or that is too short to hold them: a page that a power cut tore.  Whatever else lies under
the root belongs to somebody else.  Nothing here writes, and no link is followed.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sglang_hicache.storage.page_format import HEADER_BYTES, MAGIC, PageName

#: Without O_NONBLOCK a named pipe in a page's place would hold a reader for ever.
READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK

#: Files touched less than this ago are left alone: a touch costs as much as reading a small page.
TOUCH_INTERVAL_S = 60.0

#: What else the store keeps in its root: pages being written, bad pages, who may evict, and what was counted.
TMP, QUARANTINE, EVICTOR_LOCK, USAGE = OWN_NAMES = ("tmp", "quarantine", "evictor.lock", "usage.json")

#: Gone, or a link, a folder, a pipe or a socket has taken the place meanwhile.
_NO_FILE = (errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ESPIPE, errno.ENXIO)

#: Name of a folder with the pages of one model.
NAMESPACE = re.compile(r"[0-9a-f]{64}")
_FAN_OUT = re.compile(r"[0-9a-f]{2}")
_PAGE_FILE = re.compile(r"([0-9a-f]{64})\.([0-9]{1,9})-([0-9]{1,9})\.page")


class PageFile(NamedTuple):
    """A regular file at a page's path; whether it is a page of ours, its first bytes say (`read_header`)."""

    path: str
    name: PageName
    size_bytes: int
    #: When the page was last used; up to `TOUCH_INTERVAL_S` too early.
    mtime_s: float


class PageFolder(NamedTuple):
    """One folder that holds pages: a namespace, and two digits of the key."""

    path: str
    namespace: str


def page_path(root: str | Path, name: PageName) -> str:
    """Where a page lies."""
    namespace, raw_key, head_start, head_end = name
    key = raw_key.hex()
    return f"{root}/{namespace}/{key[:2]}/{key}.{head_start}-{head_end}.page"


def walk_blocking(root: Path, namespace: str = "") -> Iterator[PageFile]:
    """Every file at a page's path, of one namespace or of all; the order is the same each time."""
    for folder in folders_blocking(root, namespace):
        for entry in sorted(entries_blocking(folder.path), key=lambda entry: entry.name):
            if (found := page_file(folder, entry)) is not None:
                yield found


def folders_blocking(root: Path, namespace: str = "", foreign: list[str] | None = None) -> Iterator[PageFolder]:
    """The folders below a root that may hold pages; what else lies beside them is added to `foreign`."""
    others = [] if foreign is None else foreign
    for space in sorted(entries_blocking(root), key=lambda entry: entry.name):
        if not NAMESPACE.fullmatch(space.name) or not _is_folder(space):
            if space.name not in OWN_NAMES:
                others.append(space.path)
        elif namespace in ("", space.name):
            for fan_out in sorted(entries_blocking(space.path), key=lambda entry: entry.name):
                if _FAN_OUT.fullmatch(fan_out.name) and _is_folder(fan_out):
                    yield PageFolder(fan_out.path, space.name)
                else:
                    others.append(fan_out.path)


def entries_blocking(folder: str | Path) -> list[os.DirEntry[str]]:
    """What lies in a folder: nothing, if somebody removed it meanwhile."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def page_name(folder: PageFolder, file_name: str) -> PageName | None:
    """The page that a file of this name is at this place, or None: no page has this path."""
    match = _PAGE_FILE.fullmatch(file_name)
    if match is None or not folder.path.endswith(f"/{match[1][:2]}"):
        return None
    name = PageName(folder.namespace, bytes.fromhex(match[1]), int(match[2]), int(match[3]))
    # "007-8" would be found here and nowhere else.
    return name if page_path("", name).endswith(f"/{file_name}") else None


def page_file(folder: PageFolder, entry: os.DirEntry[str]) -> PageFile | None:
    """The file at a page's path, or None: not a regular file, gone, or no page has this path."""
    name = page_name(folder, entry.name)
    if name is None:
        return None
    try:
        found = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return PageFile(entry.path, name, found.st_size, found.st_mtime)


def read_header(path: str) -> bytes | None:
    """The first 256 bytes of a file of ours, fewer if it is torn; None if the file is gone or is not ours."""
    try:
        descriptor = os.open(path, READ_FLAGS)
        try:
            header = os.pread(descriptor, HEADER_BYTES, 0)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _NO_FILE:
            return None
        raise
    return header if header[: len(MAGIC)] == MAGIC[: len(header)] else None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)
