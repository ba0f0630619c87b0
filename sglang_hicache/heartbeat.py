"""One small shared page that says, without a message, whether the ranks move and what the server is about to do.

The launcher makes it and hands the descriptor to every child.  Who owns what: row R is written by rank R's scheduler
thread alone; the state word by the launcher alone; the launcher and the tokenizer read.  Every field is one aligned
64-bit word and stands for itself, so no lock is needed: a reader may see a tick count and a pending flag of different
ticks, and the watchdog asks for minutes without any change, not for one consistent row.
"""

from __future__ import annotations

import enum
import mmap
import os
from dataclasses import dataclass

#: Words per row: a cache line, so that ranks do not slow each other down by writing.
ROW_WORDS = 8
WORD_BYTES = 8


class ServerState(enum.IntEnum):
    """What the server as a whole is doing, for /ready and /health."""

    STARTING = 0
    READY = 1
    DRAINING = 2
    FAILING = 3


@dataclass(frozen=True, slots=True)
class Beat:
    """One rank's row."""

    #: Ticks finished since the start.
    ticks: int
    #: The rank has something to do that only a tick can do.
    pending: bool
    #: Monotonic clock of the last tick's end.
    at_us: int


class Heartbeat:
    """The shared page, mapped into this process."""

    def __init__(self, fd: int, ranks: int) -> None:
        self.fd = fd
        self.ranks = ranks
        self._map = mmap.mmap(fd, _size_bytes(ranks))
        self._words = memoryview(self._map).cast("Q")

    @classmethod
    def create(cls, ranks: int) -> Heartbeat:
        """Make the page; its descriptor is closed on exec unless it is passed on."""
        fd = os.memfd_create("heartbeat", os.MFD_CLOEXEC)
        os.ftruncate(fd, _size_bytes(ranks))
        return cls(fd, ranks)

    @property
    def state(self) -> ServerState:
        """What the server is doing, as the launcher last said."""
        return ServerState(self._words[0])

    @state.setter
    def state(self, state: ServerState) -> None:
        self._words[0] = state

    def tick(self, rank: int, pending: bool, now_us: int) -> None:
        """A tick has ended.  Called by the rank's scheduler."""
        start = (rank + 1) * ROW_WORDS
        self._words[start] += 1
        self._words[start + 1] = pending
        self._words[start + 2] = now_us

    def set_pending(self, rank: int, pending: bool) -> None:
        """Between ticks.  Before one begins it is True: if it never ends, the rank must not be taken for idle."""
        self._words[(rank + 1) * ROW_WORDS + 1] = pending

    def row(self, rank: int) -> Beat:
        """What one rank said last."""
        ticks, pending, at_us = self._words[(rank + 1) * ROW_WORDS : (rank + 1) * ROW_WORDS + 3]
        return Beat(ticks=ticks, pending=bool(pending), at_us=at_us)

    def close(self) -> None:
        """Unmap the page and close the descriptor."""
        self._words.release()
        self._map.close()
        os.close(self.fd)


def _size_bytes(ranks: int) -> int:
    return (ranks + 1) * ROW_WORDS * WORD_BYTES


class Watchdog:
    """Finds a rank that has work and makes no tick.  Pure: the caller reads the rows and the clock."""

    def __init__(self, ranks: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._ticks = [-1] * ranks
        self._since_s: list[float] = [0.0] * ranks

    def stuck(self, rows: list[Beat], now_s: float) -> list[int]:
        """Ranks that have been pending without a tick for longer than the timeout."""
        stuck = []
        for rank, row in enumerate(rows):
            if not row.pending or row.ticks != self._ticks[rank]:
                self._ticks[rank] = row.ticks
                self._since_s[rank] = now_s
            elif now_s - self._since_s[rank] >= self._timeout_s:
                stuck.append(rank)
        return stuck
