"""Who computes what in this tick: budget, memory, retraction.

Each tick every decoding request computes one token; what is left of the token budget goes to prompts, first those
that are under way, then from the waiting line in its order.  The line is strict: a request that does not fit holds
back those behind it, or it would starve; one that waits for its prefetch does not.  Replicated; called inside
`SchedulerCore.apply`.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_hicache.cache.prefetch import Prefetcher
from sglang_hicache.config import ServerConfig
from sglang_hicache.scheduler.pages import RequestPages
from sglang_hicache.scheduler.request import Request, RequestState
from sglang_hicache.scheduler.waiting import WaitingQueue
from sglang_hicache.storage.attachment import StorageSlot
from sglang_hicache.storage.registry import spec


@dataclass(frozen=True, slots=True)
class Share:
    """Tokens [computed, computed + tokens) of one request, in this tick."""

    request: Request
    tokens: int

    @property
    def is_last(self) -> bool:
        """Reaches the end of the text so far: a next token is sampled."""
        return self.request.computed + self.tokens == len(self.request.tokens)


class Admission:
    """The running requests, and the choice of what they compute."""

    def __init__(
        self,
        config: ServerConfig,
        waiting: WaitingQueue,
        pages: RequestPages,
        prefetcher: Prefetcher,
        slot: StorageSlot,
    ) -> None:
        self._limits = config.scheduler
        self._load_back_threshold = config.cache.load_back_threshold
        self._waiting = waiting
        self._pages = pages
        self._prefetcher = prefetcher
        self._slot = slot
        #: Admitted requests in order of admission.
        self.running: list[Request] = []
        #: The line stands still: the weights are about to change.
        self.is_held = False

    def choose(self, tick: int, now_us: int) -> list[Share]:
        """The shares of this tick, in row order."""
        retracted = self._make_room(tick)
        shares = [Share(r, 1) for r in self.running if r.state is RequestState.DECODING]
        budget = self._limits.chunked_prefill_size
        for request in self.running:
            if request.state is RequestState.EXTENDING and budget:
                shares.append(Share(request, min(budget, len(request.tokens) - request.computed)))
                budget -= shares[-1].tokens
        if not retracted:  # memory is short: whoever was admitted now would be retracted next
            self._admit(shares, budget, tick, now_us)
        self._tell_gate(shares)
        return shares

    def _tell_gate(self, shares: list[Share]) -> None:
        """What the forward of this tick is made of: the next plan says how long it took."""
        extends = [share for share in shares if share.request.state is RequestState.EXTENDING]
        left = sum(len(r.tokens) - r.computed for r in self.running if r.state is RequestState.EXTENDING)
        tokens = sum(share.tokens for share in extends)
        self._prefetcher.waits.gate.computes(
            tokens, decodes=len(shares) - len(extends), samples=any(share.is_last for share in shares),
            left_tokens=left - tokens,
        )

    def _make_room(self, tick: int) -> bool:
        """A page for every decoding request that needs one; the youngest are sent back to the line until it fits."""
        retracted = False
        for request in list(self.running):
            while request.state is RequestState.DECODING and not self._pages.grow(request):
                self.retract(self._least(), tick)
                retracted = True
        return retracted

    def _least(self) -> Request:
        """Who gives way: the lowest priority, then the youngest."""
        return max(self.running, key=lambda r: (-r.priority, r.arrival))

    def retract(self, request: Request, tick: int) -> None:
        """Back to the line; what it computed stays cached as long as nobody needs the room."""
        self.running.remove(request)
        self._pages.give_back(request, tick)
        request.num_retractions += 1
        request.move(RequestState.WAITING)
        self._waiting.add(request)

    def _admit(self, shares: list[Share], budget: int, tick: int, now_us: int) -> None:
        for request in self._waiting:
            if not budget or len(self.running) >= self._limits.max_running_requests:
                return
            if self._holds_back(request) or not self._prefetcher.may_run(request.rid, now_us):
                continue
            match = self._pages.take(request, self._load_back_threshold, len(self.running), tick)
            if match is None:
                return
            self._waiting.remove(request)
            span = self._prefetcher.span_tokens(request.rid)
            backend = self._prefetcher.backend(request.rid) or self._slot.serving()
            decision = self._prefetcher.decision(request.rid, now_us)
            self._prefetcher.forget(request.rid)
            if request.cached is None:
                request.fetch = decision
                class_name = spec(backend).class_name if backend else ""
                request.cached = self._pages.cached_tokens(request, match, span, class_name)
            request.move(RequestState.EXTENDING)
            self.running.append(request)
            shares.append(Share(request, min(budget, len(request.tokens) - request.computed)))
            budget -= shares[-1].tokens

    def _holds_back(self, request: Request) -> bool:
        """Not those that have begun: they end with the weights they began with.  Not probes: they leave no page."""
        return self.is_held and not request.num_retractions and not request.is_probe

    def will_admit(self) -> bool:
        """Could the next tick admit somebody who is not waiting for a prefetch?  Asked to decide whether to sleep."""
        return any(not (self._holds_back(r) or self._prefetcher.is_waiting(r.rid)) for r in self._waiting)
