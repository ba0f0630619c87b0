"""The auth matrix, cell by cell, over HTTP; and what a stranger's header can and cannot do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from sglang_hicache.tokenizer.auth import AuthLevel, AuthMiddleware, Verdict, bearer_token, verdict
from tests.contract.fake_server import ADMIN_KEY, API_KEY, FakeServer

NO_KEYS: dict[str, str] = {"api_key": "", "admin_api_key": ""}
ONLY_API = NO_KEYS | {"api_key": API_KEY}
ONLY_ADMIN = NO_KEYS | {"admin_api_key": ADMIN_KEY}
BOTH = {"api_key": API_KEY, "admin_api_key": ADMIN_KEY}
TOKENS = (None, API_KEY, ADMIN_KEY)

#: Rows: level and configured keys; columns: no header, api key, admin key.
MATRIX = [
    (AuthLevel.NORMAL, NO_KEYS, (200, 200, 200)),
    (AuthLevel.NORMAL, ONLY_API, (401, 200, 401)),
    (AuthLevel.NORMAL, ONLY_ADMIN, (200, 200, 200)),
    (AuthLevel.NORMAL, BOTH, (401, 200, 401)),
    (AuthLevel.ADMIN_OPTIONAL, NO_KEYS, (200, 200, 200)),
    (AuthLevel.ADMIN_OPTIONAL, ONLY_API, (401, 200, 401)),
    (AuthLevel.ADMIN_OPTIONAL, ONLY_ADMIN, (401, 401, 200)),
    (AuthLevel.ADMIN_OPTIONAL, BOTH, (401, 401, 200)),
    (AuthLevel.ADMIN_FORCE, NO_KEYS, (403, 403, 403)),
    (AuthLevel.ADMIN_FORCE, ONLY_API, (403, 403, 403)),
    (AuthLevel.ADMIN_FORCE, ONLY_ADMIN, (401, 401, 200)),
    (AuthLevel.ADMIN_FORCE, BOTH, (401, 401, 200)),
]
CELLS = [
    (level, keys, token, status)
    for level, keys, statuses in MATRIX
    for token, status in zip(TOKENS, statuses, strict=True)
]
#: A route of each level that answers 200 on a fresh server.
ROUTES = {AuthLevel.NORMAL: ("GET", "/v1/models"), AuthLevel.ADMIN_OPTIONAL: ("POST", "/flush_cache")}


def bearer(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize(("level", "keys", "token", "status"), CELLS)
def test_matrix(level: AuthLevel, keys: dict[str, str], token: str | None, status: int) -> None:
    answer = verdict(level, token.encode() if token else None, keys["api_key"].encode(), keys["admin_api_key"].encode())
    assert answer is Verdict(status)


@pytest.mark.parametrize(("level", "keys", "token", "status"), [cell for cell in CELLS if cell[0] in ROUTES])
def test_matrix_over_http(
    serve: Callable[..., FakeServer], level: AuthLevel, keys: dict[str, str], token: str | None, status: int
) -> None:
    server = serve(**keys)
    method, path = ROUTES[level]
    reply = server.call(method, path, headers=bearer(token))
    assert reply.status_code == status
    if status != 200:
        assert reply.json() == {"error": "Unauthorized"}


def test_forbidden_has_its_own_body(serve: Callable[..., FakeServer]) -> None:
    """No route forces the admin key yet, so the middleware is asked directly."""
    server = serve()
    messages: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("nobody may read the body of a refused request")

    async def send(message: Any) -> None:
        messages.append(message)

    middleware = AuthMiddleware(lambda *_: None, lambda scope: AuthLevel.ADMIN_FORCE, "", "", lambda *_: None)
    scope = {"type": "http", "method": "GET", "path": "/x", "headers": []}
    server.run(middleware(scope, receive, send))
    assert messages[0]["status"] == 403
    assert messages[1]["body"] == b'{"error":"Forbidden"}'


@pytest.mark.parametrize(
    ("headers", "token"),
    [
        ([], None),
        ([(b"authorization", b"Bearer key")], b"key"),
        ([(b"authorization", b"bEARER   key ")], b"key"),
        ([(b"authorization", b"Bearer")], None),
        ([(b"authorization", b"Bearer ")], None),
        ([(b"authorization", b"Basic key")], None),
        ([(b"authorization", b"key")], None),
        ([(b"authorization", "Bearer ké".encode())], None),
        ([(b"authorization", b"Bearer \xff\xfe")], None),
        ([(b"authorization", b"Bearer key"), (b"authorization", b"Bearer key")], None),
        ([(b"x-authorization", b"Bearer key")], None),
    ],
)
def test_token_of_headers(headers: list[tuple[bytes, bytes]], token: bytes | None) -> None:
    assert bearer_token(headers) == token


@pytest.mark.parametrize("value", ["Bearer schlüssel".encode(), "Bearer schlüssel".encode("latin-1"), b"\xff"])
def test_non_ascii_header_is_401(serve: Callable[..., FakeServer], value: bytes) -> None:
    server = serve(**BOTH)
    for method, path in (("GET", "/v1/models"), ("PUT", "/hicache/storage-backend")):
        assert server.call(method, path, headers={b"Authorization": value}).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/health_generate", "/ready"])
def test_probes_need_no_key(serve: Callable[..., FakeServer], path: str) -> None:
    assert serve(**BOTH).call("GET", path).status_code == 200


@pytest.mark.parametrize("path", ["/healthX", "/health/x", "/ready2", "/metricsX", "/health_generate/", "/nowhere"])
def test_a_path_that_only_begins_like_a_probe_needs_the_key(serve: Callable[..., FakeServer], path: str) -> None:
    server = serve(**BOTH)
    assert server.call("GET", path).status_code == 401
    assert server.call("GET", path, headers=bearer(API_KEY)).status_code in (404, 307)


def test_options_is_always_let_through(serve: Callable[..., FakeServer]) -> None:
    server = serve(**BOTH)
    assert server.call("OPTIONS", "/hicache/storage-backend").status_code == 405
    assert server.call("OPTIONS", "/generate").status_code == 405


def test_wrong_method_keeps_the_level_of_the_path(serve: Callable[..., FakeServer]) -> None:
    server = serve(**ONLY_ADMIN)
    assert server.call("PATCH", "/hicache/storage-backend").status_code == 401
    assert server.call("PATCH", "/generate").status_code == 405


def test_a_refused_request_reaches_no_rank(serve: Callable[..., FakeServer]) -> None:
    server = serve(**BOTH)
    server.call("PUT", "/hicache/storage-backend", json={"hicache_storage_backend": "file"})
    server.call("POST", "/generate", json={"text": "a"})
    assert server.sent == []


def test_an_unforeseen_error_tells_nothing_of_the_inside(serve: Callable[..., FakeServer]) -> None:
    server = serve()

    async def broken(request: Request) -> Response:
        raise RuntimeError(f"the key is {ADMIN_KEY}")

    server.app.add_route("/broken", broken)

    async def scenario() -> httpx.Response:
        transport = httpx.ASGITransport(server.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/broken")

    reply = server.run(scenario())
    assert reply.status_code == 500
    assert "internal error" in reply.text and ADMIN_KEY not in reply.text
