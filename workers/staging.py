"""The weights that a rank is about to compute with: read on a thread of their own, while the rank goes on serving.

Every worker has one `StagedWeights` as its `next_weights` (`batch.py`), made with two functions of the worker's: one
that reads, called on the thread, and one that takes what was read, called on the scheduler's.  The thread touches
nothing that serves.  It cannot be killed, so it asks between two pieces of its work whether anybody still wants the
result.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from sglang_hicache.errors import HiCacheError, IntegrityError

T = TypeVar("T")

#: Reads the weights of a directory, given their digest; calls the last argument between two pieces of its work.
Read = Callable[[str, str, Callable[[], None]], T]


class NotWanted(HiCacheError):
    """Raised inside the reader: the result has been dropped."""


class _Reading(Generic[T]):
    """One set of weights that is being read."""

    def __init__(self, read: Read[T], model_path: str, weights_digest: str) -> None:
        self._is_dropped = threading.Event()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self.result = self.thread.submit(read, model_path, weights_digest, self._check)
        self.thread.shutdown(wait=False)

    def _check(self) -> None:
        if self._is_dropped.is_set():
            raise NotWanted("nobody waits for these weights any more")

    def drop(self) -> None:
        """The thread ends after the piece that it is at."""
        self._is_dropped.set()


class StagedWeights(Generic[T]):
    """Nothing, weights that are being read, or weights that are ready."""

    def __init__(self, read: Read[T], take: Callable[[T], None]) -> None:
        self._read = read
        self._take = take
        self._reading: _Reading[T] | None = None

    def __repr__(self) -> str:
        state = "nothing" if self._reading is None else {None: "reading", "": "ready"}.get(self.outcome(), "failed")
        return f"<StagedWeights {state}>"

    def stage(self, model_path: str, weights_digest: str) -> None:
        """Begin to read this rank's share of other weights, beside those in use."""
        self.drop()
        self._reading = _Reading(self._read, model_path, weights_digest)

    def outcome(self) -> str | None:
        """None while they are being read, "" when they are ready, else why they cannot be taken."""
        if self._reading is None or not self._reading.result.done():
            return None
        error = self._reading.result.exception()
        if error is None:
            return ""
        return str(error) if isinstance(error, HiCacheError) else f"{type(error).__name__}: {error}"

    def commit_blocking(self) -> None:
        """Compute with them from the next forward on."""
        if self._reading is None or self.outcome() != "":
            raise IntegrityError(f"weights are taken that are not ready: {self!r}")
        reading, self._reading = self._reading, None
        self._take(reading.result.result())

    def drop(self) -> None:
        """Forget them.  Harmless when there are none."""
        if self._reading is not None:
            self._reading.drop()
        self._reading = None

    def close_blocking(self) -> None:
        """Forget them, and wait for the thread."""
        if self._reading is not None:
            self._reading.drop()
            self._reading.thread.shutdown(wait=True)
        self._reading = None
