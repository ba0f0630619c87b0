"""The slots of the device pool and of the host pool, and the memory of the host pool.

`PageAllocator` hands out page numbers and knows nothing of memory; the scheduler core and the cache
controller own one for each tier and call it on the scheduler thread.  `HostPool` is the memory of the host
tier: one anonymous shared file per rank.  Who owns what: the rank that creates a `HostPool` owns its file;
its storage process maps the same file through an inherited descriptor and reads and writes pages in place;
the copy engine of the rank reads and writes them too.  Which of them may touch a page at a time is decided
by the op table and never here.  Neither class imports torch.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from types import TracebackType

from sglang_hicache.cache.digest import StateDigest
from sglang_hicache.errors import IntegrityError, UserError

_DIGEST_ALLOC = 1
_DIGEST_FREE = 2

_HUGE_PAGE_BYTES = 2 << 20
#: Prefault step: a quarter of a second or so at first-touch speed, so that progress can be shown.
_PREFAULT_STEP_BYTES = 256 << 20
#: madvise(2) MADV_POPULATE_WRITE, Linux 5.14; Python's mmap has no name for it yet.
_MADV_POPULATE_WRITE = 23


class PageAllocator:
    """Page numbers [first, first + pages) of one pool, in an order that is the same on every rank.

    A fresh pool hands out ascending numbers; freed pages are handed out again last in, first out, which
    keeps the working set small.
    """

    __slots__ = ("_digest", "_first", "_free", "_is_used", "name", "total")

    def __init__(self, name: str, pages: int, digest: StateDigest, first: int = 0) -> None:
        self.name = name
        self.total = pages
        self._digest = digest
        self._first = first
        #: A stack: the next page to hand out is the last.
        self._free = list(range(first + pages - 1, first - 1, -1))
        #: One byte per page number below first + pages; always the exact complement of `_free`.
        self._is_used = bytearray(first + pages)

    @property
    def free_count(self) -> int:
        return len(self._free)

    @property
    def used_count(self) -> int:
        return self.total - len(self._free)

    def alloc(self, count: int) -> list[int] | None:
        """`count` pages, or None if there are not that many: never a part of them."""
        free = self._free
        if count > len(free):
            return None
        if count <= 0:
            return []
        pages = free[: -count - 1 : -1]
        del free[-count:]
        is_used = self._is_used
        for page in pages:
            is_used[page] = 1
        self._digest.mix(_DIGEST_ALLOC, self._first, *pages)
        return pages

    def free(self, pages: list[int]) -> None:
        """Take pages back.  A page that is not handed out means that two owners freed it: a defect."""
        if not pages:
            return
        is_used, first, end = self._is_used, self._first, len(self._is_used)
        if min(pages) < first or max(pages) >= end:
            raise IntegrityError(f"{self.name} pool: {min(pages)}..{max(pages)} freed, it has {first}..{end - 1}")
        for page in pages:
            if not is_used[page]:
                raise IntegrityError(f"{self.name} pool: page {page} was freed twice")
            is_used[page] = 0
        self._free.extend(reversed(pages))
        self._digest.mix(_DIGEST_FREE, first, *pages)

    def used_pages(self) -> list[int]:
        """All pages handed out, ascending; O(pool), for integrity checks."""
        return [page for page, used in enumerate(self._is_used) if used]

    def __repr__(self) -> str:
        return f"<PageAllocator {self.name} {self.used_count}/{self.total} used>"


class HostPool:
    """`pages` pages of `page_bytes` in one anonymous shared file (memfd), mapped into this process.

    Not a file in /dev/shm, which containers cap at 64 MiB.  The descriptor is closed on exec unless it is
    passed on by name, so nobody but the rank's storage process ever holds the memory: killing that process is
    then proof that the pages are free of writers.
    """

    __slots__ = ("_map", "buffer", "fd", "has_huge_pages", "page_bytes", "pages")

    def __init__(self, pages: int, page_bytes: int) -> None:
        if pages <= 0 or page_bytes <= 0:
            raise UserError(f"a host pool of {pages} pages of {page_bytes} bytes: both must be above 0")
        size_bytes = pages * page_bytes
        try:
            self._adopt(_create_file(size_bytes, huge=True), pages, page_bytes, huge=True)
        except OSError:
            # No huge pages are set aside on this machine, or too few: ordinary ones, with a wish for large folios.
            self._adopt(_create_file(size_bytes, huge=False), pages, page_bytes, huge=False)
            _advise_huge(self._map)

    @classmethod
    def attach(cls, fd: int, pages: int, page_bytes: int) -> HostPool:
        """Map the pool behind an inherited descriptor, which this object closes from now on."""
        held_bytes = os.fstat(fd).st_size
        if held_bytes < pages * page_bytes:
            os.close(fd)
            raise IntegrityError(f"host pool of {pages} x {page_bytes} bytes: the shared file has {held_bytes}")
        pool = cls.__new__(cls)
        pool._adopt(fd, pages, page_bytes, huge=False)
        return pool

    def _adopt(self, fd: int, pages: int, page_bytes: int, *, huge: bool) -> None:
        try:
            self._map = mmap.mmap(fd, os.fstat(fd).st_size)
        except OSError:
            os.close(fd)
            raise
        self.fd = fd
        self.pages = pages
        self.page_bytes = page_bytes
        self.has_huge_pages = huge
        #: The whole pool as writable bytes; torch and numpy wrap it without a copy.
        self.buffer = memoryview(self._map)[: pages * page_bytes]

    def page(self, index: int) -> memoryview:
        """Page `index`, writable in place.  Drop the view after use: a pool with live views cannot close."""
        if not 0 <= index < self.pages:
            raise IntegrityError(f"host page {index} of a pool of {self.pages}")
        start = index * self.page_bytes
        return self.buffer[start : start + self.page_bytes]

    def prefault(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Give every byte its memory now, so that a full machine fails the start and not a request.

        `progress(done_bytes, total_bytes)` is called after each step.
        """
        total = len(self._map)
        for start in range(0, total, _PREFAULT_STEP_BYTES):
            length = min(_PREFAULT_STEP_BYTES, total - start)
            _populate(self._map, self.fd, start, length)
            if progress is not None:
                progress(start + length, total)

    def close(self) -> None:
        """Unmap and close.  Calling it again is allowed; live views of pages are a defect."""
        if self.fd < 0:
            return
        self.buffer.release()
        try:
            self._map.close()
        except BufferError:
            raise IntegrityError("the host pool was closed while views of its pages are alive") from None
        os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> HostPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<HostPool {self.pages} x {self.page_bytes} bytes fd={self.fd}>"


def _create_file(size_bytes: int, *, huge: bool) -> int:
    flags = os.MFD_CLOEXEC | (os.MFD_HUGETLB if huge else 0)
    if huge:
        # A hugetlb file must be a whole number of huge pages, or it cannot be mapped.
        size_bytes = -(-size_bytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    fd = os.memfd_create("hicache-host-pool", flags)
    try:
        os.ftruncate(fd, size_bytes)
    except OSError:
        os.close(fd)
        raise
    return fd


def _advise_huge(memory: mmap.mmap) -> None:
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        # A kernel without transparent huge pages says EINVAL: the pool works, reaping it takes longer.
        if error.errno != errno.EINVAL:
            raise


def _populate(memory: mmap.mmap, fd: int, start: int, length: int) -> None:
    try:
        memory.madvise(_MADV_POPULATE_WRITE, start, length)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # A kernel before 5.14: allocate in the file.  Not first choice, because it ignores the wish for huge pages.
        os.posix_fallocate(fd, start, length)
