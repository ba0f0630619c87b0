"""POST /update_weights_from_disk over HTTP: what is refused before a rank hears of it, and how its end is told."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache import wire
from sglang_hicache.host_memory import HostMemory
from sglang_hicache.tokenizer import weights
from sglang_hicache.tokenizer.services import Phase
from sglang_hicache.weights_digest import weights_digest
from tests.contract.fake_server import ADMIN, FakeServer

PATH = "/update_weights_from_disk"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 257, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder that fits the fake server's model, as far as its config.json says."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(b"other weights")
    return folder


def post(server: FakeServer, **body: Any) -> Any:
    return server.call("POST", PATH, json=body, headers=ADMIN)


def refused(server: FakeServer, **body: Any) -> str:
    """The message of a refusal that reached no rank."""
    reply = post(server, **body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["success"] is False and reply.json()["num_paused_requests"] == 0
    assert not server.commands(wire.UpdateWeights)
    return reply.json()["message"]


def test_the_ranks_get_directory_digest_and_version(server: FakeServer, checkpoint: Path, tmp_path: Path) -> None:
    reply = post(server, model_path=str(checkpoint), weight_version="v2", abort_all_requests=True, token_step=7)
    assert reply.status_code == 200
    assert reply.json() == {"success": True, "message": "done", "num_paused_requests": 0}
    assert [rank for rank, _ in server.sent] == [1, 0]
    command = server.commands(wire.UpdateWeights)[0]
    assert command.model_path == str(checkpoint) and command.weight_version == "v2" and command.aborts_requests
    assert command.weights_digest == weights_digest(str(checkpoint), str(tmp_path / "no-cache"))
    assert command.deadline_s == server.config.scheduler.weights_update_timeout_s


def test_what_the_ranks_say_is_told(server: FakeServer, checkpoint: Path) -> None:
    server.answer_command = lambda rank, command: (False, "The weights were not updated: rank 1: out of memory")
    reply = post(server, model_path=str(checkpoint))
    assert reply.status_code == 400
    assert reply.json()["message"] == "The weights were not updated: rank 1: out of memory"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 3), ("num_key_value_heads", 4), ("hidden_size", 128), ("vocab_size", 300),
        ("architectures", ["Qwen2ForCausalLM"]), ("torch_dtype", "float16"), ("eos_token_id", 5),
    ],
)  # fmt: skip
def test_another_shape_is_named(server: FakeServer, checkpoint: Path, field: str, value: Any) -> None:
    server.codec.model_config.update(CONFIG, torch_dtype="float32")
    (checkpoint / "config.json").write_text(json.dumps(CONFIG | {field: value}))
    message = refused(server, model_path=str(checkpoint))
    assert f"{field} is {json.dumps([value] if field == 'eos_token_id' else value)}, not " in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flush_cache", False), ("load_format", "gguf"), ("is_async", True), ("keep_pause", True),
        ("recapture_cuda_graph", True), ("manifest", {"a": 1}), ("weight_version", ""), ("weight_version", "v" * 2000),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_refused_by_name(server: FakeServer, checkpoint: Path, name: str, value: Any) -> None:
    assert name in refused(server, model_path=str(checkpoint), **{name: value})


@pytest.mark.parametrize("value", [None, "auto", "safetensors"])
def test_formats_that_are_safetensors(server: FakeServer, checkpoint: Path, value: str | None) -> None:
    assert post(server, model_path=str(checkpoint), load_format=value, torch_empty_cache=True).status_code == 200


def test_a_url_is_refused_and_not_repeated(server: FakeServer) -> None:
    """It may hold a password, and the reply goes to whoever asked."""
    message = refused(server, model_path="redis://:secret@host/model")
    assert "takes no URL" in message and "secret" not in message


def test_a_path_that_is_no_model(server: FakeServer, tmp_path: Path) -> None:
    assert "nowhere" in refused(server, model_path="/nowhere/at/all")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(server, model_path=str(tmp_path / "empty"))


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, json.dumps(CONFIG | {"eos_token_id": "5"}), json.dumps(CONFIG | {"eos_token_id": {"a": 1}}),
     json.dumps(CONFIG | {"eos_token_id": [[1]]}), " " * (5 << 20) + "{}", "{" + "9" * 5000, "[]"],
)  # fmt: skip
def test_a_config_that_nobody_should_have_written(server: FakeServer, checkpoint: Path, content: str) -> None:
    (checkpoint / "config.json").write_text(content)
    message = refused(server, model_path=str(checkpoint))
    assert "config.json" in message and len(message) < 1000


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
def test_what_is_no_file_holds_no_thread(server: FakeServer, checkpoint: Path, name: str, target: str) -> None:
    """Each request would keep a thread for ever, and its memory would grow for as long."""
    (checkpoint / name).unlink(missing_ok=True)
    if target == "pipe":
        os.mkfifo(checkpoint / name)
    else:
        (checkpoint / name).symlink_to(target)
    assert name in refused(server, model_path=str(checkpoint))


def test_the_next_update_waits_for_nobody(
    server: FakeServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred at once would read a hundred models at once, and leave no helper thread to anybody else."""
    begun, go_on = threading.Event(), threading.Event()
    real = weights.weights_digest

    def slow(*args: Any) -> str:
        begun.set()
        assert go_on.wait(60.0)
        return real(*args)

    monkeypatch.setattr(weights, "weights_digest", slow)

    async def both() -> list[Any]:
        first = asyncio.create_task(server.request("POST", PATH, json={"model_path": str(checkpoint)}, headers=ADMIN))
        await asyncio.to_thread(begun.wait, 60.0)
        second = await server.request("POST", PATH, json={"model_path": str(checkpoint)}, headers=ADMIN)
        go_on.set()
        return [await first, second]

    first, second = server.run(both())
    assert second.status_code == 400 and "another update" in second.json()["message"]
    assert first.status_code == 200
    assert post(server, model_path=str(checkpoint)).status_code == 200


