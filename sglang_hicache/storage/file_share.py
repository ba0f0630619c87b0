"""What one process may write into a file store that several share, and what it has written.

The process that evicts counts all pages and publishes the sum (`usage.json`) together with what every process's lease
said at that moment.  From then on everybody adds what the leases say now and said then: no byte is counted twice, and
none is forgotten when a process dies, because its lease stays until somebody counts again.  A process looks before it
writes, and may then write a hundredth of the store before it looks again, so that all of them together overshoot the
limit by at most that each.

Called by both lanes and by the thread of `file_evictor.py`; its lock is held for a few small reads at most.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec

from sglang_hicache.storage.capacity import Limits, size_text
from sglang_hicache.storage.file_folder import Lease, TemporaryFolder, leases_blocking, make_private, refuse_unsafe
from sglang_hicache.storage.file_pages import TMP, USAGE

#: Share of the store that is written between two looks at what the others do, and the longest time between two.
_GRANT_SHARE = 0.01
_LOOK_S = 1.0

#: The first page after an open, if it is as small as this, is let through: the self-test of an attach to a full store,
#: which must come to run for anything to be evicted.
_FREE_PAGE_BYTES = 8192


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What was counted under a root; published for all processes on it."""

    #: Bytes of all pages and of those set aside.
    bytes: int
    #: Smallest limit of all living processes; 0: none.
    max_bytes: int
    #: Files of pages by namespace.
    files: dict[str, int]
    #: What lies under the root and is not ours.
    foreign_files: int
    #: By lease: of the bytes and files that it tells, those that are in these sums.
    counted: dict[str, tuple[int, int]]

    def bytes_now(self, leases: Mapping[str, Lease]) -> int:
        """Bytes with what was written and deleted since."""
        since = sum(lease.bytes - self.counted.get(name, (0, 0))[0] for name, lease in leases.items())
        # A count may see that a page is gone in the moment before its process says so.
        return max(0, self.bytes + since)

    def files_now(self, leases: Mapping[str, Lease]) -> dict[str, int]:
        """Files by namespace with what was written and deleted since."""
        files = dict(self.files)
        for name, lease in leases.items():
            since = lease.files - self.counted.get(name, (0, 0))[1]
            files[lease.namespace] = files.get(lease.namespace, 0) + since
        return {namespace: max(0, count) for namespace, count in files.items()}


_NOTHING_COUNTED = Usage(bytes=0, max_bytes=0, files={}, foreign_files=0, counted={})


class View(msgspec.Struct):
    """The store as one process saw it last, and what it has done itself since."""

    used_bytes: int = 0
    free_bytes: int = 0
    #: Files of pages of its own namespace, and of all others.
    own_files: int = 0
    other_files: int = 0
    foreign_files: int = 0
    #: The limit that holds: the smallest one of all servers on this folder; 0: none.
    max_bytes: int = 0


