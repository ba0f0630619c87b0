"""Pages as files in one private folder.

    <root>/<namespace>/<first two digits of the key>/<key>.<head_start>-<head_end>.page
    <root>/tmp/<rank>-<nonce>/      pages being written by one process, and the lock that says it lives
    <root>/quarantine/              bad pages, bounded; no look-up goes there
    <root>/usage.json, evictor.lock what was counted, and who counts and deletes

Who owns what: a file below a namespace is immutable once it has its name; it appears by `rename` and goes by `unlink`,
so that a reader meets a whole page or none, whatever happened to a writer.  Several processes and servers may share
the folder: `file_share.py` says how much each may write, `file_evictor.py` deletes what is too much.

Called by the two lanes of a storage process (see `backend.py`).  Never follows a symbolic link to a page, never creates
anything that another user could read.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sglang_hicache.errors import StorageError
from sglang_hicache.private_file import sync_folder_blocking
from sglang_hicache.storage.backend import OpenContext, PageOutcome, PageResult, StorageBackend
from sglang_hicache.storage.capacity import Limits, default_min_free_bytes, size_text
from sglang_hicache.storage.file_evictor import Evictor
from sglang_hicache.storage.file_folder import Lease, make_private, storage_folder, sweep, with_environment
from sglang_hicache.storage.file_pages import READ_FLAGS, TMP, TOUCH_INTERVAL_S, page_path, read_header, walk_blocking
from sglang_hicache.storage.file_quarantine import set_aside_blocking, trim_blocking
from sglang_hicache.storage.file_share import Share
from sglang_hicache.storage.file_transfer import fill_blocking, pour_blocking
from sglang_hicache.storage.page_format import HEADER_BYTES, ROOT_PARENT, IncomingPage, OutgoingPage, PageName
from sglang_hicache.storage.settings import FileSettings

_logger = logging.getLogger(__name__)

#: Threads that read one batch: the lane's own and its helpers.  A disk is fast only with several requests in its queue,
#: and while one thread hashes what has come, another reads.
READERS = 2

#: Smaller pages are read by the lane alone: two threads would spend more time handing the interpreter to each other
#: than the kernel spends on a page.
LEAST_SHARED_PAGE_BYTES = 256 * 1024

#: A read goes on behind these: one call then shows every damaged page of the batch, not only the first.
_READ_ON = (PageResult.HIT, PageResult.WRONG_SIZE)

#: The disk, the quota, or the largest file of this process.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

#: An open that meets these would meet them again.
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)

#: What the system says when a page's name belongs to a link, a folder, a pipe or a socket: no page, and in its way.
_NO_FILE = (errno.ELOOP, errno.EISDIR, errno.ESPIPE, errno.ENXIO)


class FileBackend(StorageBackend):
    """One process's access to the folder."""

    def __init__(self, settings: FileSettings, context: OpenContext) -> None:
        settings = with_environment(settings)
        self._root = storage_folder(settings.file_storage_path)
        #: As text, because making it costs more than looking up a page.
        self._folder = str(self._root)
        #: Whoever else could write here once may have left pages; what they say is not what this model computed.
        self._user = os.geteuid()
        self._fsync = settings.fsync
        self._min_free_bytes = settings.min_free_bytes()
        page_bytes, max_bytes = HEADER_BYTES + context.page_bytes, settings.max_bytes()
        self._max_bytes = max_bytes
        if max_bytes and max_bytes < page_bytes:
            raise StorageError(
                f"max_size={settings.max_size} is less than one page of {page_bytes} bytes; give more, or 0: no limit",
                "refused",
                "bad_config",
            )
        high, low = settings.watermarks()
        limits = Limits(max_bytes or 0, self._min_free_bytes or 0, high, low, page_bytes)
        lease = Lease(context.namespace, page_bytes, max_bytes or 0, settings.ttl_s)
        self._share = Share(self._root, context.rank, limits, lease, lambda: self._evictor.wake())
        self._evictor = Evictor(self._share, max_bytes)
        self._helpers = ThreadPoolExecutor(READERS - 1, "file reader")
        self._no_space_pages = 0

    def __repr__(self) -> str:
        return f"<FileBackend {self._root} fsync={self._fsync}>"

    def open_blocking(self) -> None:
        try:
            self._join()
            disk = os.statvfs(self._root)
            sweep(self._root / TMP)
        except OSError as error:
            raise fault(f"cannot use {self._root} as storage folder", error) from error
        disk_bytes = disk.f_blocks * disk.f_frsize
        if self._min_free_bytes is None:
            self._share.keep_free(default_min_free_bytes(disk_bytes))
        elif self._min_free_bytes >= disk_bytes > 0:
            raise StorageError(
                f"min_free_space={size_text(self._min_free_bytes)} is all of the disk, which has "
                f"{size_text(disk_bytes)}; give less",
                "refused",
                "bad_config",
            )
        self._evictor.start()

    def _join(self) -> None:
        """Take part in the store.  On a disk that is full to the last block pages can be read all the same."""
        try:
            self._share.open_blocking()
        except OSError as error:
            if error.errno not in _NO_SPACE or not (self._root / TMP).is_dir():
                raise
            _logger.warning("file store %s: nothing can be written now: %s", self._root, error)

    def exists_blocking(self, names: Sequence[PageName]) -> int:
        for index, name in enumerate(names):
            try:
                if os.stat(self._path(name), follow_symlinks=False).st_uid != self._user:
                    return index
            except FileNotFoundError:
                return index
            except OSError as error:
                raise fault("cannot look up a page", error) from error
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
        try:
            self._touch_parent(pages[0])
        except OSError as error:
            return [fault("cannot look at the parent of a page", error)]
        for page in pages:
            outcomes.append(self._write(page))
            if isinstance(outcomes[-1], StorageError):
                break
        self._share.tell()
        return outcomes

    def delete_blocking(self, names: Sequence[PageName]) -> int:
        removed = sum(self._delete(self._path(name)) for name in names)
        self._share.tell()
        return removed

    def set_aside_blocking(self, name: PageName) -> bool:
        try:
            if not set_aside_blocking(self._root, self._path(name), name):
                return False
            self._share.changed(0, -1)
            self._share.changed(-trim_blocking(self._root, self._share.limits.max_bytes), 0)
        except OSError as error:
            raise fault("cannot set a page aside", error) from error
        self._share.tell()
        return True

    def clear_blocking(self, namespace: str) -> int:
        try:
            found = walk_blocking(self._root, namespace)
            removed = sum(self._delete(page.path) for page in found if read_header(page.path) is not None)
        except OSError as error:
            raise fault("cannot clear", error) from error
        finally:
            self._share.tell()
        return removed

    def touch_blocking(self, names: Sequence[PageName]) -> None:
        now_s = time.time()
        try:
            if now_s - os.stat(self._path(names[-1]), follow_symlinks=False).st_mtime < TOUCH_INTERVAL_S:
                return
            for name in reversed(names):
                os.utime(self._path(name), (now_s, now_s), follow_symlinks=False)
        except FileNotFoundError:
            # Somebody cleared or evicted meanwhile; what is gone needs no longer life.
            return
        except OSError as error:
            raise fault("cannot touch a page", error) from error

    def use_namespace(self, namespace: str) -> None:
        self._share.use_namespace(namespace)

    def info(self) -> dict[str, str]:
        max_bytes = self._share.limits.max_bytes
        if max_bytes:
            max_size = size_text(max_bytes)
        elif self._max_bytes == 0:
            max_size = "no limit"
        else:
            # Asked at the end of an attach, which does not wait until a large folder is counted.
            max_size = "a share of the disk: max_bytes in the stats, when all pages are counted"
        facts = {"path": str(self._root), "fsync": self._fsync, "max_size": max_size}
        return facts | ({"why": self._evictor.why} if self._evictor.why else {})

    def stats(self) -> dict[str, int]:
        view = self._share.view
        return {
            "used_bytes": view.used_bytes,
            "used_pages": view.own_files,
            "other_namespace_pages": view.other_files,
            "foreign_files": view.foreign_files,
            "evicted_pages": self._evictor.evicted_pages,
            "expired_pages": self._evictor.expired_pages,
            "no_space_pages": self._no_space_pages,
            "max_bytes": self._share.limits.max_bytes,
            "free_bytes": view.free_bytes,
        }

    def close_blocking(self) -> None:
        self._helpers.shutdown()
        self._evictor.stop_blocking()
        self._share.close_blocking()

    def _path(self, name: PageName) -> str:
        return page_path(self._folder, name)

    def _delete(self, path: str) -> bool:
        """Remove a page and count it; False if it was not there."""
        try:
            size_bytes = os.stat(path, follow_symlinks=False).st_size
        except FileNotFoundError:
            return False
        except OSError as error:
            raise fault("cannot delete a page", error) from error
        if not _unlink(path):
            return False
        self._share.changed(-size_bytes, -1)
        return True

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
            return fault(f"cannot open page {page.name}", error)
        try:
            return PageResult.HIT if fill_blocking(descriptor, page) else PageResult.WRONG_SIZE
        except OSError as error:
            if error.errno in _NO_FILE:
                return PageResult.WRONG_SIZE
            return fault(f"cannot read page {page.name}", error)
        finally:
            os.close(descriptor)

    def _write(self, page: OutgoingPage) -> PageOutcome:
        path = self._path(page.name)
        try:
            if self._is_there(path, page.size_bytes):
                return PageResult.PRESENT
            if not self._share.claim(page.size_bytes):
                self._no_space_pages += 1
                return StorageError(f"no room for page {page.name}: {self._share.why_full()}", "no_space")
            try:
                self._write_new(page, path)
            except FileNotFoundError:
                # Somebody has deleted the folder under us: what was in it is gone, and the next pages need a place.
                self._share.open_blocking()
                _logger.warning("file store %s: there was no folder to write in; it was made anew", self._root)
                self._write_new(page, path)
        except OSError as error:
            if error.errno in _NO_SPACE:
                self._no_space_pages += 1
                self._share.disk_is_full()
            return fault(f"cannot write page {page.name}", error)
        self._share.changed(page.size_bytes, 1)
        return PageResult.WRITTEN

    def _is_there(self, path: str, size_bytes: int) -> bool:
        """Is the page stored?  If so it has been used just now."""
        try:
            found = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if found.st_size != size_bytes or not stat.S_ISREG(found.st_mode) or found.st_uid != self._user:
            return False
        if time.time() - found.st_mtime >= TOUCH_INTERVAL_S:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path, follow_symlinks=False)
        return True

    def _touch_parent(self, page: OutgoingPage) -> None:
        """A page that gets a child is in use: whoever evicts looks at its time last of all."""
        if page.parent == ROOT_PARENT:
            return
        path = self._path(page.name._replace(key=page.parent))
        with contextlib.suppress(FileNotFoundError):
            if time.time() - os.stat(path, follow_symlinks=False).st_mtime >= TOUCH_INTERVAL_S:
                os.utime(path, follow_symlinks=False)

    def _write_new(self, page: OutgoingPage, path: str) -> None:
        temporary = self._share.temporary_path()
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            try:
                pour_blocking(descriptor, page)
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
            sync_folder_blocking(Path(path).parent)


def _unlink(path: str) -> bool:
    """Remove a file; False if it was not there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise fault("cannot delete a page", error) from error
    return True


def fault(what: str, error: OSError) -> StorageError:
    """An error of the system as a value."""
    reason = "no_space" if error.errno in _NO_SPACE else "refused" if error.errno in _REFUSED else "io"
    return StorageError(f"{what}: {error}", reason)
