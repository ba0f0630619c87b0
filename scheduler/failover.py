"""What the server does by itself about a store that is sick: takes it out, tries it, brings it or another one back."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_hicache import wire
from sglang_hicache.storage.attachment_events import Answer


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

    def slot_answered(self, answer: Answer) -> None:
        """The slot has finished with a change that began here (its id begins with `AUTOMATIC`)."""

    def attach_ended(self, command: wire.AttachStorage, answer: Answer) -> None:
        """An attach or a switch that a command brought was committed, or has failed."""

    def detach_begins(self) -> None:
        """A command takes the storage out."""
