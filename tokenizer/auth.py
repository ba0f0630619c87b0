"""Who may call what: the auth matrix, and the middleware that asks it before any route runs.

The matrix (`verdict`) is pure.  `AuthMiddleware` sits outermost in the app, on the event loop; the level of a
path comes from the route table, and a path that no route knows needs the ordinary key, so that a stranger
cannot map the server by its 404s.  Keys are never logged and never echoed.
"""

from __future__ import annotations

import enum
import hmac
from collections.abc import Callable, Iterable

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class AuthLevel(enum.Enum):
    """How much a route asks of its caller."""

    NORMAL = "normal"
    #: The admin key when there is one, else the ordinary key when there is one, else nothing.
    ADMIN_OPTIONAL = "admin_optional"
    #: The admin key, and nobody when there is none.
    ADMIN_FORCE = "admin_force"


class Verdict(enum.Enum):
    """Answer of the matrix; the value is the HTTP status."""

    ALLOWED = 200
    UNAUTHORIZED = 401
    FORBIDDEN = 403


#: Probes of load balancers and monitors carry no key.  Exact paths: a prefix would also open /healthX and /metrics/../.
OPEN_PATHS = frozenset({"/health", "/health_generate", "/ready", "/metrics"})

_REFUSALS = {Verdict.UNAUTHORIZED: "Unauthorized", Verdict.FORBIDDEN: "Forbidden"}


def verdict(level: AuthLevel, token: bytes | None, api_key: bytes, admin_api_key: bytes) -> Verdict:
    """One cell of the matrix.  An empty key is a key that is not configured."""
    if level is AuthLevel.NORMAL:
        needed = api_key
    elif level is AuthLevel.ADMIN_FORCE and not admin_api_key:
        return Verdict.FORBIDDEN
    else:
        needed = admin_api_key or api_key
    if not needed:
        return Verdict.ALLOWED
    if token is not None and hmac.compare_digest(token, needed):
        return Verdict.ALLOWED
    return Verdict.UNAUTHORIZED


def bearer_token(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The token of `Authorization: Bearer <token>`; None when there is none that could be valid.

    Two such headers, or a byte outside ASCII, are nobody's honest client: no token.  Everything stays in bytes, since
    decoding a header that a stranger chose is what can fail.
    """
    values = [value for name, value in headers if name == b"authorization"]
    if len(values) != 1 or not values[0].isascii():
        return None
    scheme, _, token = values[0].partition(b" ")
    token = token.strip()
    return token if scheme.lower() == b"bearer" and token else None


class AuthMiddleware:
    """Asks the matrix about every HTTP request."""

    def __init__(
        self,
        app: ASGIApp,
        level_of: Callable[[Scope], AuthLevel],
        api_key: str,
        admin_api_key: str,
        refused: Callable[[Scope, str], None],
    ) -> None:
        self._app = app
        self._level_of = level_of
        #: Hears of everybody who is sent away.
        self._refused = refused
        self._api_key = api_key.encode()
        self._admin_api_key = admin_api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            answer = self._judge(scope)
            if answer is not Verdict.ALLOWED:
                self._refused(scope, f"{answer.value} {_REFUSALS[answer]}")
                refusal = JSONResponse({"error": _REFUSALS[answer]}, status_code=answer.value)
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _judge(self, scope: Scope) -> Verdict:
        if scope["method"] == "OPTIONS" or scope["path"] in OPEN_PATHS:
            return Verdict.ALLOWED
        return verdict(self._level_of(scope), bearer_token(scope["headers"]), self._api_key, self._admin_api_key)
