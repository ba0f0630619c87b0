"""The HiCache routes that change something: attach, switch, dry run, detach, clear, flush.

Handlers run on the event loop.  They check who may call (beyond the auth matrix), turn a body into a command
(`orders.py`), have it carried out (`control.py`), and wrap the merged answer of the ranks in the words that existing
clients look for.
"""

from __future__ import annotations

import asyncio
import logging
import math

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sglang_hicache.errors import UserError
from sglang_hicache.tokenizer.api import AttachBody, MalformedBody, decode_body
from sglang_hicache.tokenizer.control import Control
from sglang_hicache.tokenizer.http_limits import BodyRefused
from sglang_hicache.tokenizer.manager import Unavailable
from sglang_hicache.tokenizer.operations import Operation, State, told_report
from sglang_hicache.tokenizer.orders import attach_order, detach_body, detach_order, flag
from sglang_hicache.tokenizer.ranks_desk import Order, new_id
from sglang_hicache.tokenizer.replies import JsonReply, openai_error, text_reply
from sglang_hicache.tokenizer.services import Services
from sglang_hicache.wire import ClearStorage, DryRunStorage, FlushCache

log = logging.getLogger(__name__)


#: A flush takes effect in the next tick, but the tick under way may hold a long prefill.
FLUSH_DEADLINE_S = 10.0

#: Longest wait for idle that /flush_cache accepts.
LONGEST_FLUSH_WAIT_S = 3600.0

#: Names the operation in every answer to a command.
OPERATION_HEADER = "X-HiCache-Operation"

NEEDS_ADMIN_KEY = "This route needs an admin key, and the server has none; restart it with --admin-api-key."
NOT_ENABLED = "Hierarchical cache is not enabled; restart the server with --enable-hierarchical-cache."

#: HTTP status of each way an operation can end.  Unknown is neither success nor failure: a client must not retry
#: blindly.
STATUS = {State.SUCCEEDED: 200, State.FAILED: 400, State.CANCELLED: 400, State.UNKNOWN: 504}

ATTACH_FAILED = "Failed to attach HiCache storage backend."
DETACH_FAILED = "Failed to detach HiCache storage backend."
CLEAR_FAILED = "Failed to clear the hierarchical cache storage backend."


