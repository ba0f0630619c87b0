"""Forms of answers that several routes share: errors, server-sent events, and what happens when the client hangs up.

Called on the event loop.  Each family of routes has its own form of an error, fixed by the clients that exist;
a handler raises a typed error and its family's function turns it into a response.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sglang_hicache.tokenizer.manager import RequestGroup
from sglang_hicache.wire import CachedTokens, FetchDecision, FinishReason

Value = TypeVar("Value")

_encode = msgspec.json.Encoder().encode

#: Last event of every stream.
DONE = b"data: [DONE]\n\n"


class Aborted(Exception):
    """The scheduler ended the request with an HTTP status of its own (a full queue, a prompt that never fits)."""

    def __init__(self, finish: FinishReason) -> None:
        super().__init__(finish.message)
        self.status_code = finish.status_code


class JsonReply(Response):
    """A JSON body, encoded by msgspec (ten times the speed of the standard library, and structs as they are)."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return _encode(content)


def text_reply(text: str, status_code: int = 200) -> Response:
    """A line or two of plain text, as the admin routes answer."""
    return Response(text if text.endswith("\n") else text + "\n", status_code, media_type="text/plain")


def openai_error(message: str, status_code: int, *, kind: str = "", param: str | None = None) -> JsonReply:
    """The error object of the OpenAI routes, and of malformed bodies on the admin routes."""
    return JsonReply(openai_error_body(message, status_code, kind=kind, param=param), status_code)


def openai_error_body(message: str, status_code: int, *, kind: str = "", param: str | None = None) -> dict[str, Any]:
    """Its content, for use inside a stream."""
    kind = kind or {400: "BadRequestError", 503: "ServiceUnavailableError"}.get(status_code, "InternalServerError")
    return {"object": "error", "message": message, "type": kind, "param": param, "code": status_code}


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(content) + b"\n\n"


def cached_tokens(cached: CachedTokens) -> int:
    """Prompt tokens that were not computed."""
    return cached.device + cached.host + cached.storage


def cached_tokens_details(cached: CachedTokens, fetch: FetchDecision | None = None) -> dict[str, Any] | None:
    """The same by tier, and for whoever wants to know it what was decided about storage; None: nothing to tell."""
    if not cached_tokens(cached) and fetch is None:
        return None
    details: dict[str, Any] = {"device": cached.device, "host": cached.host}
    if cached.storage or cached.storage_backend:
        details["storage"] = cached.storage
    if cached.storage_backend:
        details["storage_backend"] = cached.storage_backend
    if fetch is not None:
        details["storage_decision"] = msgspec.structs.asdict(fetch)
    return details


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Value]) -> Value:
    """The result of `work`; when the client hangs up first, `work` is cancelled and `ClientDisconnect` raised."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _cancelled(task, watcher)


class EventStream(Response):
    """Server-sent events about a group of requests, which is left (and so aborted) when the client hangs up.

    Starlette's own streaming response notices a disconnect only at the next chunk under newer ASGI servers; a request
    that waits in a queue would keep its place there for a client that is long gone.
    """

    media_type = "text/event-stream"

    def __init__(self, group: RequestGroup, events: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        # A streamed body has no length that could be known now.
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]
        self._group = group
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._group:
            task = asyncio.ensure_future(self._pump(send))
            watcher = asyncio.ensure_future(_disconnected(receive))
            try:
                await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
                if task.done():
                    task.result()
            finally:
                await _cancelled(task, watcher)

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            # The client hung up between two chunks; the watcher sees it as well, whichever is first.
            return


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Cancel what still runs and wait until it has cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
