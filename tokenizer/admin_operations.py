"""/hicache/operations: what was asked of the server, how it went, and a way to give it up.

Handlers run on the event loop.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from sglang_hicache.tokenizer.admin import OPERATION_HEADER, STATUS, admin_gate
from sglang_hicache.tokenizer.control import NotCancellable
from sglang_hicache.tokenizer.manager import Unavailable
from sglang_hicache.tokenizer.operations import MOST_REMEMBERED, Operation, State
from sglang_hicache.tokenizer.replies import JsonReply
from sglang_hicache.tokenizer.services import Services


class OperationRoutes:
    """The operations of this server."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def operations(self, request: Request) -> Response:
        """GET /hicache/operations: the latest, newest first."""
        if refusal := admin_gate(self._services, request):
            return refusal
        return JsonReply({"operations": [each.told() for each in self._services.control.operations.latest()]})

    async def operation(self, request: Request) -> Response:
        """GET /hicache/operations/{id}."""
        if refusal := admin_gate(self._services, request):
            return refusal
        found = self._find(request)
        return found if isinstance(found, Response) else JsonReply(found.told())

    async def cancel(self, request: Request) -> Response:
        """DELETE /hicache/operations/{id}: give it up, as far as that does no harm."""
        if refusal := admin_gate(self._services, request, "cancel"):
            return refusal
        control = self._services.control
        caller = control.trail.caller(request.scope)
        target = self._find(request)
        if isinstance(target, Response):
            control.trail.refused(caller, "cancel", f"no operation {request.path_params['id'][:40]!r} is known here")
            return target
        try:
            self._services.lifecycle.check()
            cancel = await control.cancel(target, caller)
        except (NotCancellable, Unavailable) as error:
            control.trail.refused(caller, "cancel", str(error))
            return _error(str(error), 409 if isinstance(error, NotCancellable) else 503)
        content = {
            "cancelled": cancel.state is State.SUCCEEDED,
            "message": cancel.message,
            "operation_id": cancel.id,
            "target": target.told(),
        }
        reply = JsonReply(content, STATUS[cancel.state])
        reply.headers[OPERATION_HEADER] = cancel.id
        return reply

    def _find(self, request: Request) -> Operation | Response:
        operation_id = request.path_params["id"]
        found = self._services.control.operations.get(operation_id)
        if found is not None:
            return found
        words = f"no operation {operation_id[:40]!r} is known here; the latest {MOST_REMEMBERED} are"
        return _error(f"{words} (GET /hicache/operations)", 404)


def _error(message: str, status_code: int) -> Response:
    return JsonReply({"error": {"message": message}}, status_code)
