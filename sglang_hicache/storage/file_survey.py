"""A file store seen from outside: what it holds, whether each page is whole, and which pages go when some have to.

Used by the offline tool (`sglang_hicache/store.py`), which may run beside servers: pages appear by rename and go by
unlink, so whatever is gone when its turn comes is no error.  Ours is what `file_pages.py` says.  Only `Doomed` deletes,
and no link is ever followed.  One folder of pages is in memory at a time, and of pages to be deleted 44 bytes each.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from sglang_hicache.storage.file_pages import (
    QUARANTINE,
    READ_FLAGS,
    TMP,
    PageFile,
    entries_blocking,
    folders_blocking,
    page_file,
    page_name,
    page_path,
    read_header,
)
from sglang_hicache.storage.file_quarantine import kept_blocking
from sglang_hicache.storage.page_format import (
    HEADER_BYTES,
    MAGIC,
    ROOT_PARENT,
    PageHeader,
    PageName,
    is_whole,
    parse_header,
)

_PIECE_BYTES = 1 << 20

#: Number of the namespace, key and head range of a page.
_NAME = struct.Struct("<I32sII")

#: Files whose header does not tell their depth go first: nothing is reached through them.
_NO_DEPTH = 1 << 32


class Selection(NamedTuple):
    """Which pages are meant."""

    #: "": all.
    namespace: str = ""
    #: Start of a tenant's seed as it stands in headers; None: all.
    tenant: bytes | None = None

    def has(self, header: PageHeader | None) -> bool:
        """Is this one of them?  A file that does not say whose it is belongs to no tenant."""
        return self.tenant is None or (header is not None and header.tenant == self.tenant)


class Tally(msgspec.Struct):
    """Files added up."""

    files: int = 0
    bytes: int = 0
    #: Seconds since 1970, exact to a minute.
    oldest_use: int = 0
    newest_use: int = 0

    def add(self, size_bytes: int, used_s: float) -> None:
        """One more."""
        self.oldest_use = min(self.oldest_use, int(used_s)) if self.files else int(used_s)
        self.newest_use = max(self.newest_use, int(used_s))
        self.files += 1
        self.bytes += size_bytes


class _Place(NamedTuple):
    """Something in a folder of pages."""

    path: str
    has_page_name: bool
    #: None: gone, or no regular file with the name of a page.
    file: PageFile | None
    #: Its first bytes; None: gone, or not ours.
    raw: bytes | None

    def is_strange_blocking(self) -> bool:
        """Still there, and still not ours?  A page may have gone and come again since it was looked at."""
        return os.path.lexists(self.path) and not (self.has_page_name and read_header(self.path) is not None)


class Survey(msgspec.Struct):
    """What a store holds."""

    #: By namespace, then by tenant as hex digits.
    pages: dict[str, dict[str, Tally]] = {}
    #: Pages of other versions of the format, and files too short to be one.
    other_formats: Tally = msgspec.field(default_factory=Tally)
    torn: Tally = msgspec.field(default_factory=Tally)
    #: Pages being written, or left by the dead; and what was set aside.
    temporary: Tally = msgspec.field(default_factory=Tally)
    quarantine: Tally = msgspec.field(default_factory=Tally)
    #: Files and folders that are not ours.
    foreign: int = 0

    @classmethod
    def take_blocking(cls, root: Path, selection: Selection) -> Survey:
        """Read every header."""
        survey, beside = cls(), []
        for place in _places_blocking(root, selection.namespace, beside):
            survey._add(place, selection)
        survey.foreign += len(beside)
        for folder in entries_blocking(root / TMP):
            _add_files(survey.temporary, folder.path)
        _add_files(survey.quarantine, root / QUARANTINE)
        return survey

    def _add(self, place: _Place, selection: Selection) -> None:
        file = place.file
        if file is None or place.raw is None:
            self.foreign += place.is_strange_blocking()
            return
        header = parse_header(place.raw)
        if header is None:
            (self.torn if len(place.raw) < HEADER_BYTES else self.other_formats).add(file.size_bytes, file.mtime_s)
        elif selection.has(header):
            tenants = self.pages.setdefault(file.name.namespace, {})
            tenants.setdefault(header.tenant.hex(), Tally()).add(file.size_bytes, file.mtime_s)


def namespaces_blocking(root: Path) -> list[str]:
    """Namespaces that have folders here."""
    return list(dict.fromkeys(folder.namespace for folder in folders_blocking(root)))


def users_blocking(root: Path) -> int:
    """Storage processes that have the store open: each holds the lock of its temporary folder for as long."""
    living = 0
    for entry in entries_blocking(root / TMP):
        with contextlib.suppress(OSError):  # gone, or no lock of ours
            lock = os.open(f"{entry.path}/lock", READ_FLAGS)
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                living += 1
            finally:
                os.close(lock)
    return living


class Finding(NamedTuple):
    """What came of reading one page."""

    path: str
    size_bytes: int
    #: What is wrong with it; "" if nothing.
    wrong: str = ""
    #: Not given where something that cannot be set aside has a page's name.
    name: PageName | None = None
    #: The page before it is not there: no look-up reaches this one.  It comes to use when that page is written again.
    is_orphan: bool = False


def check_blocking(root: Path, selection: Selection) -> Iterator[Finding]:
    """Read every page to its end, and say what a reader would say of it."""
    buffer = memoryview(bytearray(_PIECE_BYTES))
    for folder in folders_blocking(root, selection.namespace):
        for entry in sorted(entries_blocking(folder.path), key=lambda entry: entry.name):
            file = page_file(folder, entry)
            if file is not None:
                yield from _check(root, file, selection, buffer)
            elif page_name(folder, entry.name) and selection.tenant is None and _is_in_the_way(entry.path):
                yield Finding(entry.path, 0, "no regular file, but in the way of a page; remove it by hand")


def _is_in_the_way(path: str) -> bool:
    """Is this a link, a folder, a pipe?  A page may have come again since it was gone."""
    try:
        return not stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _check(root: Path, file: PageFile, selection: Selection, buffer: memoryview) -> Iterator[Finding]:
    """One finding; none for a page that is gone meanwhile, not meant, or of a format that nobody reads."""
    try:
        descriptor = os.open(file.path, READ_FLAGS)
    except FileNotFoundError:
        return
    except OSError as error:
        yield Finding(file.path, file.size_bytes, f"cannot be read: {error.strerror}")
        return
    try:
        size_bytes = os.fstat(descriptor).st_size
        raw = os.pread(descriptor, HEADER_BYTES, 0)
        header = parse_header(raw)
        is_other_format = header is None and len(raw) == HEADER_BYTES and raw.startswith(MAGIC)
        if is_other_format or not selection.has(header):
            return
        wrong = _wrong(file.name, raw, header, size_bytes)
        if not wrong and not is_whole(raw, _payload_blocking(descriptor, buffer)):
            wrong = "checksum"
    except OSError as error:
        yield Finding(file.path, file.size_bytes, f"cannot be read: {error.strerror}")
        return
    finally:
        os.close(descriptor)
    is_orphan = False
    if not wrong and header is not None and header.parent != ROOT_PARENT and header.depth > 0:
        is_orphan = not os.path.lexists(page_path(root, file.name._replace(key=header.parent)))
    yield Finding(file.path, size_bytes, wrong, file.name, is_orphan)


def _wrong(name: PageName, raw: bytes, header: PageHeader | None, size_bytes: int) -> str:
    """What the header alone shows."""
    if header is None:
        is_ours = raw[: len(MAGIC)] == MAGIC[: len(raw)]
        return "torn: shorter than a header" if is_ours else "no header of ours"
    if (header.namespace, header.key, header.head_start, header.head_end) != name:
        return "header of another page"
    if size_bytes != HEADER_BYTES + header.payload_bytes:
        return f"{size_bytes} bytes long, and its header says {HEADER_BYTES + header.payload_bytes}"
    return ""


def _payload_blocking(descriptor: int, buffer: memoryview) -> Iterator[memoryview]:
    at = HEADER_BYTES
    while count := os.preadv(descriptor, [buffer], at):
        yield buffer[:count]
        at += count


class Doomed:
    """Pages that are to go, the deepest first: where this is interrupted, every page that is left can be reached."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._namespaces: dict[str, int] = {}
        self._by_depth: defaultdict[int, bytearray] = defaultdict(bytearray)
        self._set_aside: list[str] = []
        self.files = 0
        self.bytes = 0

    @classmethod
    def find_blocking(cls, root: Path, selection: Selection) -> Doomed:
        """All that is meant: pages, torn ones and those of other formats too unless a tenant is asked for, and what
        of it was set aside."""
        doomed = cls(root)
        for place in _places_blocking(root, selection.namespace, []):
            if place.file is not None and place.raw is not None and selection.has(header := parse_header(place.raw)):
                doomed._add(place.file, header.depth if header is not None else _NO_DEPTH)
        for path, size_bytes in kept_blocking(root):
            raw = read_header(path)
            header = parse_header(raw) if raw is not None else None
            is_meant = header is None or selection.namespace in ("", header.namespace)
            if raw is not None and is_meant and selection.has(header):
                doomed._set_aside.append(path)
                doomed.files += 1
                doomed.bytes += size_bytes
        return doomed

    def _add(self, file: PageFile, depth: int) -> None:
        namespace, key, head_start, head_end = file.name
        number = self._namespaces.setdefault(namespace, len(self._namespaces))
        self._by_depth[depth] += _NAME.pack(number, key, head_start, head_end)
        self.files += 1
        self.bytes += file.size_bytes

    def delete_blocking(self) -> Iterator[OSError | None]:
        """Delete one file per step; what the system said against it, or None."""
        for path in self._paths():
            try:
                os.unlink(path)
            except FileNotFoundError:
                yield None  # evicted, cleared or set aside meanwhile
            except OSError as error:
                yield error
            else:
                yield None

    def _paths(self) -> Iterator[str]:
        yield from self._set_aside
        namespaces = list(self._namespaces)
        for depth in sorted(self._by_depth, reverse=True):
            for number, *name in _NAME.iter_unpack(self._by_depth.pop(depth)):
                yield page_path(self._root, PageName(namespaces[number], *name))


def _places_blocking(root: Path, namespace: str, beside: list[str]) -> Iterator[_Place]:
    """Everything that lies where pages lie.  What lies beside such folders is added to `beside`."""
    for folder in folders_blocking(root, namespace, beside):
        for entry in sorted(entries_blocking(folder.path), key=lambda entry: entry.name):
            file = page_file(folder, entry)
            raw = read_header(entry.path) if file is not None else None
            yield _Place(entry.path, page_name(folder, entry.name) is not None, file, raw)


def _add_files(tally: Tally, folder: str | Path) -> None:
    for entry in entries_blocking(folder):
        with contextlib.suppress(FileNotFoundError):
            if entry.name != "lock" and entry.is_file(follow_symlinks=False):
                found = entry.stat(follow_symlinks=False)
                tally.add(found.st_size, found.st_mtime)
