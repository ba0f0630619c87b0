"""The control file of a `FaultyBackend`: what goes wrong now, said from outside while the backend works.

    {"faults": {"read": {"kind": "hang"}}}

Whoever runs a drill writes it, and every storage process whose extra config names it reads it: those of all ranks, and
those that are started later, so that a fault outlives the process that it has killed.  The file is looked at before
each call, which costs one `stat`; it is read when that shows another file, and counting starts anew.  A file that
cannot be used changes nothing: a typing mistake must not end a storage process.

Threads: any; the lanes of a storage process share one `FaultControl`.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path

import msgspec

from sglang_hicache.private_file import write_private_blocking
from sglang_hicache.storage.faulty_settings import Fault, Faults

log = logging.getLogger(__name__)

#: More than faults of every call would take.
_MOST_BYTES = 1 << 20


class FaultControl:
    """One reader of a control file."""

    def __init__(self, path: str) -> None:
        self.path = path
        #: What told the last file that was read from any other one.
        self._seen: tuple[int, int, int] | None = None
        self._lock = threading.Lock()

    def changed(self) -> Mapping[str, Fault] | None:
        """The faults of the file, if it is another one than before and says what can be done; None: go on as before."""
        with self._lock:
            try:
                found = os.stat(self.path)
                seen = (found.st_mtime_ns, found.st_size, found.st_ino)
                if seen == self._seen:
                    return None
                self._seen = seen
                return read_faults(self.path)
            except FileNotFoundError:
                return None
            except (OSError, msgspec.DecodeError) as error:
                log.warning("the control file %s says nothing new: %s", self.path, error)
                return None


def read_faults(path: str | Path) -> Mapping[str, Fault]:
    """What a control file says.  OSError; msgspec.DecodeError: it is none."""
    # Without O_NONBLOCK a named pipe in its place would hold every lane, and no fault says so.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        content = os.read(descriptor, _MOST_BYTES)
    finally:
        os.close(descriptor)
    try:
        return msgspec.json.decode(content, type=Faults).faults
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(str(error)) from error


def write_faults(path: Path, faults: Mapping[str, Fault]) -> None:
    """Make the file say this, whole at every moment and for this user alone."""
    write_private_blocking(path, msgspec.json.encode(Faults(faults=dict(faults))))
