"""Pages as files in one private folder.

    <root>/<namespace>/<first two digits of the key>/<key>.<head_start>-<head_end>.page
    <root>/tmp/<rank>-<nonce>/      pages being written by one process, and the lock that says it lives

Who owns what: a file below a namespace is immutable once it has its name; it appears by `rename` and goes by `unlink`,
so that a reader meets a whole page or none, whatever happened to a writer.  Several processes and servers may share
the folder; `file_folder.py` has what they must agree on.

Called by the two lanes of a storage process (see `backend.py`).  Never follows a symbolic link to a page, never creates
anything that another user could read.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.backend import OpenContext, PageOutcome, PageResult, StorageBackend
from sglang_hicache.storage.file_folder import TemporaryFolder, make_private, refuse_unsafe, storage_folder, sweep
from sglang_hicache.storage.file_pages import READ_FLAGS, read_header, walk_blocking
from sglang_hicache.storage.page_format import (
    CHUNK_BYTES,
    HEADER_BYTES,
    WRITE_CHUNK_BYTES,
    IncomingPage,
    OutgoingPage,
    PageName,
)
from sglang_hicache.storage.settings import FileSettings

#: Files touched less than this ago are left alone: a touch costs as much as reading a small page.  Orders of use that
#: are finer than this are told by the depth in the header (deeper goes first), so a coarse touch stays prefix-closed.
TOUCH_INTERVAL_S = 60.0

#: Threads that read one batch: the lane's own and its helpers.  A disk is fast only with several requests in its queue,
#: and while one thread hashes what has come, another reads.
READERS = 2

#: Smaller pages are read by the lane alone: two threads would spend more time handing the interpreter to each other
#: than the kernel spends on a page.
LEAST_SHARED_PAGE_BYTES = 256 * 1024

#: A read goes on behind these: one call then shows every damaged page of the batch, not only the first.
_READ_ON = (PageResult.HIT, PageResult.WRONG_SIZE)

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

#: What the system says when a page's name belongs to a link, a folder, a pipe or a socket: no page, and in its way.
_NO_FILE = (errno.ELOOP, errno.EISDIR, errno.ESPIPE, errno.ENXIO)


class FileBackend(StorageBackend):
    """One process's access to the folder."""

    def __init__(self, settings: FileSettings, context: OpenContext) -> None:
        self._root = storage_folder(settings.file_storage_path)
        self._prefix = f"{self._root}/"
        self._fsync = settings.fsync
        self._rank = context.rank
        self._temporary: TemporaryFolder | None = None
        self._helpers = ThreadPoolExecutor(READERS - 1, "file reader")

    def __repr__(self) -> str:
        return f"<FileBackend {self._root} fsync={self._fsync}>"

    def open_blocking(self) -> None:
        try:
            make_private(self._root)
            refuse_unsafe(self._root)
            make_private(self._root / "tmp")
            sweep(self._root / "tmp")
            self._temporary = TemporaryFolder.create(self._root / "tmp", self._rank)
        except OSError as error:
            raise _fault(f"cannot use {self._root} as storage folder", error) from error

    def exists_blocking(self, names: Sequence[PageName]) -> int:
        for index, name in enumerate(names):
            try:
                os.stat(self._path(name), follow_symlinks=False)
            except FileNotFoundError:
                return index
            except OSError as error:
                raise _fault("cannot look up a page", error) from error
        return len(names)

    def read_blocking(self, pages: Sequence[IncomingPage]) -> list[PageOutcome]:
        if len(pages) < READERS or len(pages[0].payload) < LEAST_SHARED_PAGE_BYTES:
            return self._read_in_order(pages)
        share = -(-len(pages) // READERS)
        shares = [pages[start : start + share] for start in range(0, len(pages), share)]
        helping = [self._helpers.submit(self._read_in_order, part) for part in shares[1:]]
        outcomes = self._read_in_order(shares[0])
        # Waits for every helper, also behind a gap: the memory is not ours to write once this call has returned.
        for part in [helper.result() for helper in helping]:
            if outcomes[-1] in _READ_ON:
                outcomes += part
        return outcomes

    def write_blocking(self, pages: Sequence[OutgoingPage]) -> list[PageOutcome]:
        outcomes: list[PageOutcome] = []
        for page in pages:
            outcomes.append(self._write(page))
            if isinstance(outcomes[-1], StorageError):
                break
        return outcomes

    def delete_blocking(self, names: Sequence[PageName]) -> int:
        return sum(_unlink(self._path(name)) for name in names)

    def clear_blocking(self, namespace: str) -> int:
        try:
            found = walk_blocking(self._root, namespace)
            removed = sum(_unlink(page.path) for page in found if read_header(page.path) is not None)
        except OSError as error:
            raise _fault("cannot clear", error) from error
        return removed

    def touch_blocking(self, names: Sequence[PageName]) -> None:
        now_s = time.time()
        try:
            if now_s - os.stat(self._path(names[-1])).st_mtime < TOUCH_INTERVAL_S:
                return
            for name in reversed(names):
                os.utime(self._path(name), (now_s, now_s))
        except FileNotFoundError:
            # Somebody cleared or evicted meanwhile; what is gone needs no longer life.
            return
        except OSError as error:
            raise _fault("cannot touch a page", error) from error

    def info(self) -> dict[str, str]:
        return {"path": str(self._root), "fsync": self._fsync}

    def close_blocking(self) -> None:
        self._helpers.shutdown()
        if self._temporary is not None:
            self._temporary.close()
            self._temporary = None

    def _path(self, name: PageName) -> str:
        namespace, raw_key, head_start, head_end = name
        key = raw_key.hex()
        return f"{self._prefix}{namespace}/{key[:2]}/{key}.{head_start}-{head_end}.page"

    def _read_in_order(self, pages: Sequence[IncomingPage]) -> list[PageOutcome]:
        outcomes: list[PageOutcome] = []
        for page in pages:
            outcomes.append(self._read(page))
            if outcomes[-1] not in _READ_ON:
                break
        return outcomes

    def _read(self, page: IncomingPage) -> PageOutcome:
        try:
            descriptor = os.open(self._path(page.name), READ_FLAGS)
        except FileNotFoundError:
            return PageResult.MISS
        except OSError as error:
            if error.errno in _NO_FILE:
                return PageResult.WRONG_SIZE
            return _fault(f"cannot open page {page.name}", error)
        try:
            return PageResult.HIT if _fill(descriptor, page) else PageResult.WRONG_SIZE
        except OSError as error:
            if error.errno in _NO_FILE:
                return PageResult.WRONG_SIZE
            return _fault(f"cannot read page {page.name}", error)
        finally:
            os.close(descriptor)

    def _write(self, page: OutgoingPage) -> PageOutcome:
        path = self._path(page.name)
        try:
            if _has_size(path, page.size_bytes):
                return PageResult.PRESENT
            self._write_new(page, path)
        except OSError as error:
            return _fault(f"cannot write page {page.name}", error)
        return PageResult.WRITTEN

    def _write_new(self, page: OutgoingPage, path: str) -> None:
        if self._temporary is None:
            raise StorageError("the file backend is not open", "contract")
        temporary = self._temporary.next_path()
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            try:
                _pour(descriptor, page)
                if self._fsync == "data":
                    os.fdatasync(descriptor)
                elif self._fsync == "full":
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._publish(temporary, path)
        except OSError:
            _unlink(temporary)
            raise

    def _publish(self, temporary: str, path: str) -> None:
        """Give a complete file its name: from here on every reader sees it, whole."""
        try:
            os.rename(temporary, path)
        except FileNotFoundError:
            make_private(Path(path).parent)
            os.rename(temporary, path)
        if self._fsync == "full":
            _sync_folder(Path(path).parent)


def _fill(descriptor: int, page: IncomingPage) -> bool:
    """Read header and payload; False if the file has another size."""
    payload = page.payload
    size = len(payload)
    # One byte more than there should be: a file that is too long shows without a stat.
    beyond = bytearray(1)
    if size <= CHUNK_BYTES:
        if os.preadv(descriptor, [page.header, payload, beyond], 0) != HEADER_BYTES + size:
            return False
        page.arrived(size)
        return True
    # The first piece is shorter by the header, so that all later reads are aligned in the file.
    end = CHUNK_BYTES - HEADER_BYTES
    if os.preadv(descriptor, [page.header, payload[:end]], 0) != CHUNK_BYTES:
        return False
    page.arrived(end)
    while end < size:
        start, end = end, min(end + CHUNK_BYTES, size)
        tail = [beyond] if end == size else []
        if os.preadv(descriptor, [payload[start:end], *tail], HEADER_BYTES + start) != end - start:
            return False
        page.arrived(end)
    return True


def _pour(descriptor: int, page: OutgoingPage) -> None:
    """Write header and payload.  The header comes last, because it holds the hash of the rest."""
    if len(page.payload) <= WRITE_CHUNK_BYTES:
        _write_all(descriptor, [page.header(), page.payload], 0)
        return
    for start, chunk in page.chunks():
        _write_all(descriptor, [chunk], HEADER_BYTES + start)
    _write_all(descriptor, [page.header()], 0)


def _write_all(descriptor: int, buffers: list[bytes | memoryview], offset: int) -> None:
    wanted = sum(map(len, buffers))
    written = os.pwritev(descriptor, buffers, offset)
    if written != wanted:
        # A regular file takes less than asked when the disk is full; asking again would only say so by errno.
        raise OSError(errno.ENOSPC, f"only {written} of {wanted} bytes were taken")


def _has_size(path: str, size_bytes: int) -> bool:
    try:
        return os.stat(path, follow_symlinks=False).st_size == size_bytes
    except FileNotFoundError:
        return False


def _unlink(path: str) -> bool:
    """Remove a file; False if it was not there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _fault("cannot delete a page", error) from error
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fault(what: str, error: OSError) -> StorageError:
    """An error of the system as a value."""
    return StorageError(f"{what}: {error}", "no_space" if error.errno in _NO_SPACE else "io")
