"""What it cost that storage was not there: one entry for each time that it was missed.

    outage       what was attached is gone, and no command asked for that
    refusal      an attach was refused, or failed, while nothing was attached
    cold start   from the start of the server to its first attachment, where one is configured

One at a time: an attach that fails during an outage is part of it.  Each ends when something is attached, or when
somebody detaches: then nobody misses it any more.  Meanwhile every prompt that was computed is held against the pages
that storage was known to hold - written, or found by a look-up - and what could have been fetched counts as computed
again.  That is an estimate from both sides: a store may have dropped a page, and what other servers have stored nobody
here knows.  Fed by `SchedulerCore`; replicated, on the plan's clock, and nothing that decides reads it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sglang_hicache import wire
from sglang_hicache.cache.cost_gate import CostGate
from sglang_hicache.cache.known_pages import KnownPages
from sglang_hicache.cache.page import page_keys

#: Entries that are kept, the latest ones.
MOST = 100

Kind = Literal["outage", "refusal", "cold_start"]


@dataclass(slots=True)
class _Entry:
    """One incident; its times are the leader's clock."""

    number: int
    kind: Kind
    cause: str
    backend: str
    began_us: int
    ended_us: int | None = None
    requests: int = 0
    reprefilled_tokens: int = 0
    computed_tokens: int = 0
    reprefill_us: int = 0


class Incidents:
    """One replica's."""

    def __init__(self, gate: CostGate, page_size: int, awaited: str) -> None:
        self._gate = gate
        self._page_size = page_size
        #: Backend that the server was told to start with, until the first plan; "": none.
        self._awaited = awaited
        self.known = KnownPages()
        #: Whose pages these are: backend, extra config and store generation.
        self._store = ("", "", 0)
        self._entries: deque[_Entry] = deque(maxlen=MOST)
        self._open: _Entry | None = None
        self._numbers = 0
        #: Since the start, by kind: the latest entries alone would make sums that fall.
        self.counters: Counter[str] = Counter()

    # ------------------------------------------------------------------------------------ beginnings and ends

    @property
    def is_open(self) -> bool:
        """Storage is missed just now."""
        return self._open is not None

    def begin_tick(self, now_us: int) -> None:
        """Before anything of a plan is applied."""
        if self._awaited:
            self._begin("cold_start", "the storage of the start is not attached yet", self._awaited, now_us)
            self._awaited = ""

    def heard(self, news: wire.StorageNews, generation: int, now_us: int) -> None:
        """Another store is attached than before, or none."""
        if news.after:
            self._end(now_us)
            self._belongs_to((news.after, news.extra_config_json, generation))
        elif not news.cause.startswith("command "):
            self._begin("outage", news.detail or news.cause, news.before, now_us)

    def attach_failed(self, backend: str, why: str, now_us: int) -> None:
        """Nothing is attached, and an attach that would have changed that did not."""
        self._begin("refusal", why, backend, now_us)

    def given_up(self, now_us: int) -> None:
        """Somebody detaches: from now on nobody misses it."""
        self._end(now_us)

    def cleared(self, generation: int) -> None:
        """The store was emptied, or its pages are those of other weights."""
        self._belongs_to((*self._store[:2], generation))

    def _belongs_to(self, store: tuple[str, str, int]) -> None:
        if store != self._store:
            self.known.forget()
        self._store = store

    def _begin(self, kind: Kind, cause: str, backend: str, now_us: int) -> None:
        if self._open is None:
            self._numbers += 1
            self._open = _Entry(self._numbers, kind, cause, backend, now_us)
            self._entries.append(self._open)
            self.counters[f"incidents_{kind}"] += 1

    def _end(self, now_us: int) -> None:
        if self._open is not None:
            self._open.ended_us, self._open = now_us, None

    # ------------------------------------------------------------------------------------------------- costs

    def prompt_computed(self, seed: bytes, prompt: Sequence[int], cached_tokens: int, threshold_pages: int) -> None:
        """A prompt is complete; all but its first `cached_tokens` tokens were computed."""
        entry, computed = self._open, len(prompt) - cached_tokens
        if entry is None or computed <= 0:
            return
        entry.requests += 1
        entry.computed_tokens += computed
        lost = self._lost_tokens(seed, prompt, cached_tokens, threshold_pages)
        entry.reprefilled_tokens += lost
        lost_us = self._gate.compute_us(lost) or 0
        entry.reprefill_us += lost_us
        self.counters[f"reprefilled_{entry.kind}_tokens"] += lost
        self.counters[f"reprefill_{entry.kind}_us"] += lost_us

    def _lost_tokens(self, seed: bytes, prompt: Sequence[int], cached_tokens: int, threshold_pages: int) -> int:
        """Of these what would have been fetched: whole pages in a row that the store was known to hold, one token left
        to compute, and not fewer than are worth a look-up."""
        if not self.known:
            return 0
        size = self._page_size
        keys = page_keys(prompt[: (len(prompt) - 1) // size * size], size, seed)[cached_tokens // size :]
        pages = next((at for at, key in enumerate(keys) if key not in self.known), len(keys))
        return pages * size if pages >= threshold_pages else 0

    # ---------------------------------------------------------------------------------------------- the status

    def snapshot(self, now_us: int) -> list[wire.Incident]:
        """All that are kept, oldest first."""
        return [
            wire.Incident(
                number=entry.number, kind=entry.kind, cause=entry.cause, backend=entry.backend,
                began_s_ago=(now_us - entry.began_us) / 1e6,
                ended_s_ago=None if entry.ended_us is None else (now_us - entry.ended_us) / 1e6,
                requests=entry.requests, reprefilled_tokens=entry.reprefilled_tokens,
                computed_tokens=entry.computed_tokens, reprefill_s=entry.reprefill_us / 1e6,
            )
            for entry in self._entries
        ]
