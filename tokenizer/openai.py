"""The OpenAI routes: /v1/completions, /v1/chat/completions and /v1/models.

Handlers run on the event loop, one task per HTTP request, and use the request manager like the native route
does.  Where OpenAI's form and SGLang's differ, this is SGLang's: a plain error object, `matched_stop` in a
choice, the request id as id.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sglang_hicache.errors import UserError
from sglang_hicache.tokenizer.api import Body, decode_body, refuse_unsupported
from sglang_hicache.tokenizer.api_openai import (
    UNSUPPORTED_CHAT,
    UNSUPPORTED_COMPLETION,
    ChatBody,
    ChatMessage,
    CompletionBody,
    OpenAIBody,
)
from sglang_hicache.tokenizer.generate import CLIENT_CLOSED_REQUEST
from sglang_hicache.tokenizer.intake import prompts_of
from sglang_hicache.tokenizer.manager import Increment, RequestGroup, RequestStream, Submission, Unavailable
from sglang_hicache.tokenizer.replies import (
    DONE,
    Aborted,
    EventStream,
    JsonReply,
    cached_tokens,
    cached_tokens_details,
    event,
    openai_error,
    openai_error_body,
    unless_disconnected,
)
from sglang_hicache.tokenizer.services import Services
from sglang_hicache.wire import FinishReason

#: What OpenAI's own completions route generates when the client does not say.
COMPLETION_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class _Shape:
    """How one of the two routes names and nests the same things."""

    #: `object` of the whole answer, and of a chunk of a stream.
    whole: str
    chunk: str
    chat: bool

    def choice(self, stream: RequestStream) -> dict[str, Any]:
        """One finished choice."""
        text = {"message": {"role": "assistant", "content": stream.text}} if self.chat else {"text": stream.text}
        return {"index": stream.index, **text, "logprobs": None, **_ending(stream.finish)}

    def delta(self, increment: Increment) -> dict[str, Any]:
        """One choice of a chunk."""
        text = {"delta": {"content": increment.text}} if self.chat else {"text": increment.text}
        return {"index": increment.index, **text, "logprobs": None, **_ending(increment.finish)}


COMPLETION = _Shape(whole="text_completion", chunk="text_completion", chat=False)
CHAT = _Shape(whole="chat.completion", chunk="chat.completion.chunk", chat=True)


class OpenAIRoutes:
    """Completions, chat completions, models."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._started_s = int(time.time())

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._serve(request, CompletionBody, COMPLETION)

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._serve(request, ChatBody, CHAT)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JsonReply({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        name = request.path_params["model"]
        if name != self._services.config.model.served_name:
            message = f"The model '{name}' does not exist; this server has '{self._services.config.model.served_name}'"
            error = {"message": message, "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
            return JsonReply({"error": error}, 404)
        return JsonReply(self._card())

    def _card(self) -> dict[str, Any]:
        model = self._services.config.model
        return {
            "id": model.served_name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "sglang",
            "root": model.served_name,
            "parent": None,
            "max_model_len": model.context_length,
        }

    async def _serve(self, request: Request, kind: type[Body], shape: _Shape) -> Response:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            return openai_error(f"the content type must be application/json, not {content_type!r}", 400)
        try:
            self._services.lifecycle.check()
            body = decode_body(await request.body(), kind)
            return await self._answer(request, body, shape)
        except UserError as error:
            return openai_error(str(error), 400)
        except Aborted as error:
            return openai_error(str(error), error.status_code)
        except Unavailable as error:
            return openai_error(str(error), 503)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def _answer(self, request: Request, body: CompletionBody | ChatBody, shape: _Shape) -> Response:
        if isinstance(body, ChatBody):
            submissions = [await self._chat_submission(body)]
        else:
            submissions = await self._completion_submissions(body)
        group = self._services.requests.submit(submissions)
        if body.stream:
            return EventStream(group, self._events(group, body, shape))
        async with group:
            streams = await unless_disconnected(request, group.finished())
        for stream in streams:
            if stream.finish.status_code:
                raise Aborted(stream.finish)
        answer = self._head(streams[0].rid, body, shape.whole)
        answer |= {"choices": [shape.choice(stream) for stream in streams], "usage": self._usage(streams)}
        return JsonReply(answer | _sglext(body, streams))

    async def _completion_submissions(self, body: CompletionBody) -> list[Submission]:
        refuse_unsupported(body, UNSUPPORTED_COMPLETION)
        prompts, several = prompts_of(body.prompt)
        codec = self._services.codec
        submissions = []
        for index, prompt in enumerate(prompts):
            token_ids = await codec.encode(prompt) if isinstance(prompt, str) else prompt
            rid = f"{body.rid}_{index}" if body.rid and several else body.rid
            submissions.append(self._submission(body, token_ids, rid, body.max_tokens, COMPLETION_MAX_TOKENS))
        return submissions

    async def _chat_submission(self, body: ChatBody) -> Submission:
        refuse_unsupported(body, UNSUPPORTED_CHAT)
        if not body.messages:
            raise UserError("messages is empty; send at least one message")
        messages = [_template_message(message) for message in body.messages]
        token_ids = await self._services.codec.encode_chat(messages, body.chat_template_kwargs or {})
        asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        return self._submission(body, token_ids, body.rid, asked, None)

    def _submission(
        self, body: OpenAIBody, token_ids: list[int], rid: str | None, asked: int | None, default: int | None
    ) -> Submission:
        intake = self._services.intake
        intake.check_names(rid, body.extra_key, body.cache_salt, body.priority)
        intake.check_prompt(token_ids)
        budget = intake.output_budget(len(token_ids), asked, default)
        return Submission(
            token_ids=token_ids,
            sampling=intake.sampling(body, seed=body.seed, max_new_tokens=budget),
            rid=rid,
            extra_key=body.extra_key,
            cache_salt=body.cache_salt,
            priority=body.priority,
        )

    async def _events(self, group: RequestGroup, body: OpenAIBody, shape: _Shape) -> AsyncIterator[bytes]:
        head = self._head(group.streams[0].rid, body, shape.chunk)
        if shape.chat:
            delta = {"role": "assistant", "content": ""}
            choice = {"index": 0, "delta": delta, "logprobs": None, **_ending(None)}
            yield event(head | {"choices": [choice], "usage": None})
        async for increment in group.increments():
            if increment.finish is not None and increment.finish.status_code:
                finish = increment.finish
                yield event({"error": openai_error_body(finish.message, finish.status_code)})
                continue
            if increment.text or increment.finish is not None:
                yield event(head | {"choices": [shape.delta(increment)], "usage": None})
        if body.stream_options is not None and body.stream_options.include_usage:
            yield event(head | {"choices": [], "usage": self._usage(group.streams)} | _sglext(body, group.streams))
        yield DONE

    def _head(self, rid: str, body: OpenAIBody, kind: str) -> dict[str, Any]:
        name = body.model or self._services.config.model.served_name
        return {"id": rid, "object": kind, "created": int(time.time()), "model": name}

    def _usage(self, streams: Iterable[RequestStream]) -> dict[str, Any]:
        streams = list(streams)
        prompt_tokens = sum(stream.prompt_tokens for stream in streams)
        completion_tokens = sum(len(stream.token_ids) for stream in streams)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens,
            "reasoning_tokens": 0,
        }
        if self._services.config.http.cache_report:
            usage["prompt_tokens_details"] = {"cached_tokens": sum(cached_tokens(stream.cached) for stream in streams)}
        return usage


def _template_message(message: ChatMessage) -> dict[str, Any]:
    """What a chat template gets: only what the client sent, and content as text."""
    fields = {name: value for name, value in msgspec.structs.asdict(message).items() if value is not None}
    if isinstance(message.content, list):
        fields["content"] = "\n".join(_part_text(part) for part in message.content)
    fields.setdefault("content", "")
    return fields


def _part_text(part: dict[str, Any]) -> str:
    text = part.get("text")
    if part.get("type") != "text" or not isinstance(text, str):
        raise UserError(f"message content of type {part.get('type')!r} is not supported; send parts of type 'text'")
    return text


def _ending(finish: FinishReason | None) -> dict[str, Any]:
    if finish is None:
        return {"finish_reason": None, "matched_stop": None}
    return {"finish_reason": finish.type, "matched_stop": finish.matched}


def _sglext(body: OpenAIBody, streams: Iterable[RequestStream]) -> dict[str, Any]:
    if not body.return_cached_tokens_details:
        return {}
    details = [cached_tokens_details(stream.cached, stream.fetch) for stream in streams]
    return {"sglext": {"cached_tokens_details": details[0] if len(details) == 1 else details}}
