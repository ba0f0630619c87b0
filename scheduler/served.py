"""Tokens that requests brought and got, and where their prompts came from: for the metrics.

Fed by `results`, once per request when its first token is there and then with each token; read by the status.
Replicated, and nothing that decides reads it.
"""

from __future__ import annotations

from sglang_hicache import wire
from sglang_hicache.cache.measures import PROMPT_TOKENS, Histogram
from sglang_hicache.cache.tiers import Tiers
from sglang_hicache.scheduler.request import Request


class Served:
    """Counts since the start of the server.  Health probes are nobody's load."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._counts = {
            "prompt_tokens": 0, "generation_tokens": 0,
            "cached_device_tokens": 0, "cached_host_tokens": 0, "cached_storage_tokens": 0,
        }  # fmt: skip
        self._uncached = Histogram(PROMPT_TOKENS)
        self._tick = 0
        #: Of the latest tick in which a prompt was complete: tokens of those prompts, and how many were cached.
        self._latest = [0, 0]

    def token(self, request: Request, tick: int) -> None:
        """A request got a token."""
        if request.is_probe:
            return
        self._counts["generation_tokens"] += 1
        if request.output_len == 1:
            self._prompt_complete(request, tick)

    def _prompt_complete(self, request: Request, tick: int) -> None:
        cached = request.cached or wire.CachedTokens()
        total = cached.device + cached.host + cached.storage
        for name, tokens in (
            ("prompt_tokens", request.prompt_tokens), ("cached_device_tokens", cached.device),
            ("cached_host_tokens", cached.host), ("cached_storage_tokens", cached.storage),
        ):  # fmt: skip
            self._counts[name] += tokens
        self._uncached.observe(request.prompt_tokens - total)
        self._tiers.prompt_complete(request.seed, request.tokens, request.prompt_tokens, total)
        if tick != self._tick:
            self._tick, self._latest = tick, [0, 0]
        self._latest[0] += request.prompt_tokens
        self._latest[1] += total

    def counters(self) -> dict[str, int]:
        """Totals, by name."""
        return {f"served_{name}": n for name, n in self._counts.items()}

    def load(self) -> dict[str, int]:
        """What the latest hit rate is made of."""
        return {"latest_prompt_tokens": self._latest[0], "latest_cached_tokens": self._latest[1]}

    def histograms(self) -> dict[str, wire.Histogram]:
        return {"uncached_prompt_tokens_histogram": self._uncached.snapshot()}
