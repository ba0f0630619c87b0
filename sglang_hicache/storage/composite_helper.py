"""The thread of a composite: copies pages between the stores inside, and opens those that did not open.

Nobody waits for it.  What it writes are copies in memory of its own, because host memory is not ours once the call that
read it has returned; it holds a bounded number of bytes, and what does not fit is dropped: the page is copied when it
is read the next time.  The thread starts with the first job and ends with the composite.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator

from sglang_hicache.storage.page_format import HEADER_BYTES, IncomingPage

_logger = logging.getLogger(__name__)

#: Bytes of pages that wait.  Enough for two batches of a lane, and no burden beside a host pool.
QUEUE_BYTES = 64 << 20


class StoredPage:
    """A copy of a page as it is stored: what a backend uses of an `OutgoingPage`."""

    __slots__ = ("_header", "depth", "name", "parent", "payload", "size_bytes")

    def __init__(self, page: IncomingPage) -> None:
        self.name = page.name
        #: As the header says, which has been judged.
        self.parent = page.parent
        self.depth = page.depth
        self._header = bytes(page.header)
        #: Of memory that can be written, as the host pool can: some libraries take no other.
        self.payload = memoryview(bytearray(page.payload))
        self.size_bytes = HEADER_BYTES + len(self.payload)

    def header(self) -> bytes:
        """As it is stored elsewhere."""
        return self._header

    def chunks(self) -> Iterator[tuple[int, memoryview]]:
        """The payload; it has its checksum already."""
        yield 0, self.payload

    def restart(self) -> None:
        """Nothing is hashed, and so nothing is hashed anew."""


class Helper:
    """A bounded line of jobs, and the thread that does them."""

    def __init__(self, name: str, queue_bytes: int = QUEUE_BYTES) -> None:
        self._name = name
        self._queue_bytes = queue_bytes
        self._changed = threading.Condition()
        self._jobs: deque[tuple[int, Callable[[], None]]] = deque()
        #: Of all jobs that are not done, the running one included.
        self._bytes = 0
        self._running = 0
        self._is_ending = False
        self._thread: threading.Thread | None = None

    def has_room(self, size_bytes: int) -> bool:
        """Would a job of this size be taken?  One that is larger than the whole line is, if nothing waits, and one that
        holds no memory always."""
        return not size_bytes or self._bytes == 0 or self._bytes + size_bytes <= self._queue_bytes

    def offer(self, size_bytes: int, job: Callable[[], None]) -> bool:
        """Put a job in line; False: there is no room.  `size_bytes`: of the memory that it holds.  Any thread."""
        with self._changed:
            if self._is_ending or not self.has_room(size_bytes):
                return False
            self._jobs.append((size_bytes, job))
            self._bytes += size_bytes
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()
            return True

    def wait_idle_blocking(self, timeout_s: float) -> bool:
        """Return when every job is done; False: they are not, and the time is over."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._running, timeout_s)

    def close_blocking(self) -> None:
        """Forget what waits, and wait for the job that runs."""
        with self._changed:
            self._is_ending = True
            self._jobs.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._is_ending)
                if self._is_ending:
                    return
                size_bytes, job = self._jobs.popleft()
                self._running += 1
            try:
                job()
            except Exception:
                # As in a lane: were it to end the thread, the jobs behind this one would wait for somebody to come by.
                _logger.exception("%s: a job failed", self._name)
            del job  # and with it the page, which nobody counts any more
            with self._changed:
                self._running -= 1
                self._bytes -= size_bytes
                self._changed.notify_all()
