"""What a drill found out.  Reports and the terminal read it; nothing else does."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sglang_hicache.ctl.drill.load import Record
from sglang_hicache.ctl.drill.watch import Sample


class Verdict(enum.Enum):
    """How an assertion, or a whole drill, ended."""

    PASSED = "passed"
    FAILED = "failed"
    #: Something that it needs is not there.
    SKIPPED = "skipped"
    #: It could not be carried out.
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Assertion:
    """Something that was to hold."""

    name: str
    verdict: Verdict
    #: What was found, in words and figures.
    detail: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A step of the timeline."""

    #: Seconds since the load began, and how long it took.
    at_s: float
    took_s: float
    title: str
    detail: str


@dataclass(slots=True)
class Result:
    """One drill."""

    name: str
    about: str
    #: Why there is nothing more; "": there is.
    message: str = ""
    #: Of what could not be judged at all.
    outcome: Verdict | None = None
    #: Against what: "own server, 2 ranks", or a URL.
    where: str = ""
    #: Wall clock at the beginning, for people.
    began: str = ""
    took_s: float = 0.0
    assertions: list[Assertion] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    records: Sequence[Record] = ()
    samples: Sequence[Sample] = ()

    @property
    def verdict(self) -> Verdict:
        """Of the whole."""
        if self.outcome is not None:
            return self.outcome
        is_red = any(assertion.verdict is Verdict.FAILED for assertion in self.assertions)
        return Verdict.FAILED if is_red else Verdict.PASSED

    def figures(self) -> Mapping[str, float]:
        """The load in numbers."""
        answered = [record for record in self.records if not record.error]
        ttfts = sorted(record.ttft_s for record in answered)
        found: dict[str, float] = {
            "requests": len(self.records),
            "failed_requests": len(self.records) - len(answered),
            "ttft_p50_s": round(quantile(ttfts, 0.5), 4),
            "ttft_p99_s": round(quantile(ttfts, 0.99), 4),
            "prompt_tokens": sum(record.prompt_tokens for record in answered),
        }
        for tier in ("device", "host", "storage"):
            found[f"{tier}_tokens"] = sum(record.cached.get(tier, 0) for record in answered)
        return found | {"reprefilled_tokens": sum(record.reprefilled_tokens for record in answered)}


def quantile(values: Sequence[float], share: float) -> float:
    """Of values in order: the smallest one that so many are not above; 0 of none."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0
