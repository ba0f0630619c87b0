"""How much a store may hold, and which pages go first when that is too little.

Used by every backend that stores bytes itself.  Pure: sizes, times and names come in, decisions go out; no file, thread
or clock.  Times are whole seconds.

The unit of eviction is a page key with all its head ranges: a page of which some ranks have lost their heads is a miss
for all of them, and its remains would only take room.  A page never goes before its children, because no look-up
reaches a page behind a gap; so a parent counts as used whenever one of its descendants was.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from sglang_hicache.storage.page_format import PageName

#: Share of what is free, or already ours, that a store takes when nobody says how much.
DEFAULT_SHARE = 0.8

#: Shares of the limit: above the first one pages go, until the second one is reached.
DEFAULT_HIGH = 0.95
DEFAULT_LOW = 0.85

#: What a store leaves free on its disk when nobody says how much: this, or the share below of a small disk.
DEFAULT_MIN_FREE_BYTES = 1 << 30
DEFAULT_MIN_FREE_SHARE = 0.01

#: A walk over all pages of a store stops for breath after so many.
_STRIDE = 512

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]*)?)\s*([kmgtp]?)(i?)(b?)", re.IGNORECASE)
_LARGEST_SIZE = 1 << 62

#: A number of hundreds of digits is too large even to be compared with the largest one.
_LONGEST_SIZE = 40


def parse_size(value: int | str) -> int:
    """Bytes: a number, or a text such as "200GB" (10^9), "1.5TiB" or "512M" (powers of 1024).  ValueError if not."""
    allowed = 'bytes as a whole number, or a text such as "200GB" or "1.5TiB"'
    text = str(value).strip()
    match = _SIZE.fullmatch(text) if len(text) <= _LONGEST_SIZE else None
    if match is None or isinstance(value, bool):
        raise ValueError(f"{value!r:.{_LONGEST_SIZE}} is no size; it takes {allowed}")
    number, letter, binary, unit = match.groups()
    # "G" alone is what du and dd mean by it; "GB" is what is printed on the disk.
    base = 1000 if unit and not binary else 1024
    size = int(float(number) * base ** " kmgtp".index(letter.lower() or " "))
    if (binary and not letter) or size > _LARGEST_SIZE:
        raise ValueError(f"{value!r} is no size; it takes {allowed}")
    return size if letter else int(float(number))


def size_text(size_bytes: int) -> str:
    """A size for people."""
    size, units = float(size_bytes), ("bytes", "KiB", "MiB", "GiB", "TiB")
    for unit in units:
        if size < 1024 or unit == units[-1]:
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a store may take."""

    #: Most bytes of pages; 0: as many as the disk holds.
    max_bytes: int = 0
    #: Bytes of the disk that stay free.
    min_free_bytes: int = 0
    #: Shares of the limit: above the first one pages go, until the second one is reached.
    high: float = DEFAULT_HIGH
    low: float = DEFAULT_LOW
    #: Largest page that somebody writes: room for one is kept, or a store of few pages would refuse every write.
    page_bytes: int = 0

    def ceiling(self, used_bytes: int, free_bytes: int) -> int:
        """Most bytes that the pages may have, with the disk as it is."""
        by_disk = max(0, used_bytes + free_bytes - self.min_free_bytes)
        return min(self.max_bytes, by_disk) if self.max_bytes else by_disk

    def room(self, used_bytes: int, free_bytes: int) -> int:
        """Bytes that may still be written; never negative."""
        return max(0, self.ceiling(used_bytes, free_bytes) - used_bytes)

    def excess(self, used_bytes: int, free_bytes: int) -> int:
        """Bytes that must go now: 0 below the high watermark, else all above the low one."""
        ceiling = self.ceiling(used_bytes, free_bytes)
        high = max(0, min(self.high * ceiling, ceiling - self.page_bytes))
        return used_bytes - int(min(self.low * ceiling, high)) if used_bytes > high else 0


def default_max_bytes(used_bytes: int, free_bytes: int) -> int:
    """The limit when none is given.  What is ours counts as free: the same folder then gets the same limit again."""
    # Some file systems say that they have no end.
    return min(int(DEFAULT_SHARE * (used_bytes + free_bytes)), _LARGEST_SIZE)


def default_min_free_bytes(disk_bytes: int) -> int:
    """What stays free when nobody says how much."""
    return min(DEFAULT_MIN_FREE_BYTES, int(DEFAULT_MIN_FREE_SHARE * disk_bytes))


class Page:
    """A stored page over all its head ranges."""

    __slots__ = ("children", "depth", "key", "last_used", "namespace", "needed", "parent", "ranges")

    def __init__(self, namespace: str, key: bytes, parent: bytes, depth: int) -> None:
        self.namespace = namespace
        self.key = key
        self.parent = parent
        #: Pages before this one; -1: what is stored is not a page that a reader would take.
        self.depth = depth
        self.last_used = 0
        #: (head_start, head_end, bytes) of each object.
        self.ranges: tuple[tuple[int, int, int], ...] = ()
        #: Of the walk that looks for victims: last use of the page and all below it, and children that are there.
        self.needed = 0
        self.children = 0

    def __repr__(self) -> str:
        return f"<Page {self.key.hex()[:8]} depth={self.depth} last_used={self.last_used}>"

    @property
    def size_bytes(self) -> int:
        """Bytes of all objects."""
        return sum(size for _, _, size in self.ranges)

    @property
    def names(self) -> list[PageName]:
        """Names of all objects."""
        return [PageName(self.namespace, self.key, start, end) for start, end, _ in self.ranges]


