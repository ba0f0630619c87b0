"""A file store whose housekeeping happens when the test says so: no thread, and a clock that stands."""

from __future__ import annotations

import os
from pathlib import Path

from sglang_hicache.storage.capacity import Limits
from sglang_hicache.storage.file_evictor import Evictor
from sglang_hicache.storage.file_folder import Lease
from sglang_hicache.storage.file_pages import page_path, walk_blocking
from sglang_hicache.storage.file_share import Share
from sglang_hicache.storage.page_format import HEADER_BYTES, OutgoingPage, PageName
from tests.storage import pages

OTHER = "77" * 32
PAGE = HEADER_BYTES + pages.PAGE_BYTES
NOW_S = 1_800_000_000
CONTENT = pages.content(1)


class House:
    """One process's share and its evictor, over a root that may have others."""

    def __init__(
        self, root: Path, max_bytes: int | None = 0, ttl_s: int = 0, namespace: str = pages.NAMESPACE,
        high: float = 0.9, low: float = 0.5, rank: int = 0,
    ) -> None:  # fmt: skip
        self.root = root
        self.now_s = float(NOW_S)
        self.woken = 0
        limits = Limits(max_bytes or 0, 0, high, low, PAGE)
        lease = Lease(namespace, PAGE, max_bytes or 0, ttl_s)
        self.share = Share(root, rank, limits, lease, self._wake)
        self.share.open_blocking()
        self.evictor = Evictor(self.share, max_bytes, lambda: self.now_s)

    def tick(self) -> None:
        """What the thread would do about once a second."""
        self.evictor.tick_blocking()

    def write(self, number: int, parent: int | None = None, depth: int = 0, age_s: int = 0) -> Path:
        """Store a page, as the backend would."""
        path = put(self.root, number, parent, depth, age_s, self.share.lease.namespace)
        self.share.changed(path.stat().st_size, 1)
        self.share.tell()
        return path

    def close(self) -> None:
        """End as a process does."""
        self.evictor.stop_blocking()
        self.share.close_blocking()

    def _wake(self) -> None:
        self.woken += 1


def put(
    root: Path, number: int, parent: int | None = None, depth: int = 0, age_s: int = 0,
    namespace: str = pages.NAMESPACE, heads: tuple[int, int] = (0, 2),
) -> Path:  # fmt: skip
    """A page file that was used last so many seconds ago."""
    layout = pages.layout(namespace, heads)
    before = b"" if parent is None else pages.key(parent)
    page = OutgoingPage(layout, pages.key(number), CONTENT, before, depth)
    path = Path(page_path(root, page.name))
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.write_bytes(page.header() + page.payload)
    age(path, age_s)
    return path


def age(path: Path, age_s: int) -> None:
    """Have a file used last so long ago."""
    os.utime(path, (NOW_S - age_s, NOW_S - age_s))


def numbers(root: Path, namespace: str = "") -> list[int]:
    """Which pages are there."""
    return sorted(int.from_bytes(page.name.key, "big") for page in walk_blocking(root, namespace))


def stored_bytes(root: Path) -> int:
    """What all pages have."""
    return sum(page.size_bytes for page in walk_blocking(root))


def name(number: int) -> PageName:
    """Name of a page."""
    return pages.layout().name(pages.key(number))