class AdminRoutes:
    """/hicache/storage-backend and its neighbours."""

    def __init__(self, services: Services) -> None:
        self._services = services

    @property
    def _control(self) -> Control:
        return self._services.control

    async def attach(self, request: Request) -> Response:
        """PUT /hicache/storage-backend: attach, switch, or try out."""
        if refusal := admin_gate(self._services, request, "attach"):
            return refusal
        try:
            body = decode_body(await request.body(), AttachBody)
            self._check_enabled()
            # It reads the file that the config names, which may lie on a disk that does not answer.
            order = await asyncio.to_thread(attach_order, body, self._services.config.storage)
            self._services.lifecycle.check()
        except (UserError, Unavailable, ClientDisconnect, BodyRefused) as error:
            return self._refused(request, "attach", error, ATTACH_FAILED)
        if body.is_async:
            return self._accepted(request, order)
        if isinstance(order, DryRunStorage):
            return _found_out(await self._run(request, order))
        return _words(await self._run(request, order), "HiCache storage backend attached.", ATTACH_FAILED)

    async def detach(self, request: Request) -> Response:
        """DELETE /hicache/storage-backend."""
        if refusal := admin_gate(self._services, request, "detach"):
            return refusal
        try:
            body = detach_body(request.query_params, await request.body())
            self._check_enabled()
            order = detach_order(body, self._services.config.storage)
        except (UserError, Unavailable, ClientDisconnect, BodyRefused) as error:
            return self._refused(request, "detach", error, DETACH_FAILED)
        if body.is_async:
            return self._accepted(request, order)
        return _words(await self._run(request, order), "HiCache storage backend detached.", DETACH_FAILED)

    async def clear(self, request: Request) -> Response:
        """POST /hicache/storage-backend/clear.  The reply of a failure says so, unlike the reference's."""
        try:
            self._check_enabled()
        except (UserError, Unavailable) as error:
            return self._refused(request, "clear", error, CLEAR_FAILED)
        order = ClearStorage(id=new_id(), deadline_s=self._services.config.storage.drain_timeout_s)
        operation = await self._run(request, order)
        if operation.state is State.SUCCEEDED:
            return _of(operation, text_reply("Hierarchical cache storage backend cleared."))
        return _words(operation, "", CLEAR_FAILED)

    async def flush_cache(self, request: Request) -> Response:
        """GET or POST /flush_cache?timeout=<seconds to wait for idle>&keep_storage=<true or false>."""
        try:
            self._services.lifecycle.check()
            timeout_s = _flush_timeout(request.query_params.get("timeout", "0"))
            keep_storage = flag("keep_storage", request.query_params.get("keep_storage", "true"))
        except (UserError, Unavailable) as error:
            return self._refused(request, "flush", error, "")
        clear_s = 0.0 if keep_storage else self._services.config.storage.drain_timeout_s
        deadline_s = timeout_s + FLUSH_DEADLINE_S + clear_s
        order = FlushCache(id=new_id(), deadline_s=deadline_s, timeout_s=timeout_s, keep_storage=keep_storage)
        failure = "Failed to flush the cache." if keep_storage else "Failed to flush the cache and clear the storage."
        return _words(await self._run(request, order), "Cache flushed.", failure)

    def _check_enabled(self) -> None:
        self._services.lifecycle.check()
        if not self._services.config.cache.hierarchical:
            raise UserError(NOT_ENABLED)

    def _refused(self, request: Request, change: str, error: Exception, failure: str) -> Response:
        """What never became a command.  Of a body that cannot be decoded existing clients expect the OpenAI form."""
        trail = self._control.trail
        trail.refused(trail.caller(request.scope), change, str(error) or "the client hung up")
        match error:
            case ClientDisconnect():
                return Response(status_code=400)
            case BodyRefused():
                raise error
            case MalformedBody():
                return openai_error(str(error), 400, kind="Bad Request")
        status_code = 503 if isinstance(error, Unavailable) else 400
        return text_reply(f"{failure}\n{error}" if failure else str(error), status_code)

    async def _run(self, request: Request, order: Order) -> Operation:
        return await self._control.run(order, self._control.trail.caller(request.scope))

    def _accepted(self, request: Request, order: Order) -> Response:
        """The form for callers who do not wait."""
        operation = self._control.begin(order, self._control.trail.caller(request.scope))
        url = f"/hicache/operations/{operation.id}"
        reply = JsonReply({"operation_id": operation.id, "status_url": url}, 202)
        reply.headers["Location"] = url
        return _of(operation, reply)


def admin_gate(services: Services, request: Request, change: str = "") -> Response | None:
    """Beyond the matrix: without an admin key these routes are closed, not open to everybody."""
    if services.config.http.admin_api_key:
        return None
    if change:
        trail = services.control.trail
        trail.refused(trail.caller(request.scope), change, NEEDS_ADMIN_KEY)
    return JsonReply({"error": NEEDS_ADMIN_KEY}, 400)


def _words(operation: Operation, success: str, failure: str) -> Response:
    """Plain text: our line, then what the ranks said."""
    line = success if operation.state is State.SUCCEEDED else failure
    text = line if operation.message in ("", line) else f"{line}\n{operation.message}"
    log.info("%s", text.replace("\n", " "), extra={"command": operation.id})
    return _of(operation, text_reply(text, STATUS[operation.state]))


def _found_out(operation: Operation) -> Response:
    """The report of a dry run."""
    ok = operation.state is State.SUCCEEDED
    answers = [operation.answers[rank] for rank in sorted(operation.answers)]
    reports = [told_report(each.rank, each.report, each.success) for each in answers if each.report is not None]
    content = {"ok": ok, "backend": operation.backend, "message": operation.message, "ranks": reports}
    return _of(operation, JsonReply(content, STATUS[operation.state]))


def _of(operation: Operation, reply: Response) -> Response:
    reply.headers[OPERATION_HEADER] = operation.id
    return reply


def _flush_timeout(text: str) -> float:
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = math.nan
    if not 0 <= timeout_s <= LONGEST_FLUSH_WAIT_S:
        raise UserError(f"timeout is {text!r}; it must be a number of seconds from 0 to {LONGEST_FLUSH_WAIT_S:g}")
    return timeout_s