class Catalogue:
    """All pages of a store.  Owned by one thread."""

    def __init__(self) -> None:
        # By namespace and first byte of the key, as the folders of a file store are.
        self._shelves: defaultdict[tuple[str, int], dict[bytes, Page]] = defaultdict(dict)
        #: One tuple for all ranges alike, instead of one per page.
        self._ranges: dict[tuple[int, int, int], tuple[int, int, int]] = {}
        self.used_bytes = 0
        #: Stored objects by namespace.
        self.objects: defaultdict[str, int] = defaultdict(int)

    def __len__(self) -> int:
        return sum(map(len, self._shelves.values()))

    def add(self, name: PageName, parent: bytes, depth: int, size_bytes: int, last_used: int) -> None:
        """An object is there, perhaps another head range of a page that is known, perhaps a known one anew."""
        page = self.find(name.namespace, name.key)
        if page is None or (page.depth < 0 <= depth):
            ranges = page.ranges if page is not None else ()
            page = Page(name.namespace, name.key, self._shared(name.namespace, parent), depth)
            page.ranges = ranges
            self._shelves[name.namespace, name.key[0]][name.key] = page
        self.remove_range(page, name)
        made = (name.head_start, name.head_end, size_bytes)
        page.ranges += (self._ranges.setdefault(made, made),)
        page.last_used = max(page.last_used, last_used)
        self.used_bytes += size_bytes
        self.objects[name.namespace] += 1

    def find(self, namespace: str, key: bytes) -> Page | None:
        """The page, if it is known."""
        shelf = self._shelves.get((namespace, key[0])) if key else None
        return shelf.get(key) if shelf else None

    def shelf(self, namespace: str, first_byte: int) -> list[Page]:
        """Every known page of a namespace whose key starts with this byte."""
        return list(self._shelves.get((namespace, first_byte), {}).values())

    def shelves(self) -> list[tuple[str, int]]:
        """Namespace and first byte of all pages."""
        return [place for place, shelf in self._shelves.items() if shelf]

    def touch(self, namespace: str, key: bytes, last_used: int) -> None:
        """A page was used, if it is known."""
        page = self.find(namespace, key)
        if page is not None:
            page.last_used = max(page.last_used, last_used)

    def remove(self, page: Page) -> None:
        """A page is gone, with all its head ranges."""
        for name in page.names:
            self.remove_range(page, name)
        shelf = self._shelves[page.namespace, page.key[0]]
        if shelf.pop(page.key, None) is not None and (parent := self._parent(page)) is not None:
            parent.children -= 1

    def remove_range(self, page: Page, name: PageName) -> None:
        """One object of a page is gone; the page itself stays known."""
        for found in page.ranges:
            if found[:2] == (name.head_start, name.head_end):
                page.ranges = tuple(other for other in page.ranges if other is not found)
                self.used_bytes -= found[2]
                self.objects[name.namespace] -= 1

    def victims(
        self, in_use: Collection[str], unused_since: int | None, breathe: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[Page, bool]]:
        """Pages in the order in which they may go, each with whether its time is up: those that nobody has used since
        `unused_since`, then those of namespaces that are not in use, then the rest, the longest unused first and
        children before parents.  The caller removes or touches each before it asks for the next one."""
        self._weigh(breathe)
        lines: defaultdict[tuple[int, int], list[Page]] = defaultdict(list)
        for page in self._all(breathe):
            is_expired = unused_since is not None and page.needed < unused_since
            rank = 0 if is_expired else 1 if page.namespace not in in_use or page.depth < 0 else 2
            lines[rank, page.needed].append(page)
        for rank, needed in sorted(lines):
            # One use at a time: sorting all pages at once would hold the interpreter for seconds.
            for page in sorted(lines.pop((rank, needed)), key=lambda page: -page.depth):
                if page.children <= 0 and page.last_used <= needed and self.find(page.namespace, page.key) is page:
                    yield page, rank == 0

    def _weigh(self, breathe: Callable[[], None]) -> None:
        """Give every page its children, and the last use of everything below it: deepest pages first."""
        by_depth: defaultdict[int, list[Page]] = defaultdict(list)
        for page in self._all(breathe):
            page.needed, page.children = page.last_used, 0
            by_depth[page.depth].append(page)
        for depth in sorted(by_depth, reverse=True):
            for number, page in enumerate(by_depth.pop(depth)):
                if (parent := self._parent(page)) is not None:
                    parent.children += 1
                    parent.needed = max(parent.needed, page.needed)
                if number % _STRIDE == 0:
                    breathe()

    def _parent(self, page: Page) -> Page | None:
        """The parent that is there.  Depths that do not fit together are nobody's parent: a circle of pages would
        wait for itself for ever."""
        parent = self.find(page.namespace, page.parent)
        return parent if parent is not None and 0 <= parent.depth < page.depth else None

    def _all(self, breathe: Callable[[], None]) -> Iterator[Page]:
        number = 0
        for shelf in list(self._shelves.values()):
            for page in list(shelf.values()):
                number += 1
                if number % _STRIDE == 0:
                    breathe()
                yield page

    def _shared(self, namespace: str, key: bytes) -> bytes:
        """The parent's own key object where the parent is known: half the memory of a large store are keys."""
        found = self.find(namespace, key)
        return key if found is None else found.key
