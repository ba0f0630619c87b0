"""How far an upload is, for somebody who watches: one line that changes on a terminal, a few lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

#: Seconds between two reports, on a terminal and in a file.
_OFTEN_S, _SELDOM_S = 0.2, 10.0


class Progress:
    """Counts bytes and says so, at most so often.  One thread."""

    def __init__(self, total_bytes: int, output: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_bytes = total_bytes
        self._output = output
        self._clock = clock
        self._is_terminal = output.isatty()
        self._started_s = clock()
        self._told_s = self._started_s
        self._written_bytes = self._skipped_bytes = 0

    def tell(self, written_bytes: int, skipped_bytes: int) -> None:
        """So much more was written, and so much more was there already."""
        self._written_bytes += written_bytes
        self._skipped_bytes += skipped_bytes
        now_s = self._clock()
        if now_s - self._told_s >= (_OFTEN_S if self._is_terminal else _SELDOM_S):
            self._told_s = now_s
            self._show(self.line())

    def line(self) -> str:
        """`1.2 of 4.0 GB (30 %), 210.0 MB/s, 0:13 left`."""
        done_bytes = self._written_bytes + self._skipped_bytes
        elapsed_s = max(self._clock() - self._started_s, 1e-3)
        rate = self._written_bytes / elapsed_s
        share = 100 * done_bytes // self._total_bytes if self._total_bytes else 100
        text = f"{size(done_bytes)} of {size(self._total_bytes)} ({share} %), {rate / 1e6:.1f} MB/s"
        if self._skipped_bytes:
            text += f", {size(self._skipped_bytes)} were there"
        if rate and done_bytes < self._total_bytes:
            text += f", {duration((self._total_bytes - done_bytes) / rate)} left"
        return text

    def end(self) -> None:
        """The last report stays where it is."""
        if self._is_terminal:
            self._show(self.line())
            self._output.write("\n")
            self._output.flush()

    def _show(self, text: str) -> None:
        self._output.write(f"\r\x1b[K{text}" if self._is_terminal else f"{text}\n")
        self._output.flush()


def size(size_bytes: int) -> str:
    """In the unit that people take for files."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes} B"


def duration(seconds: float) -> str:
    """Minutes and seconds, and hours where there are any."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
