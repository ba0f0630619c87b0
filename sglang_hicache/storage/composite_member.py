"""One store inside a composite: every call goes through here, and comes back as a value.

What a store raises as `StorageError`, or answers against the contract, is its failure and nobody else's.  After some
failures in a row it is left alone for a while, then tried again by the next call that could use it; the wait doubles
until a call succeeds.  What is no error of ours leaves this place as it came: a defect must be seen.

Called by both lanes and the helper of the composite.  A store that hangs holds the lane that called it: its client has
timeouts, and nothing here could end a call of somebody's library.
"""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from sglang_hicache.errors import StorageError
from sglang_hicache.observe import SharedCounters
from sglang_hicache.storage.backend import PageOutcome, PageResult, StorageBackend
from sglang_hicache.storage.composite_settings import CompositeSettings
from sglang_hicache.storage.page_format import IncomingPage, OutgoingPage, PageName

_logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: Failures in a row after which a store is left alone.  One may happen to any store; who waits three times for a
#: timeout has learnt enough.
FAILURES_IN_A_ROW = 3

#: How often a page is written to one store.  Its batch ends at a page that fails, so that without a second try one
#: failure would cost the store all pages behind it, which nobody would miss until the others are gone.
_WRITE_TRIES = 2

#: What may be said of a page.
_READ = (PageResult.HIT, PageResult.MISS, PageResult.WRONG_SIZE)
_WRITTEN = (PageResult.WRITTEN, PageResult.PRESENT)

#: A store without room is well: what it has can be read.
_NO_FAILURES = ("no_space",)
#: Will not get better by itself within three calls.
_FINAL = ("refused",)


def _named(who: str, error: StorageError) -> StorageError:
    """The same error, with the store in front; what is behind it stays known to `diagnosis.py`."""
    named = StorageError(f"{who}: {error}", error.reason, error.code)
    named.__cause__ = error
    return named


class Health:
    """Whether a store is asked now.  Both lanes."""

    def __init__(self, label: str, settings: CompositeSettings, clock: Callable[[], float]) -> None:
        self._label = label
        self._initial_s = settings.retry_initial_s
        self._max_s = settings.retry_max_s
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        #: How long it is left alone next time; 0: it is well.
        self._wait_s = 0.0
        self._until_s = 0.0
        #: Why it was left alone last.
        self._error: StorageError | None = None

    def is_well(self) -> bool:
        """It answers, as far as is known."""
        return self._wait_s == 0

    def is_asked(self) -> bool:
        """It is well, or it is time to try it again."""
        return self._wait_s == 0 or self._clock() >= self._until_s

    def rest_error(self) -> StorageError:
        """What a call would have said that was not made."""
        with self._lock:
            error, left_s = self._error, max(0.0, self._until_s - self._clock())
        if error is None:
            return StorageError(f"{self._label} was not asked")
        return _named(f"{self._label} is left alone for {left_s:.1f} s", error)

    def failed(self, error: StorageError, patience: int = FAILURES_IN_A_ROW) -> None:
        """A call has failed; `patience`: it is left alone from so many in a row on, 1 if it did not open."""
        if error.reason in _NO_FAILURES and patience > 1:
            return
        with self._lock:
            self._failures += 1
            if self._wait_s == 0 and self._failures < patience and error.reason not in _FINAL:
                return
            if self._wait_s and self._clock() < self._until_s:
                return  # a call that began before it was left alone
            self._wait_s = min(self._wait_s * 2, self._max_s) if self._wait_s else self._initial_s
            self._until_s = self._clock() + self._wait_s
            self._error = error
        _logger.warning("%s is left alone for %.3g s: %s", self._label, self._wait_s, error)

    def succeeded(self) -> None:
        """A call was answered."""
        if self._failures == 0:
            return
        with self._lock:
            was_away, self._failures, self._wait_s = self._wait_s > 0, 0, 0.0
        if was_away:
            _logger.warning("%s answers again", self._label)


class State(enum.Enum):
    """How far a store inside has come."""

    #: Made, and not opened yet.
    NEW = "new"
    OPEN = "open"
    #: It did not open, and was closed.
    AWAY = "away"
    #: The helper tries again.
    OPENING = "opening"
    ENDED = "ended"


