"""What a forward produced: tokens appended, stops decided, finished requests sent home.

Called with the ids that rank 0 sampled and all ranks received, so every rank comes to the same ends.
"""

from __future__ import annotations

from sglang_hicache import wire
from sglang_hicache.config import ModelConfig
from sglang_hicache.errors import IntegrityError
from sglang_hicache.scheduler.admission import Admission, Share
from sglang_hicache.scheduler.pages import RequestPages
from sglang_hicache.scheduler.request import Request, RequestState
from sglang_hicache.scheduler.served import Served


class Results:
    """Applies sampled ids to the requests of the tick."""

    def __init__(
        self, model: ModelConfig, admission: Admission, pages: RequestPages, longest_tokens: int, served: Served
    ) -> None:
        self._eos = frozenset(model.eos_token_ids)
        self._longest_tokens = longest_tokens
        self._admission = admission
        self._pages = pages
        self._served = served

    def apply(
        self, shares: list[Share], token_ids: list[int], tick: int
    ) -> tuple[list[wire.RequestOutput], list[Request]]:
        """Outputs of the tick, and the requests that ended in it."""
        sampled = iter(token_ids)
        outputs: list[wire.RequestOutput] = []
        ended: list[Request] = []
        for share in shares:
            request, samples = share.request, share.is_last
            request.computed += share.tokens
            if request.state is RequestState.EXTENDING:
                self._pages.share(request, tick)
            if not samples:
                continue
            if request.state is RequestState.EXTENDING:
                request.move(RequestState.DECODING)
            token_id = next(sampled, None)
            if token_id is None:
                raise IntegrityError(f"the forward gave no token for {request!r}")
            request.tokens.append(token_id)
            self._served.token(request, tick)
            finish = self._stop(request, token_id)
            outputs.append(request.output((token_id,), finish))
            if finish is not None:
                self.end(request, tick)
                ended.append(request)
        if next(sampled, None) is not None:
            raise IntegrityError(f"the forward gave {len(token_ids)} tokens for {len(outputs)} rows")
        return outputs, ended

    def _stop(self, request: Request, token_id: int) -> wire.FinishReason | None:
        sampling = request.sampling
        text_stop = request.stop_text.push(token_id) if request.stop_text else None
        if (token_id in self._eos and not sampling.ignore_eos) or token_id in sampling.stop_token_ids:
            return wire.FinishReason(type="stop", matched=token_id)
        if text_stop is not None:
            return wire.FinishReason(type="stop", matched=text_stop)
        if request.output_len >= sampling.max_new_tokens or len(request.tokens) >= self._longest_tokens:
            return wire.FinishReason(type="length")
        return None

    def end(self, request: Request, tick: int) -> None:
        """The request leaves the running ones; its pages go to the cache."""
        self._admission.running.remove(request)
        self._pages.give_back(request, tick)
        request.move(RequestState.FINISHED)
