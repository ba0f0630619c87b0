"""What one client may make this process hold: the head of a request, its body, and the time both may take.

`BoundedProtocol` replaces uvicorn's own: that one keeps whatever a client calls headers, and waits for their end for
ever, both before any key has been asked for.  `BodyLimit` is a middleware inside the one that asks for the key, so
that no byte of a stranger's body is read at all.  Both belong to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sglang_hicache.tokenizer.replies import JsonReply

log = logging.getLogger(__name__)

#: Bytes of the request line and all headers together.  Others allow 8 to 64 KiB.
LARGEST_HEAD_BYTES = 64 * 1024

#: Seconds from the first byte of a request (or from the connection) to the end of its headers.
HEAD_TIMEOUT_S = 20.0

#: Seconds without one byte of a body that is still missing.
BODY_PAUSE_S = 30.0

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain\r\ncontent-length: 0\r\n"
    b"connection: close\r\n\r\n"
)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a bound on what is no body, and on how long a request's head may take."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        #: Bytes of the current request that are not body: head, chunk sizes, trailers.
        self._overhead_bytes = 0
        self._allowed_bytes = LARGEST_HEAD_BYTES
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_here()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._overhead_bytes += len(data)
        if self._patience is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()  # also for what is not the beginning of a request, like empty lines
        super().data_received(data)
        if self._overhead_bytes > self._allowed_bytes and not self.transport.is_closing():
            log.warning("closing a connection: more than %d bytes of headers", LARGEST_HEAD_BYTES)
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._head_is_here()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        # A body in chunks of few bytes has more overhead than body; no honest one has as much again as this.
        self._overhead_bytes -= len(body)
        self._allowed_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._overhead_bytes, self._allowed_bytes = 0, LARGEST_HEAD_BYTES
        super().on_message_complete()

    def _expect_head(self) -> None:
        self._head_is_here()
        self._patience = self.loop.call_later(HEAD_TIMEOUT_S, self._lose_patience)

    def _head_is_here(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _lose_patience(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class BodyRefused(Exception):
    """The body is too large, or does not come."""

    def __init__(self, message: str, status_code: int) -> None:
        super().__init__(message)
        self.status_code = status_code


class BodyLimit:
    """Refuses a body of more than so many bytes before it is held, and one that stops coming."""

    def __init__(self, app: ASGIApp, most_bytes: int, pause_s: float = BODY_PAUSE_S) -> None:
        self._app = app
        self._most_bytes = most_bytes
        self._pause_s = pause_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        left_bytes, is_missing = self._most_bytes, True

        async def receive_bounded() -> Message:
            nonlocal left_bytes, is_missing
            if not is_missing:  # whoever asks now waits for the client to hang up, however long that takes
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._pause_s)
            except TimeoutError:
                raise BodyRefused(f"the body has not come within {self._pause_s:g} s", 408) from None
            left_bytes -= len(message.get("body", b""))
            is_missing = message.get("more_body", False)
            if left_bytes < 0:
                raise self._too_large()
            return message

        try:
            if _declared_bytes(scope) > self._most_bytes:
                raise self._too_large()
            await self._app(scope, receive_bounded, send)
        except BodyRefused as error:
            reply = JsonReply({"error": {"message": str(error)}}, error.status_code)
            reply.headers["connection"] = "close"  # the rest of the body is not worth reading
            await reply(scope, receive, send)

    def _too_large(self) -> BodyRefused:
        return BodyRefused(f"the body is larger than {self._most_bytes} bytes (--max-body-bytes)", 413)


def _declared_bytes(scope: Scope) -> int:
    values = [value for name, value in scope["headers"] if name == b"content-length"]
    return max((int(value) for value in values if value.isdigit()), default=0)
