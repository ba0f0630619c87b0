"""The audit log: one JSON line for each thing that was done, and nobody changes a line without being found out.

Used by the tokenizer process, and by `hicachectl audit verify`.  Every line ends with an HMAC over itself and names the
one before it, under a key that lies beside the log in a file of this user; the newest line's number and HMAC are the
head.  Whoever cuts lines off at the end leaves a log that is whole in itself: only a head that was kept elsewhere (the
server's own log, a `GET`) shows that there was more.  Whoever can read the key can write any log.

`append` may be called from any thread and never waits for the disk: one thread owns the file.  What cannot be written
stays in memory, is told as an error, and is tried again.  There is no rotation: a log that is moved away begins anew in
the middle, which is an error, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import stat
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sglang_hicache.audit_chain import (
    FIRST,
    KEY_BYTES,
    MOST_ENTRIES,
    Head,
    Keys,
    chained,
    flaw_of_mode,
    genesis,
    key_path,
    parse_keys,
    parse_line,
)
from sglang_hicache.audit_chain import verify as verify
from sglang_hicache.errors import UserError
from sglang_hicache.private_file import NotPrivate, read_private_blocking, write_private_blocking

log = logging.getLogger(__name__)

#: Entries that may wait for a disk that does not take them.
MOST_WAITING = 10_000

#: Seconds between two tries to write.
RETRY_S = 1.0

#: Seconds that the end of the server may wait for the last entries.
CLOSE_S = 5.0

#: At the end of a log its newest entry is looked for in so many bytes.  No entry is nearly as long.
_TAIL_BYTES = 1 << 20

#: Characters after which no further damage is added to what is told: somebody who changes the log may do so all day.
_LONGEST_DAMAGE = 2000

_LOG_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def utc(at_s: float) -> str:
    """A moment as people and programs read it."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class AuditLog:
    """A log that this process writes to."""

    def __init__(self, path: str) -> None:
        """Open or begin it.  UserError: it cannot be written, or what it holds cannot be continued."""
        self._path = Path(path)
        self._descriptor = _open_blocking(self._path)
        try:
            self._keys = _keys_blocking(self._path, os.fstat(self._descriptor).st_size)
            self._head, found = _repaired_blocking(self._descriptor, self._keys)
        except (OSError, UserError) as error:
            os.close(self._descriptor)
            raise UserError(f"the audit log {path!r} cannot be used: {error}") from error
        #: Bytes of the file as this process left it.
        self._size = os.fstat(self._descriptor).st_size
        #: Entries and what waits for them, oldest first; with `_is_closing` and `_lost` under `_changed`.
        self._waiting: deque[tuple[dict[str, Any], Future[str]]] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._lost = 0
        #: Why entries wait, and what has happened to those that were written.
        self._failure = ""
        self._damage = ""
        self._latest_damage = ""
        if flaw_of_its_mode := flaw_of_mode(os.fstat(self._descriptor).st_mode):
            found.append(flaw_of_its_mode)
        for flaw in found:
            self._damaged(flaw)
        self._thread = threading.Thread(target=self._run_blocking, name="audit", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<AuditLog {self._path} head {self._head.number}, {len(self._waiting)} waiting>"

    @property
    def head(self) -> str:
        """Number and HMAC of the newest entry on the disk."""
        return str(self._head)

    @property
    def error(self) -> str:
        """What is wrong with the log, in words; "" when nothing is."""
        waiting = len(self._waiting)
        failure = f"{self._failure}; {waiting} entries wait in memory" if self._failure else ""
        return "; ".join(filter(None, (self._damage, failure)))

    def fingerprint(self, key: bytes) -> str:
        """What the log calls a key."""
        return hashlib.sha256(self._keys.salt + key).hexdigest()[:8]

    def append(self, entry: Mapping[str, Any]) -> Future[str]:
        """Write an entry; its head when it is on the disk."""
        future: Future[str] = Future()
        future.set_running_or_notify_cancel()  # whoever stops waiting for it must not stop the entry
        with self._changed:
            if self._is_closing or len(self._waiting) >= MOST_WAITING:
                self._lost += 1
                future.set_exception(OSError("the audit log takes no more"))
                return future
            self._waiting.append(({"time": utc(time.time()), **entry}, future))
            self._changed.notify()
        return future

    def close_blocking(self) -> None:
        """Write what waits, for a bounded time."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.error("the audit log %s: the disk does not answer; %d entries are lost", self._path, len(self._waiting))
            return
        os.close(self._descriptor)

    # ------------------------------------------------------------------------------ the thread of the file

    def _run_blocking(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closing)
                is_last, batch, lost = self._is_closing, list(self._waiting), self._lost
            if batch or lost:
                self._write_blocking(batch, lost)
            if is_last:
                if self._waiting:
                    log.error("the audit log %s: %d entries are lost: %s", self._path, len(self._waiting), self.error)
                return
            if self._failure:
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closing, RETRY_S)

    def _write_blocking(self, batch: list[tuple[dict[str, Any], Future[str]]], lost: int) -> None:
        """All of them, or none: what a full disk has taken of them is taken back."""
        entries = [entry for entry, _ in batch]
        if lost:
            gone = {"time": utc(time.time()), "event": "lost", "what": f"{lost} entries found no room in memory"}
            entries.append(gone)
        try:
            self._look_blocking()
            heads, lines = chained(self._keys, self._head, entries)
            _write_all_blocking(self._descriptor, lines)
        except OSError as error:
            self._failed(f"cannot be written: {error.strerror or error}")
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            return
        self._size += len(lines)
        self._head = heads[-1]
        if self._failure:
            log.warning("the audit log %s is written again; nothing was lost", self._path)
        with self._changed:
            self._failure = ""
            self._lost -= lost
            for _ in batch:
                self._waiting.popleft()
        for (_, future), head in zip(batch, heads):
            future.set_result(str(head))

    def _look_blocking(self) -> None:
        """Is it still the file that was written, with what was written?  If not, go on with what is there."""
        try:
            named, opened = os.stat(self._path, follow_symlinks=False), os.fstat(self._descriptor)
            is_there = (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)
        except FileNotFoundError:
            is_there = False
        if not is_there:
            self._damaged(f"was removed or replaced; entries 1 to {self._head.number} are no longer in it")
            self._reopen_blocking()
        elif opened.st_size != self._size and self._failure:
            os.ftruncate(self._descriptor, self._size)  # the part of a line that a full disk took
        elif opened.st_size != self._size:
            self._damaged(f"has {opened.st_size} bytes instead of {self._size}: somebody else has changed it")
            self._end_line_blocking()

    def _reopen_blocking(self) -> None:
        try:
            descriptor = _open_blocking(self._path)
        except UserError as error:
            raise OSError(str(error)) from error
        os.close(self._descriptor)
        self._descriptor = descriptor
        self._end_line_blocking()

    def _end_line_blocking(self) -> None:
        """The next entry must not become the end of what a stranger has written or left."""
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            size += os.write(self._descriptor, b"\n")
        self._size = size

    def _failed(self, failure: str) -> None:
        if failure != self._failure:
            log.error("the audit log %s %s; the server goes on, and its entries wait in memory", self._path, failure)
        self._failure = failure

    def _damaged(self, damage: str) -> None:
        """Told once, however often it is found, and no more of it than somebody reads."""
        if damage in self._damage or damage == self._latest_damage:
            return
        self._latest_damage = damage
        log.error("the audit log %s %s", self._path, damage)
        if len(self._damage) < _LONGEST_DAMAGE:
            self._damage = "; ".join(filter(None, (self._damage, damage)))


# -------------------------------------------------------------------------------------- lines and files


def _write_all_blocking(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fdatasync(descriptor)


def _open_blocking(path: Path) -> int:
    try:
        descriptor = os.open(path, _LOG_FLAGS, 0o600)
    except OSError as error:
        raise UserError(f"the audit log {str(path)!r} cannot be opened: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UserError(f"the audit log {str(path)!r} is no regular file")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, UserError) as error:
        os.close(descriptor)
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the audit log {str(path)!r} is written by another process; give each server its own"
        ) from error
    return descriptor


def _keys_blocking(path: Path, size: int) -> Keys:
    """The keys of a log, made when it begins."""
    its_key = key_path(path)
    if not its_key.exists():
        if size:
            raise UserError(
                f"its key file {its_key} is missing, so that nobody could verify what it holds; bring the key back, "
                "or move the log away to begin another"
            )
        keys = {"mac": secrets.token_hex(KEY_BYTES), "salt": secrets.token_hex(KEY_BYTES)}
        with contextlib.suppress(FileExistsError):
            write_private_blocking(its_key, json.dumps(keys).encode() + b"\n", replaces=False)
    try:
        return parse_keys(read_private_blocking(its_key, 1024))
    except NotPrivate as error:
        raise UserError(f"its key file {its_key} {error}") from error


def _repaired_blocking(descriptor: int, keys: Keys) -> tuple[Head, list[str]]:
    """The newest entry, and what was wrong; a line that a crash has torn is taken out of the log."""
    size = os.fstat(descriptor).st_size
    if not size:
        return Head(0, genesis(keys)), []
    tail = os.pread(descriptor, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
    ended, _, torn = tail.rpartition(b"\n")
    head, found = _newest(ended.split(b"\n"), keys)
    if head is None:
        if ended or not torn.startswith(FIRST) or len(torn) != size:
            raise UserError("what it holds is no audit log; move it away, or give another path")
        head = Head(0, genesis(keys))
    if torn:
        os.ftruncate(descriptor, size - len(torn))
        found.append(f"ended in the middle of a line, of which {len(torn)} bytes were taken out")
    return head, found


def _newest(lines: list[bytes], keys: Keys) -> tuple[Head | None, list[str]]:
    """The last line that is an entry, and what is wrong with it and behind it."""
    for behind, line in enumerate(reversed(lines)):
        if (entry := parse_line(line)) is None:
            continue
        if entry.number > MOST_ENTRIES // 2 and not keys.fits(entry):
            continue  # no number to go on from
        found = [f"has {behind} lines at its end that are no entries"] if behind else []
        if not keys.fits(entry):
            found.append(f"has a newest entry ({entry.number}) that does not fit its HMAC: it, or the key, was changed")
        return Head(entry.number, entry.mac), found
    return None, []
