"""What the client sees of one request's tokens: text in stable pieces, trimmed at the stop that the scheduler found.

The request manager owns one `Detokenizer` per request and calls it on the event loop.  It decides nothing: that a
request ends, and why, is the scheduler's word (`wire.FinishReason`); here the matched stop string or stop token is
cut off, and the beginning of what may become a stop string is not shown before that is settled.
"""

from __future__ import annotations

from collections.abc import Sequence

from sglang_hicache.text import IncrementalDecoder, StopMatcher
from sglang_hicache.wire import FinishReason, SamplingParams


class Detokenizer:
    """Text of one request."""

    def __init__(self, tokenizer_path: str, sampling: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self._decoder = IncrementalDecoder(tokenizer_path, sampling.skip_special_tokens, prompt_ids)
        self._matcher = StopMatcher(sampling.stop)
        self._given = 0
        self._held = ""

    def push(self, token_ids: Sequence[int], finish: FinishReason | None) -> str:
        """Append what one tick produced; the text that may be shown now."""
        matched = None if finish is None else finish.matched
        if token_ids and token_ids[-1] == matched:
            # A stop token ends the text and is no part of it, even where special tokens are shown.
            token_ids = token_ids[:-1]
        fresh = self._decoder.push(token_ids)
        stop = self._matcher.push(fresh)
        self._held += fresh
        if finish is None:
            return self._give(len(self._held) - self._matcher.held)
        if isinstance(matched, str) and stop is not None:
            return self._give(stop.start - self._given)
        self._held += self._decoder.finish()
        return self._give(len(self._held))

    def _give(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        self._given += len(text)
        return text
