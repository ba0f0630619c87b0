"""Health, readiness, and what the server tells about itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from sglang_hicache import wire
from sglang_hicache.heartbeat import ServerState
from sglang_hicache.storage import registry
from sglang_hicache.storage.settings import FileSettings, PrefetchSettings
from sglang_hicache.tokenizer.http import HEALTH_GENERATION_ENV, HEALTH_TIMEOUT_ENV
from sglang_hicache.tokenizer.services import Phase
from tests.contract.fake_server import ADMIN_KEY, API_KEY, FakeServer, make_config

PROBES = ["/health", "/health_generate", "/ready", "/ping"]


@pytest.mark.parametrize("path", PROBES)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_up(server: FakeServer, path: str, method: str) -> None:
    assert server.call(method, path).status_code == 200


@pytest.mark.parametrize("path", PROBES)
@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.DRAINING])
def test_not_ready_while_starting_and_stopping(server: FakeServer, path: str, phase: Phase) -> None:
    server.lifecycle.phase = phase
    reply = server.call("GET", path)
    assert reply.status_code == 503
    assert phase.value in reply.text


@pytest.mark.parametrize("path", PROBES)
@pytest.mark.parametrize("state", [ServerState.FAILING, ServerState.DRAINING])
def test_not_ready_when_the_launcher_says_so(server: FakeServer, path: str, state: ServerState) -> None:
    server.state = state
    assert server.call("GET", path).status_code == 503


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.DRAINING])
def test_requests_are_refused_while_not_ready(server: FakeServer, phase: Phase) -> None:
    server.lifecycle.phase = phase
    assert server.call("POST", "/generate", json={"text": "a"}).status_code == 503
    assert server.call("POST", "/v1/completions", json={"prompt": "a"}).status_code == 503
    assert server.sent == []


def test_probe_is_one_token_with_a_marked_id(server: FakeServer) -> None:
    assert server.call("GET", "/health").status_code == 200
    [probe] = server.commands(wire.NewRequest)
    assert probe.rid.startswith("HEALTH_CHECK_")
    assert probe.sampling.max_new_tokens == 1
    assert server.requests.in_flight == 0


def test_anything_from_the_scheduler_is_health(server: FakeServer) -> None:
    """A busy scheduler drops the probe; its other output shows that it lives."""
    server.generate = lambda request: None

    async def scenario() -> int:
        health = asyncio.ensure_future(server.request("GET", "/health"))
        while not server.sent:
            await asyncio.sleep(0)
        server.output()
        return (await health).status_code

    assert server.run(asyncio.wait_for(scenario(), 60)) == 200


def test_news_of_a_failure_is_no_health(server: FakeServer) -> None:
    """1. A rank hangs; a probe waits. 2. The launcher notices, and the ranks send their last words. 3. The probe took
    them for a sign of life, and the load balancer kept the server."""
    server.generate = lambda request: None

    async def scenario() -> int:
        health = asyncio.ensure_future(server.request("GET", "/health"))
        while not server.sent:
            await asyncio.sleep(0)
        server.state = ServerState.FAILING
        server.output()
        return (await health).status_code

    assert server.run(asyncio.wait_for(scenario(), 60)) == 503


def test_silent_scheduler_is_503_and_recovers(
    monkeypatch: pytest.MonkeyPatch, serve: Callable[..., FakeServer]
) -> None:
    monkeypatch.setenv(HEALTH_TIMEOUT_ENV, "0.5")
    server = serve()
    generate, server.generate = server.generate, lambda request: None
    assert server.call("GET", "/health").status_code == 503
    assert len(server.commands(wire.AbortRequest)) == 1
    server.generate = generate
    assert server.call("GET", "/health").status_code == 200


def test_probes_at_once_share_one_request(monkeypatch: pytest.MonkeyPatch, serve: Callable[..., FakeServer]) -> None:
    monkeypatch.setenv(HEALTH_TIMEOUT_ENV, "0.5")
    server = serve()
    server.generate = lambda request: None

    async def scenario() -> list[Any]:
        return await asyncio.gather(*(server.request("GET", "/health") for _ in range(5)))

    assert {reply.status_code for reply in server.run(scenario())} == {503}
    assert len(server.commands(wire.NewRequest)) == 1


def test_health_without_generation(monkeypatch: pytest.MonkeyPatch, serve: Callable[..., FakeServer]) -> None:
    monkeypatch.setenv(HEALTH_GENERATION_ENV, "false")
    server = serve()
    assert server.call("GET", "/health").status_code == 200
    assert server.sent == []
    assert server.call("GET", "/health_generate").status_code == 200
    assert len(server.sent) == 1


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info(server: FakeServer, path: str) -> None:
    server.answer_status = lambda rank: {"state": "attached", "epoch": 2, "backend": "file"}
    info = server.call("GET", path).json()
    assert info["served_model_name"] == "org/tiny"
    assert info["max_total_num_tokens"] == 4096
    assert info["max_req_input_len"] == 511
    assert info["frontend"] == "python"
    assert info["version"]
    assert info["hicache_storage_backend"] is None, "the top level tells what the server was started with"
    [live] = info["internal_states"]
    assert live["hicache_storage_backend"] == "file"
    assert live["world_size"] == 2


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info(server: FakeServer, path: str) -> None:
    info = server.call("GET", path).json()
    assert info["is_generation"] is True
    assert info["model_type"] == "llama"
    assert info["architectures"] == ["LlamaForCausalLM"]
    assert info["weight_version"] == "default"


def test_fm60_no_secret_in_any_answer_or_log(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 60: an admin key was exposed by a status route.  Every GET route, an attach, and the log of all of it."""
    caplog.set_level(logging.DEBUG)
    # Secrets in more places than any backend of today takes them: the routes must be ready for one that does.
    monkeypatch.setattr(registry, "validate_extra_config", lambda name, text: (PrefetchSettings(), FileSettings()))
    secrets = [ADMIN_KEY, API_KEY, "hunter2", "AKIA-nested", "s3cr3t"]
    extra = (
        '{"password": "hunter2", "deep": [{"access_key": "AKIA-nested"}], "url": "redis://joe:s3cr3t@host/0",'
        ' "secretKey": "hunter2", "authToken": ["hunter2"], "apikey": "hunter2"}'
    )
    config = make_config(model, api_key=API_KEY)
    server = FakeServer(structs.replace(config, storage=structs.replace(config.storage, extra_config_json=extra)))
    server.answer_status = lambda rank: {
        "state": "attached",
        "epoch": 1,
        "backend": "file",
        "extra_config_json": extra,
        "last_error": "cannot log in with hunter2 at redis://joe:s3cr3t@host/0",
        "backend_info": {"url": "redis://joe:s3cr3t@host/0"},
    }
    user, admin = ({"Authorization": f"Bearer {key}"} for key in (API_KEY, ADMIN_KEY))
    told = []
    try:
        document = server.call("GET", "/openapi.json", headers=user).json()
        paths = [path for path, operations in document["paths"].items() if "get" in operations and "{" not in path]
        for path in paths:
            told += [server.call("GET", path, headers=headers).text for headers in (user, admin)]
        server.answer_command = lambda rank, command: (False, "no login with hunter2")
        for text in (extra, extra[:-1]):
            body = {"hicache_storage_backend": "file", "hicache_storage_backend_extra_config_json": text}
            reply = server.call("PUT", "/hicache/storage-backend", json=body, headers=admin)
            assert reply.status_code == 400
            told.append(reply.text)
    finally:
        server.close()
    assert len(paths) >= 12
    assert "no login with ***" in told[-2]
    for text in [*told, caplog.text]:
        for secret in secrets:
            assert secret not in text
