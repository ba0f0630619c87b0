"""A client that hangs up, asks twice, or aborts: its request ends, and the scheduler hears of it.

httpx never hangs up halfway, so these tests speak ASGI themselves.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from sglang_hicache import wire
from tests.contract.fake_server import FakeServer


class Client:
    """One HTTP request, spoken by hand."""

    def __init__(self, server: FakeServer, path: str, body: dict[str, Any]) -> None:
        self.hung_up = asyncio.Event()
        self.first_chunk = asyncio.Event()
        self.messages: list[Any] = []
        self._body: bytes | None = json.dumps(body).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
            "root_path": "",
        }
        self.task = asyncio.ensure_future(server.app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.hung_up.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.messages.append(message)
        if message["type"] == "http.response.body":
            self.first_chunk.set()


async def until(server: FakeServer, kind: type) -> Any:
    """The first message of a kind that the leader got."""
    while not server.commands(kind):
        await asyncio.sleep(0)
    return server.commands(kind)[0]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a"}),
        ("/generate", {"text": "a", "stream": True}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/completions", {"prompt": "a", "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True}),
    ],
)
def test_hanging_up_aborts_a_request_that_waits(server: FakeServer, path: str, body: dict[str, Any]) -> None:
    server.generate = lambda request: None

    async def scenario() -> None:
        client = Client(server, path, body)
        request = await until(server, wire.NewRequest)
        client.hung_up.set()
        await client.task
        assert server.commands(wire.AbortRequest) == [wire.AbortRequest(rid=request.rid)]
        assert server.requests.in_flight == 0

    server.run(asyncio.wait_for(scenario(), 60))


def test_hanging_up_in_the_middle_of_a_stream_aborts(server: FakeServer) -> None:
    server.generate = lambda request: [wire.RequestOutput(rid=request.rid, token_ids=(65,))]

    async def scenario() -> None:
        client = Client(server, "/generate", {"text": ["a", "b"], "stream": True})
        await client.first_chunk.wait()
        client.hung_up.set()
        await client.task
        assert len(server.commands(wire.AbortRequest)) == 2
        assert server.requests.in_flight == 0

    server.run(asyncio.wait_for(scenario(), 60))


def test_a_finished_request_is_not_aborted(server: FakeServer) -> None:
    server.call("POST", "/generate", json={"text": "abc", "stream": True})
    server.call("POST", "/generate", json={"text": "abc"})
    assert server.commands(wire.AbortRequest) == []


def test_rid_in_flight_is_refused_and_free_again_afterwards(server: FakeServer) -> None:
    server.generate = lambda request: None

    async def scenario() -> None:
        client = Client(server, "/generate", {"text": "a", "rid": "mine"})
        first = await until(server, wire.NewRequest)
        reply = await server.request("POST", "/generate", json={"text": "b", "rid": "mine"})
        assert reply.status_code == 400
        assert "'mine'" in reply.json()["error"]["message"]
        client.hung_up.set()
        await client.task
        # The id is free at once, and what the aborted request still says does not reach its successor.
        second = Client(server, "/generate", {"text": "b", "rid": "mine"})
        while len(server.commands(wire.NewRequest)) < 2:
            await asyncio.sleep(0)
        again = server.commands(wire.NewRequest)[1]
        assert again.rid != first.rid
        server.output(wire.RequestOutput(rid=first.rid, token_ids=(65,), finish=wire.FinishReason(type="stop")))
        assert server.requests.in_flight == 1
        server.output(wire.RequestOutput(rid=again.rid, token_ids=(66,), finish=wire.FinishReason(type="stop")))
        await second.task
        answer = json.loads(second.messages[-1]["body"])
        assert answer["output_ids"] == [66]
        assert answer["meta_info"]["id"] == "mine"

    server.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize("body", [{"rid": "mine"}, {"abort_all": True}])
def test_abort_request_ends_it_with_what_there_is(server: FakeServer, body: dict[str, Any]) -> None:
    server.generate = lambda request: [wire.RequestOutput(rid=request.rid, token_ids=(65,))]
    admin = {"Authorization": "Bearer the-admin-key"}

    async def scenario() -> None:
        client = Client(server, "/generate", {"text": "a", "rid": "mine"})
        await until(server, wire.NewRequest)
        reply = await server.request("POST", "/abort_request", json=body, headers=admin)
        assert reply.status_code == 200
        await client.task
        answer = json.loads(client.messages[-1]["body"])
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        assert len(server.commands(wire.AbortRequest)) == 1

    server.run(asyncio.wait_for(scenario(), 60))


def test_abort_request_of_an_unknown_id_is_harmless(server: FakeServer) -> None:
    admin = {"Authorization": "Bearer the-admin-key"}
    assert server.call("POST", "/abort_request", json={"rid": "nobody"}, headers=admin).status_code == 200
    assert server.call("POST", "/abort_request", json={}, headers=admin).status_code == 400
    assert server.commands(wire.AbortRequest) == []
