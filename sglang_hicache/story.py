"""The story of one object, attached to the error that ends it: how it came to that.

Belongs to the object, and thread, that made it.  Apart from the log because code that decides keeps one too, and
the log reads a clock.  Pure.
"""

from __future__ import annotations

from collections import deque
from typing import Any, TypeVar

_Error = TypeVar("_Error", bound=BaseException)


class Story:
    """The last events of one object, told in the note of an error: how it came to that.

    Bounded, and numbered rather than timed, so that pure code may keep one.
    """

    def __init__(self, subject: str, limit: int = 64) -> None:
        self._subject = subject
        self._events: deque[str] = deque(maxlen=limit)
        self._count = 0

    def note(self, event: str, **fields: Any) -> None:
        """Add an event."""
        self._count += 1
        tail = "".join(f" {name}={value!r}" for name, value in fields.items())
        self._events.append(f"#{self._count} {event}{tail}")

    def attach_to(self, error: _Error) -> _Error:
        """Tell the story in the error's traceback; returns the error, to be raised."""
        error.add_note(str(self))
        return error

    def __str__(self) -> str:
        skipped = self._count - len(self._events)
        head = f"story of {self._subject}" + (f" ({skipped} earlier events forgotten)" if skipped else "")
        return "\n  ".join([head, *self._events])