class Share:
    """One process's part in a store."""

    def __init__(self, root: Path, rank: int, limits: Limits, lease: Lease, wake: Callable[[], None]) -> None:
        self.root = root
        #: What this process lets the store take.  The thread that evicts fills in the default when it knows the disk.
        self.limits = limits
        self._rank = rank
        self._lease = lease
        self._namespace = lease.namespace
        self._wake = wake
        self._lock = threading.Lock()
        self._temporary: TemporaryFolder | None = None
        self._is_first = True
        self._granted = 0
        self._looked_s = 0.0
        self._written_bytes = self._written_files = 0
        self._usage = _NOTHING_COUNTED
        self._leases: dict[str, Lease] = {}
        #: For whoever shows it; nothing is asked of the disk then.
        self.view = View()

    @property
    def lease(self) -> Lease:
        """What this process says of itself, but for what it has written."""
        return self._lease._replace(namespace=self._namespace)

    def open_blocking(self) -> None:
        """Take part.  Called again when somebody has deleted the folder."""
        with self._lock:
            self._leave()
            make_private(self.root)
            refuse_unsafe(self.root)
            make_private(self.root / TMP)
            self._granted = 0
            self._temporary = TemporaryFolder.create(self.root / TMP, self._rank)
            self._tell()

    def close_blocking(self) -> None:
        """Take part no longer."""
        with self._lock:
            self._leave()

    def temporary_path(self) -> str:
        """Where to write a page that has no name yet.  FileNotFoundError: there is no such place, and `open_blocking`
        may make one."""
        temporary = self._temporary
        if temporary is None:
            raise FileNotFoundError(errno.ENOENT, "no temporary folder")
        return temporary.next_path()

    def claim(self, size_bytes: int) -> bool:
        """May a page of this size be written now?"""
        with self._lock:
            if self._granted < size_bytes or time.monotonic() - self._looked_s > _LOOK_S:
                self._look(size_bytes)
            is_free = self._is_first and size_bytes <= _FREE_PAGE_BYTES
            self._is_first = False
            if self._granted < size_bytes:
                return is_free
            self._granted -= size_bytes
            return True

    def disk_is_full(self) -> None:
        """The system took nothing, whatever was counted: look again before the next page."""
        with self._lock:
            self._granted = 0
        self._wake()

    def changed(self, size_bytes: int, files: int) -> None:
        """So much was written, or deleted where it is negative.  The others hear of it with the next `tell`."""
        with self._lock:
            self._written_bytes += size_bytes
            self._written_files += files
            self.view.used_bytes += size_bytes
            self.view.own_files += files

    def tell(self) -> None:
        """Let the others know what was written: once for a batch, because it costs as much as hashing a small page."""
        with self._lock:
            self._tell()

    def use_namespace(self, namespace: str) -> None:
        """From now on this process uses the pages of another model."""
        # Without the lock, because the main thread calls this and must not wait for a disk; told with the next look.
        self._namespace = namespace

    def limit(self, max_bytes: int) -> None:
        """From now on this process lets the store take so much."""
        with self._lock:
            self.limits = replace(self.limits, max_bytes=max_bytes)
            self._lease = self._lease._replace(max_bytes=max_bytes)
            self._granted = 0
            self._tell()

    def keep_free(self, min_free_bytes: int) -> None:
        """From now on so much of the disk stays free."""
        with self._lock:
            self.limits = replace(self.limits, min_free_bytes=min_free_bytes)

    def why_full(self) -> str:
        """For whoever was refused."""
        view, limits = self.view, self.limits
        of = f" of at most {size_text(view.max_bytes)}" if view.max_bytes else ""
        if view.max_bytes and view.max_bytes != limits.max_bytes:
            of += " (max_size of another server on this folder, less than ours)"
        return (
            f"the pages under {self.root} have {size_text(view.used_bytes)}{of}, and {size_text(view.free_bytes)} of "
            f"the disk are free, of which {size_text(limits.min_free_bytes)} stay free"
        )

    def look_blocking(self) -> None:
        """See how full the store is."""
        with self._lock:
            self._look(0)

    def publish_blocking(self, usage: Usage) -> None:
        """Tell every process on this root what was counted."""
        # Once: a lane may make another folder this moment.
        folder = self._temporary
        if folder is None:
            return
        temporary = folder.path / "usage"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            raw = msgspec.json.encode(usage)
            if os.write(descriptor, raw) != len(raw):
                raise OSError(errno.ENOSPC, "the disk is full")
        finally:
            os.close(descriptor)
        os.rename(temporary, self.root / USAGE)

    def usage_blocking(self) -> Usage | None:
        """What was counted last; None if that is not known."""
        try:
            raw = (self.root / USAGE).read_bytes()
        except FileNotFoundError:
            return None
        try:
            return msgspec.json.decode(raw, type=Usage)
        except (msgspec.DecodeError, UnicodeDecodeError):
            # Torn by a power cut; it will be counted anew.
            return None

    def _look(self, wanted_bytes: int) -> None:
        self._looked_s = time.monotonic()
        self._tell()
        try:
            usage = self.usage_blocking() or _NOTHING_COUNTED
            if usage != self._usage:
                self._usage, self._leases = usage, {}
            # Whoever has left since the sum was published stands in no lease any more, and not yet in the sum.
            self._leases |= leases_blocking(self.root / TMP)
            disk = os.statvfs(self.root)
        except FileNotFoundError:
            # Somebody has deleted the folder: the write itself finds out and makes it anew.
            self._granted = max(self._granted, wanted_bytes)
            return
        used, free = usage.bytes_now(self._leases), disk.f_bavail * disk.f_frsize
        files = usage.files_now(self._leases)
        own = files.get(self._namespace, 0)
        caps = [size for size in (self.limits.max_bytes, usage.max_bytes) if size]
        limits = replace(self.limits, max_bytes=min(caps, default=0))
        self.view = View(used, free, own, sum(files.values()) - own, usage.foreign_files, limits.max_bytes)
        grant = max(wanted_bytes, int(_GRANT_SHARE * limits.ceiling(used, free)))
        self._granted = min(grant, limits.room(used, free))
        if limits.excess(used, free):
            self._wake()

    def _tell(self) -> None:
        if self._temporary is not None:
            # On a full disk even this may fail.  The next one says it all, and a count of the files knows it anyway.
            with contextlib.suppress(OSError):
                self._temporary.tell(self.lease._replace(bytes=self._written_bytes, files=self._written_files))

    def _leave(self) -> None:
        if self._temporary is not None:
            self._temporary.close()
            self._temporary = None
