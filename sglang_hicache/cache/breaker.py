"""Is storage to be trusted?  The breaker's states, and for how long a store that failed is left alone.

                      trip                      try                       commit
    OFF ─watch─▶ CLOSED ──────────▶ OPEN ◀──────────────────▶ HALF_OPEN ──────────▶ CLOSED
                                          canary or attach failed

CLOSED lets traffic through; OPEN and HALF_OPEN are out of the path, and differ in that somebody is trying.  Nothing
but a canary leads from OPEN back to CLOSED, other than a command.  `scheduler/failover.py` tells the breaker what has
happened, and decides what is done about it; what counts as sick is in `evidence.py`.  Replicated: its only clock is
the plan's.
"""

from __future__ import annotations

from enum import StrEnum

from sglang_hicache.errors import IntegrityError
from sglang_hicache.storage.fault_tolerance import FaultTolerance

#: A wait that has been doubled so often is longer than any limit.
_MOST_DOUBLINGS = 40


class Trust(StrEnum):
    """States of the breaker; the values are `wire.BreakerState`."""

    #: Nothing is watched: nothing is attached, or fault tolerance is off.
    OFF = "off"
    CLOSED = "closed"
    #: Storage is out of the path, and is left alone.
    OPEN = "open"
    #: Storage is out of the path, and a store is being tried.
    HALF_OPEN = "half_open"


class Turn(StrEnum):
    """What happens to the breaker."""

    #: A command has attached a store that is to be watched.
    WATCH = "watch"
    #: A store that serves is sick, or lost; one that should have served at the start does not come up.
    TRIP = "trip"
    #: A canary begins, or what it was for is attached already.
    TRY = "try"
    #: The canary was bad, or the attach after it failed.
    REFUSE = "refuse"
    #: The store that was tried is attached.
    COMMIT = "commit"
    #: A command has taken the storage out, or what is attached is not to be watched.
    STOP = "stop"


class Never(str):
    """A cell that cannot come, and why."""


def _row(turn: Turn, reason: str, cells: dict[Trust, Trust]) -> dict[tuple[Trust, Turn], Trust | Never]:
    return {(state, turn): cells.get(state, Never(reason)) for state in Trust}


#: The whole breaker: state x what happens.
TABLE: dict[tuple[Trust, Turn], Trust | Never] = {
    **_row(Turn.WATCH, "a command may attach at any time", dict.fromkeys(Trust, Trust.CLOSED)),
    **_row(Turn.TRIP, "storage is out of the path already", {Trust.OFF: Trust.OPEN, Trust.CLOSED: Trust.OPEN}),
    **_row(Turn.TRY, "only a store that is out is tried, and one at a time", {Trust.OPEN: Trust.HALF_OPEN}),
    **_row(Turn.REFUSE, "nothing is being tried", {Trust.HALF_OPEN: Trust.OPEN}),
    **_row(Turn.COMMIT, "nothing comes back without a canary", {Trust.HALF_OPEN: Trust.CLOSED}),
    **_row(Turn.STOP, "a command may detach at any time", dict.fromkeys(Trust, Trust.OFF)),
}


class Breaker:
    """One for all stores of a server."""

    def __init__(self) -> None:
        self.state = Trust.OFF
        #: Why it opened last; "" before the first time.
        self.reason = ""
        self.trips = 0
        #: Leader's clock when the present state began; None before the first plan.
        self.since_us: int | None = None
        self._tripped_us = 0
        self._total_us = dict.fromkeys(Trust, 0)

    def __repr__(self) -> str:
        return f"<Breaker {self.state} trips={self.trips} {self.reason!r}>"

    def begin(self, now_us: int) -> None:
        """Every plan: the first one starts the clock."""
        if self.since_us is None:
            self.since_us = now_us

    def take(self, turn: Turn, now_us: int, reason: str = "") -> None:
        """Something has happened."""
        after = TABLE[self.state, turn]
        if isinstance(after, Never):
            raise IntegrityError(f"breaker: {turn} met {self.state}: {after}; {self!r}")
        if turn is Turn.TRIP:
            self.trips, self.reason, self._tripped_us = self.trips + 1, reason, now_us
        if after is not self.state:
            self._total_us[self.state] += now_us - (now_us if self.since_us is None else self.since_us)
            self.state, self.since_us = after, now_us

    def in_state_us(self, now_us: int) -> int:
        """How long it has been in this state."""
        return max(0, now_us - (now_us if self.since_us is None else self.since_us))

    def out_us(self, now_us: int) -> int:
        """How long storage has been out of the path; 0: it is not."""
        return max(0, now_us - self._tripped_us) if self.state in (Trust.OPEN, Trust.HALF_OPEN) else 0

    def total_us(self, now_us: int) -> dict[Trust, int]:
        """Time in each state since the first plan, this one included."""
        return self._total_us | {self.state: self._total_us[self.state] + self.in_state_us(now_us)}


class Backoff:
    """How long one store is left alone: twice as long with every failure, until it has been healthy for a while."""

    def __init__(self, limits: FaultTolerance) -> None:
        self._initial_us = int(limits.backoff_initial_s * 1e6)
        self._longest_us = int(limits.backoff_max_s * 1e6)
        #: Failures since it was healthy.
        self.failures = 0
        #: Leader's clock when it may be tried again.
        self.due_us = 0

    def __repr__(self) -> str:
        return f"<Backoff failures={self.failures} due_us={self.due_us}>"

    def failed(self, now_us: int) -> None:
        """It was taken out, or a try of it has failed."""
        self.due_us = now_us + self.wait_us
        self.failures += 1

    @property
    def wait_us(self) -> int:
        """How long it is left alone when it fails the next time."""
        return min(self._initial_us << min(self.failures, _MOST_DOUBLINGS), self._longest_us)

    @property
    def is_longest(self) -> bool:
        """It cannot wait any longer than that."""
        return self.wait_us == self._longest_us

    def forget(self) -> None:
        """It has served for long enough that it is trusted as if nothing had been."""
        self.failures = 0
