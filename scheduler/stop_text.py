"""Stop strings, found in the text as the client will see it.

Implements `request.StopText` with the floor's decoder and matcher, the same two that the tokenizer process trims with.
Every rank runs one per request that brings stop strings; same prompt, same ids, same text, same stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sglang_hicache.text import IncrementalDecoder, StopMatcher
from sglang_hicache.wire import SamplingParams


class StopWatch:
    """Watches one request's output."""

    def __init__(self, tokenizer_path: str, sampling: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self._decoder = IncrementalDecoder(tokenizer_path, sampling.skip_special_tokens, prompt_ids)
        self._matcher = StopMatcher(sampling.stop)

    def push(self, token_id: int) -> str | None:
        """Take the next output token; the stop string that now stands in the text, if one does."""
        match = self._matcher.push(self._decoder.push([token_id]))
        return None if match is None else match.stop

    @classmethod
    def maker(cls, tokenizer_path: str) -> Callable[[SamplingParams, Sequence[int]], StopWatch]:
        """What the core calls for each request with stop strings."""
        return lambda sampling, prompt_ids: cls(tokenizer_path, sampling, prompt_ids)
