"""What the lying plug-ins say at the moment.  Imports nothing of a plug-in, so that a test can."""

from __future__ import annotations

import ctypes
import threading


class Now:
    """The lie, and the threads that a plug-in has left running."""

    def __init__(self) -> None:
        self.lie = ""
        self._go = threading.Event()
        self._late: list[threading.Thread] = []

    def write_late(self) -> None:
        """Everything that was to come late comes, and has come."""
        self._go.set()
        for thread in self._late:
            thread.join()
        self._late.clear()
        self._go.clear()

    def begin(self, pointer: int, size: int) -> None:
        """Somebody will write there, later."""

        def write() -> None:
            self._go.wait(30)
            ctypes.memset(pointer, 0x5A, size)

        self._late.append(threading.Thread(target=write))
        self._late[-1].start()


NOW = Now()


def late(pointer: int, size: int) -> None:
    """For plug-ins."""
    NOW.begin(pointer, size)
