"""Records inside messages: of requests, and of what the status tells.  `wire.py` hands them on under its own name."""

from __future__ import annotations

from typing import Literal

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How the tokens of one request are chosen and when it stops."""

    max_new_tokens: int = 128
    #: 0 is greedy.
    temperature: float = 1.0
    top_p: float = 1.0
    #: -1 or 0: no limit.
    top_k: int = -1
    min_p: float = 0.0
    #: None: the leader gives the request one when it arrives, so that a retracted request repeats itself.
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    #: The stop check decodes text the way the client will see it.
    skip_special_tokens: bool = True


class FinishReason(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Why a request ended."""

    type: Literal["stop", "length", "abort"]
    #: The stop token id or stop string that matched.
    matched: int | str | None = None
    #: For an abort: what the client is told.
    message: str = ""
    #: For an abort: HTTP status that the client gets, e.g. 503 for a full queue.  0: an ordinary answer.
    status_code: int = 0


class CachedTokens(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How many prompt tokens of a request came from each tier; the rest was computed."""

    device: int = 0
    host: int = 0
    storage: int = 0
    #: Class name of the attached backend, or "" when no storage is attached.
    storage_backend: str = ""


class Histogram(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Observations by size, as Prometheus counts them."""

    #: Upper bounds, rising; one more bucket, without a bound, follows the last.
    bounds: tuple[float, ...]
    #: Observations of each bucket alone; one more than there are bounds.
    counts: tuple[int, ...]
    #: Sum of all observations.
    total: float = 0.0


# ------------------------------------------------------------------ for people: nothing decides by them


class FetchDecision(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Whether storage was asked for what a request lacked, and the figures behind it."""

    #: probe: fetched, but nobody waits for it, so that the rates stay known.
    verdict: Literal["fetch", "recompute", "probe"]
    #: In words, e.g. "prefill rate not measured yet".
    reason: str
    #: Tokens that device and host lacked.
    tokens: int = 0
    #: Seconds that fetching them was expected to take; 0: not known.
    fetch_s: float = 0.0
    #: Seconds that computing them was expected to take; 0: not known.
    recompute_s: float = 0.0
    #: Seconds that the request has waited for storage.
    waited_s: float = 0.0


class Place(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One attachment of a rank's slot."""

    role: Literal["current", "candidate", "retiring"]
    #: detached, attaching, attached, draining, detaching, failed.
    state: str
    epoch: int
    backend: str
    #: Operations admitted and not closed.
    in_flight: int = 0


BreakerState = Literal["off", "closed", "open", "half_open"]


class BreakerStatus(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Whether storage is trusted, and what will be tried next."""

    #: off: nothing is attached, or the level is off.
    state: BreakerState = "off"
    #: Level of fault_tolerance: off, auto_detach, auto_reconnect, failover.
    level: str = "off"
    #: Seconds in this state.
    in_state_s: float = 0.0
    #: Seconds in each state since the start, this one included.
    total_s: dict[str, float] = {}
    #: Times that it opened since the start.
    trips: int = 0
    #: Why it opened last, "" before the first time.
    reason: str = ""
    #: Which of the configured stores serves: "primary", "standby 1" ..., "" while none does.
    serving: str = ""
    #: Seconds until the next canary; None: none is planned.
    next_try_s: float | None = None
    #: Commits of a standby, and returns to the primary, since the start.
    failovers: int = 0
    failbacks: int = 0
    #: Seconds since storage was taken out, tries included; 0: it is not out.
    out_s: float = 0.0


class Incident(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A time in which storage did not do what it was there for, and what that cost."""

    number: int
    kind: Literal["outage", "refusal", "cold_start"]
    #: In words.
    cause: str
    #: Name of the backend that was missed; "" where none ever was.
    backend: str = ""
    #: Seconds since it began, and since it ended; None: it lasts.
    began_s_ago: float = 0.0
    ended_s_ago: float | None = None
    #: Requests that computed something in this time.
    requests: int = 0
    #: Prompt tokens that were computed although storage was known to hold them.
    reprefilled_tokens: int = 0
    #: All prompt tokens that were computed: where nobody knows what storage held, the most that it can have cost.
    computed_tokens: int = 0
    #: Seconds of prefill that the first of the two took, at the measured rate.
    reprefill_s: float = 0.0


class DryRunStep(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One step of a dry run that ended well."""

    #: connect, write, exists, read, compare, delete.
    name: str
    took_s: float


class DryRunReport(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What a rank found out about a backend without attaching it."""

    steps: list[DryRunStep] = []
    #: Step that failed; "": none did.
    failed_step: str = ""
    #: Code of `storage/diagnosis.py`; "": nothing failed.
    code: str = ""
    #: What to tell the operator; never a secret.
    reason: str = ""
    #: Seconds of one look-up, one page written, one page read: the median of some.
    lookup_s: float = 0.0
    write_page_s: float = 0.0
    read_page_s: float = 0.0
    #: Bytes per second of a batch.
    write_rate: float = 0.0
    read_rate: float = 0.0
    #: What the backend says of itself.
    info: dict[str, str] = {}