class Member:
    """A store inside, and what is known of it."""

    def __init__(
        self,
        index: int,
        settings: CompositeSettings,
        backend: StorageBackend,
        counters: SharedCounters,
        clock: Callable[[], float],
    ) -> None:
        self.index = index
        #: Name of its backend.
        self.kind = settings.inside()[index].backend
        self.label = f"{settings.label(index)} ({self.kind})"
        self.health = Health(self.label, settings, clock)
        #: Held by every call of the backup lane's kind: the helper writes, too, and a backend is promised that two
        #: writes never meet.
        self.writing = threading.Lock()
        #: Of all stores inside, and of this one.
        self._counters = counters
        self.tally = SharedCounters()
        #: The durability and so on of a store are known before it is open.
        self.capabilities = backend.capabilities
        self._backend = backend
        self.state = State.NEW
        self._claiming = threading.Lock()

    def __repr__(self) -> str:
        return f"<Member {self.label} {self.state.value} well={self.health.is_well()}>"

    def is_asked(self) -> bool:
        """Calls go there now."""
        return self.state is State.OPEN and self.health.is_asked()

    def is_well(self) -> bool:
        """It is open and answers, as far as is known."""
        return self.state is State.OPEN and self.health.is_well()

    def rest_error(self) -> StorageError:
        """What a call would have said that is not made."""
        return self.health.rest_error()

    def claim_opening(self) -> bool:
        """It did not open, it is time to try once more, and nobody else does: the caller has it reopened."""
        if self.state is not State.AWAY or not self.health.is_asked():
            return False
        with self._claiming:
            is_mine = self.state is State.AWAY
            if is_mine:
                self.state = State.OPENING
            return is_mine

    def open_blocking(self) -> StorageError | None:
        """None: it is open.  A store that does not open is closed at once, as any owner of a backend has to."""
        try:
            self._backend.open_blocking()
        except StorageError as error:
            with suppress(StorageError):
                self._backend.close_blocking()
            return self._went_away(error)
        self.state = State.OPEN
        self.health.succeeded()
        return None

    def reopen_blocking(self, make: Callable[[], StorageBackend], namespace: Callable[[], str]) -> None:
        """Try once more, with a backend that has never been closed; `namespace`: "" or what new weights have brought
        since the first one was made.  Helper."""
        fresh: StorageBackend | None = None
        told = ""
        try:
            fresh = self._backend = make()
            if self.open_blocking() is None:
                # Open first: from then on the main thread tells of the next weights itself, perhaps while we tell of
                # those before.  The last word must be the latest.
                while told != namespace():
                    told = namespace()
                    self._backend.use_namespace(told)
        except StorageError as error:
            self._went_away(error)
        finally:
            if self.state is State.OPENING:  # a defect: the log tells of it, and the next try is not at once
                with suppress(StorageError):
                    if fresh is not None:
                        fresh.close_blocking()
                self._went_away(StorageError("it could not be opened"))

    def _went_away(self, error: StorageError) -> StorageError:
        noted = self._note(error, patience=1)
        self.state = State.AWAY
        return noted

    def close_blocking(self) -> None:
        """Give the store back, whatever became of it."""
        state, self.state = self.state, State.ENDED
        if state in (State.NEW, State.OPEN):
            self._backend.close_blocking()

    def exists_blocking(self, names: Sequence[PageName]) -> int | StorageError:
        """How many are there, from the first one."""
        return self._count("exists", lambda backend: backend.exists_blocking(names), len(names))

    def read_blocking(self, pages: Sequence[IncomingPage]) -> list[PageOutcome]:
        """At least one outcome; whatever went wrong stands at the page where it ended.  A read that asks many times
        asks no store again that is left alone by then: each call may cost it a time-out."""
        if not self.is_asked():
            return [self.rest_error()]
        return self._outcomes("read", lambda backend: backend.read_blocking(pages), len(pages), _READ)

    def write_blocking(self, pages: Sequence[OutgoingPage]) -> list[PageOutcome]:
        """Outcomes up to the first page that could not be stored, and with it.  The caller holds `writing`."""
        outcomes: list[PageOutcome] = []
        tries = 0
        while len(outcomes) < len(pages):
            rest = pages[len(outcomes) :]
            answered = self._outcomes(
                "write", lambda backend, rest=rest: backend.write_blocking(rest), len(rest), _WRITTEN
            )
            failed = next((outcome for outcome in answered if isinstance(outcome, StorageError)), None)
            stored = len(answered) if failed is None else answered.index(failed)
            outcomes += answered[:stored]
            tries = 1 if stored else tries + 1
            if failed is not None and (tries >= _WRITE_TRIES or failed.reason != "io"):
                return [*outcomes, failed]
        return outcomes

    def delete_blocking(self, names: Sequence[PageName]) -> int | StorageError:
        """How many were there.  The caller holds `writing`."""
        return self._count("delete", lambda backend: backend.delete_blocking(names), len(names))

    def set_aside_blocking(self, name: PageName) -> bool | StorageError:
        """True: it was there, and is out of the way."""
        answer = self._call(lambda backend: backend.set_aside_blocking(name))
        if isinstance(answer, StorageError):
            return answer
        if not isinstance(answer, bool):
            return self._broken("set_aside", answer)
        self.health.succeeded()
        self.tally.add("set_aside_pages", answer)
        return answer

    def clear_blocking(self, namespace: str) -> int | StorageError:
        """How many were there.  The caller holds `writing`."""
        return self._count("clear", lambda backend: backend.clear_blocking(namespace), None)

    def touch_blocking(self, names: Sequence[PageName]) -> StorageError | None:
        """These pages were used."""
        answer = self._call(lambda backend: backend.touch_blocking(names))
        if isinstance(answer, StorageError):
            return answer
        self.health.succeeded()
        return None

    def use_namespace(self, namespace: str) -> None:
        """New weights.  Main thread."""
        if self.state is State.OPEN:
            self._backend.use_namespace(namespace)

    def info(self) -> dict[str, str]:
        """What status pages show of the store; nothing of one that is not open."""
        return self._backend.info() if self.state is State.OPEN else {}

    def stats(self) -> dict[str, int]:
        """The store's own counters."""
        return self._backend.stats() if self.state is State.OPEN else {}

    def _call(self, call: Callable[[StorageBackend], _T]) -> _T | StorageError:
        """One call.  Whether it was a good answer, the caller knows."""
        if self.state is not State.OPEN:
            return self.rest_error()
        try:
            return call(self._backend)
        except StorageError as error:
            return self._note(error)

    def _outcomes(
        self,
        name: str,
        call: Callable[[StorageBackend], list[PageOutcome]],
        count: int,
        allowed: tuple[PageResult, ...],
    ) -> list[PageOutcome]:
        answer = self._call(call)
        if isinstance(answer, StorageError):
            return [answer]
        is_list = isinstance(answer, list) and 0 < len(answer) <= count
        if not is_list or not all(outcome in allowed or isinstance(outcome, StorageError) for outcome in answer):
            return [self._broken(name, answer)]
        if len(answer) < count and answer[-1] in (PageResult.HIT, PageResult.WRITTEN, PageResult.PRESENT):
            return [*answer, self._broken(name, f"{len(answer)} of {count} pages")]
        if not any(isinstance(outcome, StorageError) for outcome in answer):
            self.health.succeeded()
            return answer
        # Most stores stop at the first failure; one that goes on has failed once for each.
        return [self._note(outcome) if isinstance(outcome, StorageError) else outcome for outcome in answer]

    def _count(self, name: str, call: Callable[[StorageBackend], int], most: int | None) -> int | StorageError:
        answer = self._call(call)
        if isinstance(answer, StorageError):
            return answer
        is_number = isinstance(answer, int) and not isinstance(answer, bool)
        if not is_number or answer < 0 or (most is not None and answer > most):
            return self._broken(name, answer)
        self.health.succeeded()
        return answer

    def _broken(self, name: str, answer: object) -> StorageError:
        return self._note(StorageError(f"{name} answered {repr(answer)[:80]}", "contract"))

    def _note(self, error: StorageError, patience: int = FAILURES_IN_A_ROW) -> StorageError:
        self._counters.add("failed_calls")
        self.tally.add("failed_calls")
        self.health.failed(error, patience)
        return _named(self.label, error)
