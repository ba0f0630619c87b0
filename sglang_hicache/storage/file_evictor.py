"""The thread that keeps a file store within its limits: one per process, one of them at work per store.

Which one that is says the `flock` on `<root>/evictor.lock`: who has it counts the pages, publishes the sum and deletes;
the others try to get it once a second, and the kernel drops it with its holder.  Nothing here is called by a lane but
`wake`, and no lane ever waits for it: a page is deleted by `unlink`, which a reader that has it open does not notice.

Pages of every namespace under the root count and may go; a file that is not ours never does.  Of several servers with
different limits the smallest one that is alive holds for all.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec

from sglang_hicache.storage.capacity import DEFAULT_SHARE, Limits, Page, default_max_bytes, size_text
from sglang_hicache.storage.file_folder import Lease, leases_blocking, sweep
from sglang_hicache.storage.file_index import FileIndex
from sglang_hicache.storage.file_pages import EVICTOR_LOCK, TMP, TOUCH_INTERVAL_S, page_path
from sglang_hicache.storage.file_share import Share, Usage

_logger = logging.getLogger(__name__)

#: How often the thread looks around when nobody wakes it.
TICK_S = 1.0

#: How often it looks for what no lease tells of: files that somebody else has deleted.
_RECOUNT_S = 600.0

#: After a count, and after a search for old pages, this many times as long as it took until the next one.
_REST = 100

#: Pages past their time are looked for this often, more often where their time is short, and less often where looking
#: through all pages takes long.
_EXPIRY_S = 60.0

#: A walk over many pages lets the lanes have the interpreter for a moment.
_BREATH_S = 0.0005

#: Pages between two words to the others about how much room there is.
_PUBLISH_PAGES = 1024


class _Stopping(Exception):
    """The store is being closed."""


class Evictor:
    """Housekeeping of one process."""

    def __init__(self, share: Share, max_bytes: int | None, clock: Callable[[], float] = time.time) -> None:
        self._share = share
        self._max_bytes = max_bytes
        self._clock = clock
        self._wanted = threading.Condition()
        self._is_woken = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="file evictor", daemon=True)
        self._lock: int | None = None
        self._index = FileIndex(share.root)
        self._usage: Usage | None = None
        self._leases: dict[str, Lease] = {}
        #: What the leases said when the last count began.
        self._leases_then: dict[str, Lease] = {}
        self._published: Usage | None = None
        self._counted_s = self._expired_s = 0.0
        #: What went wrong in the last tick, so that it is said once and not every second.
        self._complaint = ""
        #: After a search that found nothing to delete: writers that are refused would have it repeated at once.
        self._rests_until_s = 0.0
        #: How long the last count took, and the last search for the first page to delete.
        self.count_s = 0.0
        self.search_s = 0.0
        #: Where the limit comes from; "" until it is known.
        self.why = ""
        self.evicted_pages = 0
        self.expired_pages = 0

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """Look now.  Any thread."""
        with self._wanted:
            self._is_woken = True
            self._wanted.notify()

    def stop_blocking(self) -> None:
        """End, and let another process have the work."""
        self._stopping.set()
        self.wake()
        if self._thread.ident is not None:
            self._thread.join()
        self._give_up_lock()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._tick_or_say_why_not()
                with self._wanted:
                    if not self._is_woken:
                        self._wanted.wait(TICK_S)
                    self._is_woken = False
        finally:
            self._give_up_lock()

    def _tick_or_say_why_not(self) -> None:
        complaint = ""
        try:
            self.tick_blocking()
        except _Stopping:
            return
        except OSError as error:
            # A disk that fails, a folder that somebody deletes: the store serves on, and the next tick tries again.
            complaint = str(error)
            if complaint != self._complaint:
                _logger.warning("file store %s: cannot keep it within its limit: %s", self._share.root, error)
        self._complaint = complaint

    def tick_blocking(self) -> None:
        """Look around once, and do what is to be done."""
        try:
            self._keep_house()
        finally:
            self._share.look_blocking()

    def _keep_house(self) -> None:
        if not self._has_lock():
            self._usage = self._share.usage_blocking()
            if self._usage is not None:
                self._learn_limit(self._usage)
            return
        has_lost_one = self._count_leases()
        now_s = self._clock()
        if self._usage is None or has_lost_one or _is_over(now_s, self._counted_s, self._rest_s()):
            self._count()
        assert self._usage is not None
        self._learn_limit(self._usage)
        ttl_s = min((lease.ttl_s for lease in self._users() if lease.ttl_s), default=0)
        expiry_rest_s = max(min(_EXPIRY_S, ttl_s / 10), _REST * self.search_s)
        failure = None
        if (ttl_s and _is_over(now_s, self._expired_s, expiry_rest_s)) or self._excess():
            self._count()
            failure = self._evict(int(now_s - ttl_s - TOUCH_INTERVAL_S) if ttl_s else None)
            self._expired_s = now_s
        self._publish()
        if failure is not None:
            raise failure

    def _has_lock(self) -> bool:
        """Is this the process that evicts?  Tries to become it."""
        path = self._share.root / EVICTOR_LOCK
        if self._lock is not None:
            if _is_file(path, self._lock):
                return True
            # The folder was deleted and made anew: another process may hold the lock of the new one.
            self._give_up_lock()
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        self._lock = lock
        return _is_file(path, lock)

    def _give_up_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self._index = FileIndex(self._share.root)
        self._usage = self._published = None

    def _count_leases(self) -> bool:
        """See who lives and what they wrote; True if somebody left without having been counted to the end."""
        folder = self._share.root / TMP
        before = self._leases | leases_blocking(folder)
        sweep(folder)
        self._leases = leases_blocking(folder)
        gone = before.keys() - self._leases.keys()
        if self._usage is not None and gone:
            usage = self._usage
            counted = {name: at for name, at in usage.counted.items() if name not in gone}
            departed = {name: before[name] for name in gone}
            self._usage = msgspec.structs.replace(
                usage, bytes=usage.bytes_now(departed), files=usage.files_now(departed), counted=counted
            )
        return bool(gone)

    def _count(self) -> None:
        """Bring the index up to date, and start the sum anew."""
        started_s = time.monotonic()
        before = leases_blocking(self._share.root / TMP)
        self._index.refresh_blocking(self._breathe)
        after = before | leases_blocking(self._share.root / TMP)
        # The smaller of both: what was written or deleted meanwhile may count twice for a while, and never not at all.
        # With what was said before alone, a page that an attach writes and deletes to test the store is less than none.
        counted = {
            name: (min(then.bytes, after[name].bytes), min(then.files, after[name].files))
            for name, then in before.items()
        }
        self._leases, self._leases_then = after, before
        self._counted_s = self._clock()
        self._usage = Usage(
            bytes=self._index.used_bytes,
            max_bytes=0,
            files={name: count for name, count in self._index.catalogue.objects.items() if count},
            foreign_files=self._index.foreign_files,
            counted=counted,
        )
        self.count_s = time.monotonic() - started_s

    def _rest_s(self) -> float:
        """How long the sum is good enough.  What was written during the count may be in it twice, and what is written
        since shows in the leases: then it is time for another one as soon as that costs little."""
        return _RECOUNT_S if self._leases == self._leases_then else max(TICK_S, _REST * self.count_s)

    def _users(self) -> list[Lease]:
        """All processes on this root.  On a full disk this one may have no lease to show."""
        return [self._share.lease, *self._leases.values()]

    def _learn_limit(self, usage: Usage) -> None:
        """Once: how much the store may take, now that it is known how much it has."""
        if self.why:
            return
        share, disk = self._share, os.statvfs(self._share.root)
        used, free = usage.bytes_now(leases_blocking(share.root / TMP)), disk.f_bavail * disk.f_frsize
        if self._max_bytes is None:
            share.limit(default_max_bytes(used, free))
            self.why = f"{DEFAULT_SHARE:.0%} of the {size_text(used + free)} that are free or its own"
        else:
            self.why = "max_size" if self._max_bytes else "max_size=0: only the disk limits it"
        own = usage.files.get(share.lease.namespace, 0)
        _logger.info(
            "file store %s: %d pages of this model, %d of others, %d files that are none of its pages, together %s; "
            "limit %s (%s), %s stay free on the disk; %s",
            share.root, own, sum(usage.files.values()) - own, usage.foreign_files, size_text(used),
            size_text(share.limits.max_bytes), self.why, size_text(share.limits.min_free_bytes),
            f"counted in {self.count_s:.1f} s" if self._lock is not None else "counted by another process",
        )  # fmt: skip

    def _limits(self) -> Limits:
        """What holds for all processes on this root."""
        caps = [lease.max_bytes for lease in self._users() if lease.max_bytes]
        page_bytes = max(lease.page_bytes for lease in self._users())
        return replace(self._share.limits, max_bytes=min(caps, default=0), page_bytes=page_bytes)

    def _excess(self) -> int:
        """Bytes that must go now."""
        assert self._usage is not None
        if time.monotonic() < self._rests_until_s:
            return 0
        disk = os.statvfs(self._share.root)
        return self._limits().excess(self._usage.bytes_now(self._leases), disk.f_bavail * disk.f_frsize)

    def _evict(self, unused_since: int | None) -> OSError | None:
        """Delete what is past its time, and as much again as is too much; the first error of the system."""
        started_s = time.monotonic()
        excess = self._excess()
        in_use = {lease.namespace for lease in self._users()}
        taken, failure = 0, None
        victims = self._index.catalogue.victims(in_use, unused_since, self._breathe)
        for number, (page, is_expired) in enumerate(victims):
            if not number:
                self.search_s = time.monotonic() - started_s
            if excess <= 0 and not is_expired:
                break
            try:
                freed = self._take_out(page, is_expired)
            except OSError as error:
                # One file that cannot be deleted must not keep all others from it.  Its parents stay: it is there.
                failure, freed = failure or error, 0
            excess -= freed
            taken += freed > 0
            if taken % _PUBLISH_PAGES == 0:
                self._publish()
            if self._stopping.is_set():
                raise _Stopping
        self._index.drop_folders_blocking(in_use)
        if not taken:
            self._rests_until_s = time.monotonic() + TICK_S
        return failure

    def _take_out(self, page: Page, is_expired: bool) -> int:
        """Delete a page unless it was used or replaced meanwhile; bytes that this gave."""
        catalogue, freed, files = self._index.catalogue, 0, 0
        paths = {name: page_path(self._share.root, name) for name in page.names}
        for (_, _, size_bytes), (name, path) in zip(page.ranges, paths.items(), strict=True):
            try:
                found = os.stat(path, follow_symlinks=False)
            except FileNotFoundError:
                catalogue.remove_range(page, name)
                continue
            if not stat.S_ISREG(found.st_mode) or found.st_size != size_bytes:
                # Another file than the one that was counted: to be looked at anew, not to be deleted.
                self._index.doubt(page)
                return 0
            if int(found.st_mtime) > page.last_used:
                catalogue.touch(page.namespace, page.key, int(found.st_mtime))
                return 0
        for name, (_, _, size_bytes) in zip(page.names, page.ranges, strict=True):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(paths[name])
                freed += size_bytes
                files += 1
        catalogue.remove(page)
        self._account(page.namespace, freed, files)
        self.evicted_pages += files > 0 and not is_expired
        self.expired_pages += files > 0 and is_expired
        return freed

    def _account(self, namespace: str, freed_bytes: int, files: int) -> None:
        assert self._usage is not None
        left = self._usage.files | {namespace: self._usage.files.get(namespace, 0) - files}
        self._usage = msgspec.structs.replace(self._usage, bytes=self._usage.bytes - freed_bytes, files=left)

    def _publish(self) -> None:
        """Tell the others, if there is something new.  With what the leases say: when the last of them is gone, the
        next process would else write too much until it has counted."""
        assert self._usage is not None
        usage = msgspec.structs.replace(
            self._usage,
            bytes=self._usage.bytes_now(self._leases),
            max_bytes=self._limits().max_bytes,
            files=self._usage.files_now(self._leases),
            counted={name: (lease.bytes, lease.files) for name, lease in self._leases.items()},
        )
        if usage != self._published:
            self._share.publish_blocking(usage)
            self._published = usage

    def _breathe(self) -> None:
        if self._stopping.wait(_BREATH_S):
            raise _Stopping


def _is_over(now_s: float, since_s: float, wait_s: float) -> bool:
    """Has the time passed?  A clock that was set back says yes, rather than nothing for a year."""
    return not 0 <= now_s - since_s < wait_s


def _is_file(path: Path, descriptor: int) -> bool:
    """Is this what the path leads to?"""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))
