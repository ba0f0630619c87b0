"""One call for each of many things, several at a time, in an order that can be stopped.

Used by backends whose requests wait for a server most of the time.  The thread that asks works too, so that a single
request needs no other one, and it does not return before every call that has begun is over: host memory is given to
others then.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

_Thing = TypeVar("_Thing")
_Answer = TypeVar("_Answer")


class SideBySide:
    """Threads of one lane."""

    def __init__(self, name: str, most: int) -> None:
        self._most = most
        self._helpers = ThreadPoolExecutor(most, name)

    def close_blocking(self) -> None:
        """No thread stays."""
        self._helpers.shutdown()

    def run_blocking(
        self, call: Callable[[_Thing], _Answer], things: Sequence[_Thing], goes_on: Callable[[_Answer], bool]
    ) -> list[_Answer]:
        """The answers in order, up to the first one behind which it does not go on.  Calls behind that one may have
        been made; their answers are nobody's."""
        run = _Run(call, things, goes_on)
        futures: list[Future[None]] = []
        try:
            # A machine that starts no thread more: those that are there do it all.  Left by this error, they would go
            # on filling host memory that is somebody else's by then.
            with contextlib.suppress(RuntimeError):
                for _ in range(min(self._most, len(things)) - 1):
                    futures.append(self._helpers.submit(run.work_blocking))
            run.work_blocking()
        finally:
            for future in futures:
                future.exception()
        for future in futures:
            future.result()
        return run.answers()


class _Run(Generic[_Thing, _Answer]):
    """One list of things.  Numbers are taken in order, so that all before the one that ends it have been taken by then,
    and are done when every thread is."""

    def __init__(
        self, call: Callable[[_Thing], _Answer], things: Sequence[_Thing], goes_on: Callable[[_Answer], bool]
    ) -> None:
        self._call = call
        self._things = things
        self._goes_on = goes_on
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._answers: dict[int, _Answer] = {}
        self._end = len(things)

    def work_blocking(self) -> None:
        """Take the next thing until there is none; any thread."""
        number = self._next()
        while number < self._end:
            self._answer_blocking(number)
            number = self._next()

    def answers(self) -> list[_Answer]:
        """When all threads are done."""
        return [self._answers[number] for number in range(self._end)]

    def _answer_blocking(self, number: int) -> None:
        is_last = True
        try:
            self._answers[number] = self._call(self._things[number])
            is_last = not self._goes_on(self._answers[number])
        finally:
            # Also after a defect: or the other threads would go through all the rest before anybody hears of it.
            if is_last:
                with self._lock:
                    self._end = min(self._end, number + 1)

    def _next(self) -> int:
        with self._lock:
            return next(self._numbers)
