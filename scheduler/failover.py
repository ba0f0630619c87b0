"""What the server does by itself about a store that is sick: takes it out, tries it, brings it or another one back."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_hicache import wire


@dataclass(frozen=True, slots=True)
class Canary:
    """A try of a backend that is not attached, on every rank, with pages that are nobody's."""

    number: int
    backend: str
    extra_config_json: str
    #: Seconds after which a rank that has not said anything has failed.
    deadline_s: float

    def __repr__(self) -> str:
        return f"Canary({self.number}, {self.backend!r})"  # without the config: it may hold a key


class Failover:
    """One replica's."""

    def canaries(self) -> dict[int, int]:
        """Canaries under way: number -> leader's clock when its time is over.  The leader collects what ranks say."""
        return {}

    def canary_ended(self, outcome: wire.CanaryOutcome) -> None:
        """All ranks agree on how a canary ended."""
