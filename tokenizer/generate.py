"""The native routes: /generate and /abort_request.

Handlers run on the event loop, one task per HTTP request.  They check what was asked, submit it to the request
manager and shape what comes back; leaving a handler early, for whatever reason, aborts its requests.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sglang_hicache.errors import UserError
from sglang_hicache.tokenizer.api import (
    UNSUPPORTED_GENERATE,
    UNSUPPORTED_SAMPLING,
    AbortBody,
    GenerateBody,
    MalformedBody,
    SamplingBody,
    decode_body,
    refuse_unsupported,
)
from sglang_hicache.tokenizer.intake import prompts_of
from sglang_hicache.tokenizer.manager import RequestGroup, RequestStream, Submission, Unavailable
from sglang_hicache.tokenizer.replies import (
    DONE,
    Aborted,
    EventStream,
    JsonReply,
    cached_tokens,
    cached_tokens_details,
    event,
    text_reply,
    unless_disconnected,
)
from sglang_hicache.tokenizer.services import Services
from sglang_hicache.wire import FinishReason

#: Output tokens when the client does not say.
DEFAULT_MAX_NEW_TOKENS = 128

#: Nobody reads this status: the client has hung up.  It is the usual one for that in logs.
CLIENT_CLOSED_REQUEST = 499


class NativeRoutes:
    """/generate and /abort_request."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def generate(self, request: Request) -> Response:
        """One answer, a list of answers for a list of prompts, or a stream of them."""
        body = GenerateBody()
        try:
            self._services.lifecycle.check()
            body = decode_body(await request.body(), GenerateBody)
            return await self._answer(request, body)
        except MalformedBody as error:
            return JsonReply({"error": str(error)}, 400)
        except UserError as error:
            if body.stream:
                return Response(_stream_error(str(error), 400) + DONE, media_type="text/event-stream")
            return _error(str(error), 400)
        except Aborted as error:
            return _error(str(error), error.status_code)
        except Unavailable as error:
            return _error(str(error), 503)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def abort_request(self, request: Request) -> Response:
        """End one request, or all; an id that is not in flight is no error, since it may just have finished."""
        try:
            body = decode_body(await request.body(), AbortBody)
        except MalformedBody as error:
            return JsonReply({"error": str(error)}, 400)
        if body.abort_all:
            self._services.requests.abort_all()
        elif body.rid:
            self._services.requests.abort(body.rid)
        else:
            return _error("abort_request needs a rid, or abort_all: true", 400)
        return text_reply("")

    async def _answer(self, request: Request, body: GenerateBody) -> Response:
        refuse_unsupported(body, UNSUPPORTED_GENERATE)
        submissions, several = await self._submissions(body)
        group = self._services.requests.submit(submissions)
        if body.stream:
            return EventStream(group, _events(group, several, body))
        async with group:
            streams = await unless_disconnected(request, group.finished())
        for stream in streams:
            if stream.finish.status_code:
                raise Aborted(stream.finish)
        answers = [_answer_of(stream, body) for stream in streams]
        return JsonReply(answers if several else answers[0])

    async def _submissions(self, body: GenerateBody) -> tuple[list[Submission], bool]:
        if (body.text is None) == (body.input_ids is None):
            raise UserError("exactly one of text and input_ids must be given")
        prompts, several = prompts_of(body.text if body.text is not None else body.input_ids)
        sampling = _one_each("sampling_params", body.sampling_params or SamplingBody(), len(prompts))
        if isinstance(body.rid, str) and several:
            rids = [f"{body.rid}_{index}" for index in range(len(prompts))]
        else:
            rids = _one_each("rid", body.rid, len(prompts))
        submissions = [
            await self._submission(body, prompt, params, rid)
            for prompt, params, rid in zip(prompts, sampling, rids, strict=True)
        ]
        return submissions, several

    async def _submission(
        self, body: GenerateBody, prompt: str | list[int], params: SamplingBody, rid: str | None
    ) -> Submission:
        refuse_unsupported(params, UNSUPPORTED_SAMPLING, "sampling_params.")
        intake = self._services.intake
        intake.check_names(rid, body.extra_key, body.cache_salt, body.priority)
        token_ids = intake.check_prompt(
            await self._services.codec.encode(prompt) if isinstance(prompt, str) else prompt
        )
        if params.max_new_tokens is msgspec.UNSET:
            budget = intake.output_budget(len(token_ids), None, DEFAULT_MAX_NEW_TOKENS)
        else:
            budget = intake.output_budget(len(token_ids), params.max_new_tokens, None)
        return Submission(
            token_ids=token_ids,
            sampling=intake.sampling(params, seed=params.sampling_seed, max_new_tokens=budget),
            rid=rid,
            extra_key=body.extra_key,
            cache_salt=body.cache_salt,
            priority=body.priority,
        )


def _one_each(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise UserError(f"{name} is a list of {len(value)}, but there are {count} prompts")
    return value


async def _events(group: RequestGroup, several: bool, body: GenerateBody) -> AsyncIterator[bytes]:
    """Each event carries the whole text so far, as clients of this route expect."""
    async for increment in group.increments():
        stream = group.streams[increment.index]
        if increment.finish is not None and increment.finish.status_code:
            yield _stream_error(increment.finish.message, increment.finish.status_code)
            continue
        answer = _answer_of(stream, body)
        yield event(answer | {"index": increment.index} if several else answer)
    yield DONE


def _answer_of(stream: RequestStream, body: GenerateBody) -> dict[str, Any]:
    fetch = stream.fetch if body.return_cached_tokens_details else None
    return {
        "text": stream.text,
        "output_ids": stream.token_ids,
        "meta_info": {
            "id": stream.rid,
            "finish_reason": _finish_reason(stream.finish, len(stream.token_ids)),
            "prompt_tokens": stream.prompt_tokens,
            "completion_tokens": len(stream.token_ids),
            "cached_tokens": cached_tokens(stream.cached),
            "cached_tokens_details": cached_tokens_details(stream.cached, fetch),
            "weight_version": stream.weight_version,
            "num_retractions": stream.num_retractions,
            "e2e_latency": stream.e2e_latency_s,
        },
    }


def _finish_reason(finish: FinishReason | None, completion_tokens: int) -> dict[str, Any] | None:
    if finish is None:
        return None
    if finish.type == "stop":
        return {"type": "stop", "matched": finish.matched}
    if finish.type == "length":
        return {"type": "length", "length": completion_tokens}
    return {"type": "abort", "message": finish.message}


def _error(message: str, status_code: int) -> JsonReply:
    return JsonReply({"error": {"message": message}}, status_code)


def _stream_error(message: str, status_code: int) -> bytes:
    kind = "invalid_request_error" if status_code == 400 else "server_error"
    return event({"error": {"message": message, "type": kind, "code": status_code, "retryable": status_code == 503}})
