"""The stores that may serve: the primary, its standbys, which of them does, and when each may be tried.

Owned by `Failover`, which decides by it; nothing here starts anything.  Replicated, on the plan's clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_hicache.cache.breaker import Backoff
from sglang_hicache.cache.evidence import Paces
from sglang_hicache.storage.fault_tolerance import FaultTolerance
from sglang_hicache.storage.settings import store_settings

PRIMARY = "primary"

#: Tries of the primary, all of them good, in `healthy_s` before it is taken back.
PROBES = 5


@dataclass(slots=True, eq=False)
class Store:
    """One that may serve."""

    name: str
    backend: str
    extra_config_json: str
    limits: FaultTolerance
    backoff: Backoff
    paces: Paces = field(default_factory=Paces)
    #: How many times slower than slow a canary may be.
    tolerance: int = 1
    #: While another one serves: leader's clock since when all canaries were good, and when the next is due.
    good_since_us: int | None = None
    probe_us: int = 0

    def __str__(self) -> str:
        return f"{self.name} ({self.backend})"

    def refused(self, now_us: int) -> None:
        """It could not be used."""
        self.backoff.failed(now_us)
        self.good_since_us, self.probe_us = None, self.backoff.due_us

    def was_slow(self, page_s: float) -> bool:
        """Did its canary take longer for a page than it should?  What was never measured is not slow."""
        known_us = self.paces.one_page_us()
        if known_us is None:
            return False
        limit_us = max(int(known_us * self.limits.slow_factor), int(2e6 * self.limits.slow_min_s)) * self.tolerance
        if int(page_s * 1e6) < limit_us:
            return False
        if self.backoff.is_longest:  # what is slow for good comes back as well, only late
            self.tolerance *= 2
        return True

    def was_good(self, now_us: int) -> bool:
        """One more good canary while another one serves.  True: there were enough of them."""
        healthy_us = int(self.limits.healthy_s * 1e6)
        if self.good_since_us is None:
            self.good_since_us = now_us
        self.probe_us = now_us + max(1, healthy_us // PROBES)
        # One that is well until it has traffic is taken back less and less often.
        return now_us - self.good_since_us >= max(healthy_us, self.backoff.wait_us)


class Stores:
    """All of them, the best first."""

    def __init__(self) -> None:
        self.limits = FaultTolerance()
        self._all: list[Store] = []
        self.serving: Store | None = None
        #: Leader's clock since when.
        self._since_us = 0
        self._served_last: Store | None = None

    def __bool__(self) -> bool:
        return bool(self._all)

    @property
    def primary(self) -> Store:
        """What a command has attached."""
        return self._all[0]

    def define(self, backend: str, extra_config_json: str) -> None:
        """What a command attaches is the primary from now on."""
        self.limits = limits = store_settings(extra_config_json).fault_tolerance
        self._all = [Store(PRIMARY, backend, extra_config_json, limits, Backoff(limits))]
        for number, standby in enumerate(limits.standby, start=1):
            config = standby.extra_config_json()
            self._all.append(Store(f"standby {number}", standby.backend, config, limits, Backoff(limits)))
        self.serving = self._served_last = None

    def clear(self) -> None:
        """None is wanted."""
        self._all, self.limits, self.serving, self._served_last = [], FaultTolerance(), None, None

    def serves(self, store: Store, now_us: int) -> None:
        """It is attached on every rank."""
        self.serving = self._served_last = store
        self._since_us = now_us
        if store.tolerance > 1:  # it has changed for good: what it was like before says nothing
            store.paces, store.tolerance = Paces(), 1
        self.primary.good_since_us, self.primary.probe_us = None, self.primary.backoff.due_us

    def lost(self, now_us: int) -> Store | None:
        """Nobody serves any more; who did."""
        store, self.serving = self.serving, None
        if store is not None:
            if now_us - self._since_us >= int(self.limits.healthy_s * 1e6):
                store.backoff.forget()
            store.refused(now_us)
        return store

    def tried(self, keeps_trying: bool) -> list[Store]:
        """Who may take over when nobody serves."""
        if self.limits.level == "failover":
            return self._all
        return self._all[:1] if keeps_trying or self.limits.level == "auto_reconnect" else []

    def watches_primary(self) -> bool:
        """A standby serves, until the primary is well."""
        return self.limits.level == "failover" and self.serving not in (None, self.primary)

    def cause(self, store: Store) -> str:
        """What it is called that this one serves next."""
        if store is self._served_last or (self._served_last is None and store is self.primary):
            return "reconnect"
        return "failback" if store is self.primary else "failover"
