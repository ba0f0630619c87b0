"""Looks at a server's status all the time, from a thread of its own, and remembers what it saw."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sglang_hicache.ctl.client import Client
from sglang_hicache.ctl.exits import Refused, Unreachable

_INTERVAL_S = 0.1

#: Ranks are asked one after the other while they go on, so two of them may be a tick apart; not for this long.
_TICKS_APART_S = 5.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What the ranks said at one moment."""

    #: Seconds since the load began, when the question was sent.
    at_s: float
    #: State and epoch of each rank; of a rank that did not answer in time "unknown" and None.
    ranks: tuple[tuple[str, int | None], ...]
    backend: str
    #: State of the breaker, "" where rank 0 did not answer in time.
    breaker: str
    #: Times that it had opened; None: as above.
    trips: int | None
    #: The whole answer, of the latest sample only.
    status: Mapping[str, Any]

    @property
    def state(self) -> str:
        """In one word: of the first rank that speaks."""
        return next((state for state, epoch in self.ranks if epoch is not None), "unknown")

    @property
    def differs(self) -> bool:
        """Do ranks say different things of themselves?"""
        return len({rank for rank in self.ranks if rank[1] is not None}) > 1


class Watch:
    """One watcher of one server."""

    def __init__(self, client: Callable[[], Client], now_s: Callable[[], float]) -> None:
        self._client = client
        self._now_s = now_s
        self._news = threading.Condition()
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch_blocking, name="watch", daemon=True)
        self._latest: Sample | None = None
        self._differs_since_s: float | None = None
        self.samples: list[Sample] = []
        #: Ranks that did not agree, for longer than they may be apart; "": there were none.
        self.disagreement = ""
        #: It has looked until it was stopped.
        self.is_whole = False

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop_blocking(self) -> None:
        """No more looks, once it is clear whether ranks that differ now are only a tick apart."""
        with self._news:
            self._news.wait_for(lambda: self._differs_since_s is None or self.disagreement, 2 * _TICKS_APART_S)
        self._is_stopped.set()
        self._thread.join()

    def newer_than(self, at_s: float, timeout_s: float) -> Sample | None:
        """A sample whose question was sent after that; None: there was none in time."""
        with self._news:
            self._news.wait_for(lambda: self._latest is not None and self._latest.at_s > at_s, timeout_s)
            return self._latest if self._latest is not None and self._latest.at_s > at_s else None

    def _watch_blocking(self) -> None:
        while not self._is_stopped.is_set():
            begin = time.monotonic()
            at_s = self._now_s()
            try:
                self._take(sample_of(self._client().ask("/hicache/storage-backend"), at_s))
            except (Unreachable, Refused):
                self._differs_since_s = None  # it is being started again, or it is lost: the load will say so
            self._is_stopped.wait(max(0.0, _INTERVAL_S - (time.monotonic() - begin)))
        self.is_whole = True

    def _take(self, sample: Sample) -> None:
        with self._news:
            if not sample.differs:
                self._differs_since_s = None
            elif self._differs_since_s is None:
                self._differs_since_s = sample.at_s
            elif sample.at_s - self._differs_since_s > _TICKS_APART_S:
                self.disagreement = f"at {sample.at_s:.1f} s: {sample.ranks}"
            self._latest = sample
            self.samples.append(replace(sample, status={}))  # a long drill has tens of thousands of them
            self._news.notify_all()


def sample_of(status: Mapping[str, Any], at_s: float) -> Sample:
    """A status, reduced to what a drill looks at."""
    breaker = status.get("breaker") or {}
    return Sample(
        at_s=at_s,
        ranks=tuple((rank["state"], rank["epoch"]) for rank in status["ranks"]),
        backend=status["hicache_storage_backend"] or "",
        breaker=breaker.get("state", ""),
        trips=breaker.get("trips"),
        status=status,
    )
