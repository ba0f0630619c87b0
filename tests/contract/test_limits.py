"""What one client may ask of the server, and make it hold: bodies, heads, lists, names and numbers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from sglang_hicache.tokenizer import http_limits
from sglang_hicache.tokenizer.http_limits import LARGEST_HEAD_BYTES, BodyLimit, BoundedProtocol
from sglang_hicache.tokenizer.intake import LONGEST_NAME, MOST_PROMPTS, MOST_STOP_CHARACTERS
from tests.contract.fake_server import FakeServer, make_config

#: Far beyond what any of these tests needs.
PATIENCE_S = 60


def generate(server: FakeServer, **fields: Any) -> Any:
    return server.call("POST", "/generate", json={"text": "abc", "sampling_params": {"max_new_tokens": 1}} | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"priority": 1 << 63},
        {"priority": -(1 << 63) - 1},
        {"rid": "r" * (LONGEST_NAME + 1)},
        {"extra_key": "k" * (LONGEST_NAME + 1)},
        {"cache_salt": "s" * (LONGEST_NAME + 1)},
        {"text": ["x"] * (MOST_PROMPTS + 1)},
        {"text": "x" * 2_000_000},
        {"sampling_params": {"stop": ["s" * MOST_STOP_CHARACTERS, "t"]}},
    ],
)
def test_what_is_too_much_is_a_mistake_that_is_named(server: FakeServer, fields: dict[str, Any]) -> None:
    reply = generate(server, **fields)
    assert reply.status_code == 400, reply.text
    assert "error" in reply.json() and len(reply.text) < 500
    assert not server.sent


def test_the_same_limits_hold_for_openai(server: FakeServer) -> None:
    for fields in ({"priority": 1 << 63}, {"rid": "r" * 2000}, {"prompt": "x" * 2_000_000}, {"stop": "s" * 5000}):
        reply = server.call("POST", "/v1/completions", json={"prompt": "abc", "max_tokens": 1} | fields)
        assert reply.status_code == 400, reply.text


def test_what_just_fits_is_taken(server: FakeServer) -> None:
    fields = {"priority": -(1 << 63), "rid": "r" * LONGEST_NAME, "extra_key": "\x00\n", "cache_salt": "\U0001f600"}
    sampling = {"max_new_tokens": 1, "stop": ["s" * MOST_STOP_CHARACTERS], "stop_token_ids": [5, 5, 7] * 1000}
    assert generate(server, **fields, sampling_params=sampling).status_code == 200
    assert server.sent[0][1].sampling.stop_token_ids == (5, 7)


def test_a_large_body_is_refused_declared_or_not(model: Path) -> None:
    server = FakeServer(make_config(model, max_body_bytes=1000))
    body = json.dumps({"text": "a", "sampling_params": {"max_new_tokens": 1}, "custom_labels": "x" * 2000}).encode()

    async def chunks() -> Any:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    try:
        for content in (body, chunks()):
            reply = server.call("POST", "/generate", content=content)
            assert reply.status_code == 413 and "1000" in reply.text
            assert reply.headers["connection"] == "close"
        assert generate(server).status_code == 200
    finally:
        server.close()


def test_a_strangers_body_is_not_read(model: Path) -> None:
    server = FakeServer(make_config(model, api_key="k", max_body_bytes=10))
    try:
        assert server.call("POST", "/generate", content=b"x" * 100).status_code == 401
    finally:
        server.close()


def test_a_body_that_stops_coming_is_given_up() -> None:
    async def never() -> Any:
        await asyncio.get_running_loop().create_future()

    async def reads(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    async def run() -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await BodyLimit(reads, 100, pause_s=0.01)({"type": "http", "headers": []}, never, send)
        return sent

    assert asyncio.run(run())[0]["status"] == 408


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def _talk(*pieces: bytes, timeout_s: float = PATIENCE_S) -> bytes:
    """What a server with our protocol answers to these bytes until it closes the connection."""

    async def run() -> bytes:
        config = uvicorn.Config(_answer, http=BoundedProtocol, lifespan="off", log_config=None)
        config.load()
        state = uvicorn.server.ServerState()
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(lambda: BoundedProtocol(config, state, {}), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            return await asyncio.wait_for(reader.read(), timeout_s)
        except ConnectionError:
            return b"reset"
        finally:
            writer.transport.abort()
            listener.close()

    return asyncio.run(run())


HEAD = b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
FLOOD = b"x" * (LARGEST_HEAD_BYTES + 1)


@pytest.mark.parametrize(
    "pieces",
    [
        (HEAD, b"a: " + FLOOD),
        (HEAD, b"a: b\r\n" * (LARGEST_HEAD_BYTES // 4)),
        (b"GET /" + FLOOD,),
        (b"\r\n" * LARGEST_HEAD_BYTES,),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n1;" + FLOOD,),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * (LARGEST_HEAD_BYTES // 4)),
    ],
)
def test_a_flood_of_what_is_no_body_ends_the_connection(pieces: tuple[bytes, ...]) -> None:
    answer = _talk(*pieces)
    assert b"200 OK" not in answer


def test_large_bodies_and_small_chunks_pass() -> None:
    body = b"y" * 1_000_000
    assert b"200 OK" in _talk(HEAD + b"content-length: 1000000\r\n\r\n", body)
    chunks = b"64\r\n" + b"y" * 100 + b"\r\n"
    assert b"200 OK" in _talk(HEAD + b"transfer-encoding: chunked\r\n\r\n", chunks * 20_000, b"0\r\n\r\n")


@pytest.mark.parametrize("pieces", [(), (b"GET / HT",), (HEAD,), (b"\r\n",)])
def test_a_head_that_does_not_come_ends_the_connection(monkeypatch: pytest.MonkeyPatch, pieces: Any) -> None:
    monkeypatch.setattr(http_limits, "HEAD_TIMEOUT_S", 0.05)
    assert _talk(*pieces) == b""
