"""The line of requests that are not admitted yet.

Order: retracted requests first (they were ahead of everybody once), then by policy: arrival, or priority and
arrival.  Replicated; pure.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from sglang_hicache.scheduler.request import Request


class WaitingQueue:
    """Requests in the order in which they would like to be admitted."""

    def __init__(self, policy: str) -> None:
        self._by_priority = policy == "priority"
        self._line: list[Request] = []

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Request]:
        """Over a copy: admission removes while it walks."""
        return iter(list(self._line))

    def add(self, request: Request) -> None:
        insort(self._line, request, key=self._rank)

    def remove(self, request: Request) -> None:
        self._line.remove(request)

    def _rank(self, request: Request) -> tuple[int, int, int]:
        return (
            0 if request.num_retractions else 1,
            -request.priority if self._by_priority else 0,
            request.arrival,
        )