def test_more_than_memory_holds(server: FakeServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would kill a rank in the middle, and that would stop the server."""
    monkeypatch.setattr(weights, "host_memory", lambda: HostMemory(5, "a control group"))
    message = refused(server, model_path=str(checkpoint))
    assert "0.0 GiB are free (a control group)" in message and "restart" in message


def test_malformed_bodies(server: FakeServer) -> None:
    for body in ({}, {"model_path": 7}, {"model_path": "/x", "flush_cache": "no"}):
        reply = server.call("POST", PATH, json=body, headers=ADMIN)
        assert reply.status_code == 400 and reply.json()["object"] == "error"


def test_it_is_an_admin_route(server: FakeServer, checkpoint: Path) -> None:
    assert server.call("POST", PATH, json={"model_path": str(checkpoint)}).status_code == 401


def test_no_update_while_shutting_down(server: FakeServer, checkpoint: Path) -> None:
    server.lifecycle.phase = Phase.DRAINING
    reply = post(server, model_path=str(checkpoint))
    assert reply.status_code == 503 and reply.json()["success"] is False
    assert server.sent == []


def test_model_info_tells_the_present_weights_also_when_the_ranks_are_silent(server: FakeServer) -> None:
    server.answer_status = lambda rank: {"state": "detached", "epoch": 0, "model_path": "/new", "weight_version": "v2"}
    for _ in range(2):
        info = server.call("GET", "/model_info").json()
        assert (info["model_path"], info["weight_version"]) == ("/new", "v2")
        server.answer_status = lambda rank: None
    info = server.call("GET", "/server_info").json()
    assert info["model_path"] == server.config.model.path, "the top level tells what the server was started with"
    assert info["internal_states"][0]["model_path"] == "/new"


def test_an_answer_names_the_weights_that_computed_it(server: FakeServer) -> None:
    """Not those that are in use when it is written down."""
    server.generate = lambda request: None
    sampling = {"max_new_tokens": 1}

    async def scenario() -> Any:

        asked = asyncio.ensure_future(
            server.request("POST", "/generate", json={"text": "x", "sampling_params": sampling})
        )
        while not server.commands(wire.NewRequest):
            await asyncio.sleep(0)
        [request] = server.commands(wire.NewRequest)
        end = wire.RequestOutput(rid=request.rid, token_ids=(65,), finish=wire.FinishReason(type="length"))
        server.requests.deliver(wire.OutputBatch(outputs=[end], weight_version="v1"))
        server.requests.deliver(wire.OutputBatch(outputs=[], weight_version="v2"))
        return await asked

    assert server.run(scenario()).json()["meta_info"]["weight_version"] == "v1"
