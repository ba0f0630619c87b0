"""What the process that evicts knows of a file store: every page under the root, of whatever namespace.

Owned by the thread of `file_evictor.py`.  The first look reads the header of every page, because only the header tells
the parent and the depth; later ones list the folders that have changed since and read the headers of what is new.  When
a page was last used is not looked up again: whoever takes a page out asks the file itself at that moment.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path

from sglang_hicache.storage.capacity import Catalogue, Page
from sglang_hicache.storage.file_pages import (
    PageFile,
    PageFolder,
    entries_blocking,
    folders_blocking,
    page_file,
    page_name,
    page_path,
    read_header,
)
from sglang_hicache.storage.file_quarantine import kept_blocking
from sglang_hicache.storage.page_format import HEADER_BYTES, PageName, parse_header

#: A folder that changed so recently may change again without a new time: it is listed once more.
_FRESH_NS = 2_000_000_000

#: A folder with many pages that are new to us takes seconds, on a slow disk minutes: a store must close sooner.
_STRIDE = 256


class FileIndex:
    """The pages under one root."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.catalogue = Catalogue()
        self.quarantine_bytes = 0
        #: Time of change of each folder when it was listed.
        self._listed: dict[str, int] = {}
        self._doubtful: list[Page] = []
        #: Files that are not ours, by folder.
        self._foreign: defaultdict[str, int] = defaultdict(int)

    @property
    def used_bytes(self) -> int:
        """Bytes of all pages and of those set aside."""
        return self.catalogue.used_bytes + self.quarantine_bytes

    @property
    def foreign_files(self) -> int:
        """What lies under the root and is not ours; a folder counts as one."""
        return sum(self._foreign.values())

    def refresh_blocking(self, breathe: Callable[[], None]) -> None:
        """Learn what has changed.  `breathe` is called every now and then, and may raise to end this early."""
        for page in self._doubtful:
            # First, because a page that was removed has no names any more.
            for name in page.names:
                self._listed.pop(os.path.dirname(page_path(self._root, name)), None)
            self.catalogue.remove(page)
        self._doubtful.clear()
        beside: list[str] = []
        places = {}
        for folder in folders_blocking(self._root, foreign=beside):
            breathe()
            places[folder.namespace, int(Path(folder.path).name, 16)] = folder
            self._refresh_folder(folder, breathe)
        for place in self.catalogue.shelves():
            if place not in places:
                for page in self.catalogue.shelf(*place):
                    self.catalogue.remove(page)
        paths = {folder.path for folder in places.values()}
        self._listed = {path: when for path, when in self._listed.items() if path in paths}
        self._foreign = defaultdict(int, {path: n for path, n in self._foreign.items() if path in paths})
        self._foreign[str(self._root)] = len(beside)
        self.quarantine_bytes = sum(size for _, size in kept_blocking(self._root))

    def doubt(self, page: Page) -> None:
        """Its files are not what they were; look at them anew next time."""
        self._doubtful.append(page)

    def drop_folders_blocking(self, in_use: Collection[str]) -> None:
        """Remove the folders of namespaces that have no page left and that nobody uses."""
        for namespace, objects in self.catalogue.objects.items():
            if objects or namespace in in_use:
                continue
            # A folder in which something else lies stays; so does one that a server just come makes use of.
            with contextlib.suppress(OSError):
                for fan_out in entries_blocking(self._root / namespace):
                    os.rmdir(fan_out.path)
                os.rmdir(self._root / namespace)

    def _refresh_folder(self, folder: PageFolder, breathe: Callable[[], None]) -> None:
        try:
            changed_ns = os.stat(folder.path).st_mtime_ns
        except FileNotFoundError:
            return
        if self._listed.get(folder.path) == changed_ns:
            return
        self._list(folder, breathe)
        self._listed[folder.path] = changed_ns if time.time_ns() - changed_ns > _FRESH_NS else 0

    def _list(self, folder: PageFolder, breathe: Callable[[], None]) -> None:
        found: set[PageName] = set()
        foreign = 0
        known = {
            name for page in self.catalogue.shelf(folder.namespace, int(folder.path[-2:], 16)) for name in page.names
        }
        for number, entry in enumerate(entries_blocking(folder.path), 1):
            if number % _STRIDE == 0:
                breathe()
            name = page_name(folder, entry.name)
            if name in known:
                found.add(name)
                continue
            file = page_file(folder, entry) if name is not None else None
            if file is not None and self._add(file):
                found.add(file.name)
            else:
                foreign += 1
        for name in known - found:
            if (page := self.catalogue.find(name.namespace, name.key)) is not None:
                self.catalogue.remove_range(page, name)
                if not page.ranges:
                    self.catalogue.remove(page)
        self._foreign[folder.path] = foreign

    def _add(self, file: PageFile) -> bool:
        """Learn one file; False if it is not ours."""
        try:
            raw = read_header(file.path)
        except OSError:
            # What cannot be read cannot be known to be ours.
            return False
        if raw is None:
            return False
        header, name, last_used_s = parse_header(raw), file.name, int(file.mtime_s)
        is_page = (
            header is not None
            and PageName(header.namespace, header.key, header.head_start, header.head_end) == name
            and HEADER_BYTES + header.payload_bytes == file.size_bytes
        )
        if header is not None and is_page:
            self.catalogue.add(name, header.parent, header.depth, file.size_bytes, last_used_s)
        else:
            # Torn, renamed, or of another format version: room to be had, and nobody's parent.
            self.catalogue.add(name, b"", -1, file.size_bytes, last_used_s)
        return True
