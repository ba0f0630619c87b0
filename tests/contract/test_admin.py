"""The HiCache routes: status codes, words, and what reaches the ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from sglang_hicache import wire
from sglang_hicache.config import CacheConfig, StorageConfig
from sglang_hicache.tokenizer.services import Phase
from tests.contract.fake_server import ADMIN, API_KEY, FakeServer, make_config

PATH = "/hicache/storage-backend"
FILE = {"hicache_storage_backend": "file"}


def put(server: FakeServer, body: Any) -> Any:
    return server.call("PUT", PATH, json=body, headers=ADMIN)


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "configs"
    folder.mkdir()
    return folder


@pytest.fixture
def reader(model: Path, config_dir: Path) -> Any:
    """A server that may read files below `config_dir`."""
    config = make_config(model)
    storage = structs.replace(config.storage, config_dir=str(config_dir))
    server = FakeServer(structs.replace(config, storage=storage))
    yield server
    server.close()


def test_attach_reaches_every_rank_and_tells(server: FakeServer) -> None:
    server.answer_command = lambda rank, command: (True, "attached successfully")
    body = FILE | {
        "hicache_storage_backend_extra_config_json": '{"prefetch_threshold": 64}',
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_write_policy": "write_back",
        "rid": "ignored",
        "http_worker_ipc": None,
        "unknown": 1,
    }
    reply = put(server, body)
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain")
    first, second = reply.text.splitlines()
    assert "attached" in first and second == "attached successfully"
    commands = server.commands(wire.AttachStorage)
    assert sorted(rank for rank, _ in server.sent) == [0, 1]
    assert commands[0] == commands[1]
    assert commands[0].backend == "file"
    assert json.loads(commands[0].extra_config_json) == {"prefetch_threshold": 64}
    assert (commands[0].prefetch_policy, commands[0].write_policy) == ("wait_complete", "write_back")


def test_absent_extra_config_stays_absent(server: FakeServer) -> None:
    """A re-attach without one updates policies; with one, the ranks compare it."""
    put(server, FILE)
    assert server.commands(wire.AttachStorage)[0].extra_config_json is None


def test_followers_are_told_before_the_leader(server: FakeServer) -> None:
    put(server, FILE)
    assert [rank for rank, _ in server.sent] == [1, 0]


def test_a_refusal_of_one_rank_is_a_refusal(server: FakeServer) -> None:
    refusal = "Reject attach: scheduler is not idle. #queue-req=1 #running-req=2"
    server.answer_command = lambda rank, command: (rank == 0, "attached" if rank == 0 else refusal)
    reply = put(server, FILE)
    assert reply.status_code == 400
    assert reply.text == f"Failed to attach HiCache storage backend.\nattached | {refusal}\n"


def test_equal_messages_are_told_once(server: FakeServer) -> None:
    server.answer_command = lambda rank, command: (False, "Reject detach: scheduler is not idle.")
    reply = server.call("DELETE", PATH, headers=ADMIN)
    assert reply.status_code == 400
    assert reply.text == "Failed to detach HiCache storage backend.\nReject detach: scheduler is not idle.\n"


def test_detach(server: FakeServer) -> None:
    reply = server.call("DELETE", PATH, headers=ADMIN)
    assert reply.status_code == 200
    assert "detached" in reply.text.splitlines()[0]
    command = server.commands(wire.DetachStorage)[0]
    assert command.flush_timeout_s is None, "an operator's detach is judged idle or refused, it never waits"


@pytest.mark.parametrize(("method", "path"), [("PUT", PATH), ("DELETE", PATH), ("POST", f"{PATH}/clear")])
def test_a_silent_rank_leaves_the_outcome_unknown(server: FakeServer, method: str, path: str) -> None:
    server.answer_command = lambda rank, command: (True, "done") if rank == 0 else None
    body = FILE if method == "PUT" else None
    reply = server.call(method, path, json=body, headers=ADMIN)
    assert reply.status_code == 504
    operation_id = server.sent[0][1].id
    assert "outcome unknown" in reply.text and operation_id in reply.text
    assert "not answered by rank 1" in reply.text and "answered: 0" in reply.text


def test_a_rank_that_cannot_be_told_means_nothing_has_started(server: FakeServer) -> None:
    server.ports[1].is_full = True
    reply = put(server, FILE)
    assert reply.status_code == 400
    assert "nothing was started" in reply.text and "rank 1" in reply.text
    assert server.sent == []


# ---------------------------------------------------------------------------------------- what is refused here


@pytest.mark.parametrize(
    "body", [{}, {"hicache_storage_backend": 3}, FILE | {"hicache_write_policy": 1}, [], "file", None]
)
def test_malformed_body(server: FakeServer, body: Any) -> None:
    reply = put(server, body)
    assert reply.status_code == 400
    error = reply.json()
    assert error.pop("message")
    assert error == {"object": "error", "type": "Bad Request", "param": None, "code": 400}
    assert server.sent == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hicache_storage_backend": "nope"}, ["'nope'", "file", "memory"]),
        ({"hicache_storage_prefetch_policy": "soon"}, ["'soon'", "best_effort", "wait_complete", "timeout"]),
        ({"hicache_write_policy": "never"}, ["'never'", "write_back", "write_through", "write_through_selective"]),
        ({"hicache_storage_backend_extra_config_json": "{broken"}, ["{broken", "JSON"]),
        ({"hicache_storage_backend_extra_config_json": "[1]"}, ["[1]", "object"]),
        ({"hicache_storage_backend_extra_config_json": '{"prefetch_threshold": -1}'}, ["prefetch_threshold", "-1"]),
        ({"hicache_storage_backend_extra_config_json": '{"colour": 1}'}, ["colour", "file_storage_path"]),
        ({"hicache_storage_backend_extra_config_json": "@/etc/passwd"}, ["@", "--hicache-config-dir"]),
        ({"hicache_storage_backend_extra_config_json": '{"file_storage_path": "/x/${env.HOME}"}'},
         ["${env.HOME}", "--hicache-config-env"]),
        ({"hicache_storage_backend_extra_config_json": '{"file_storage_path": "/x/${host}"}'},
         ["${host}", "${node.hostname}"]),
    ],
)
def test_refusal_names_value_and_choices(server: FakeServer, change: dict[str, Any], words: list[str]) -> None:
    reply = put(server, FILE | change)
    assert reply.status_code == 400
    first, rest = reply.text.split("\n", 1)
    assert first == "Failed to attach HiCache storage backend."
    assert all(word in rest for word in words), rest
    assert server.sent == []


def test_hierarchical_cache_off(model: Path) -> None:
    server = FakeServer(structs.replace(make_config(model), cache=CacheConfig(hierarchical=False)))
    try:
        assert server.call("GET", PATH, headers=ADMIN).status_code == 200
        for method, path, body in (("PUT", PATH, FILE), ("DELETE", PATH, None), ("POST", f"{PATH}/clear", None)):
            reply = server.call(method, path, json=body, headers=ADMIN)
            assert reply.status_code == 400
            assert "ierarchical cache is not enabled" in reply.text
    finally:
        server.close()


@pytest.mark.parametrize("keys", [{"admin_api_key": ""}, {"admin_api_key": "", "api_key": API_KEY}])
def test_without_an_admin_key_the_routes_are_closed(serve: Callable[..., FakeServer], keys: dict[str, str]) -> None:
    server = serve(**keys)
    headers = {"Authorization": f"Bearer {API_KEY}"}
    for method in ("PUT", "GET", "DELETE"):
        reply = server.call(method, PATH, json=FILE, headers=headers)
        assert reply.status_code == 400
        assert "--admin-api-key" in reply.json()["error"]
    assert server.sent == []
    # Clearing has no such gate: it follows the matrix alone.
    assert server.call("POST", f"{PATH}/clear", headers=headers).status_code == 200


# ------------------------------------------------------------------------------------------- files over HTTP


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"prefetch_threshold": 7}'),
        ("a.toml", "prefetch_threshold = 7"),
        ("a.yaml", "prefetch_threshold: 7"),
        ("a.yml", "prefetch_threshold: 7"),
    ],
)
def test_file_below_the_config_folder(reader: FakeServer, config_dir: Path, name: str, text: str) -> None:
    (config_dir / name).write_text(text)
    assert put(reader, FILE | {"hicache_storage_backend_extra_config_json": f"@{name}"}).status_code == 200
    assert json.loads(reader.commands(wire.AttachStorage)[0].extra_config_json) == {"prefetch_threshold": 7}


@pytest.mark.parametrize("name", ["../outside.json", "link.json", "sub/../../outside.json", "missing.json", "x\0.json"])
def test_file_outside_the_config_folder(reader: FakeServer, config_dir: Path, name: str) -> None:
    (config_dir.parent / "outside.json").write_text('{"prefetch_threshold": 7}')
    (config_dir / "link.json").symlink_to(config_dir.parent / "outside.json")
    (config_dir / "sub").mkdir()
    for path in (name, str(config_dir.parent / "outside.json")):
        assert put(reader, FILE | {"hicache_storage_backend_extra_config_json": f"@{path}"}).status_code == 400
    assert reader.sent == []


def test_broken_file_is_not_quoted(reader: FakeServer, config_dir: Path) -> None:
    (config_dir / "a.yaml").write_text('password: "hunter2" extra: [')
    reply = put(reader, FILE | {"hicache_storage_backend_extra_config_json": "@a.yaml"})
    assert reply.status_code == 400
    assert "hunter2" not in reply.text


# ---------------------------------------------------------------------------------------------------- status


def attached(rank: int) -> dict[str, Any]:
    return {
        "state": "attached",
        "epoch": 3,
        "backend": "file",
        "in_flight": {"write": 2},
        "prefetch_policy": "timeout",
        "write_policy": "write_through",
        "backend_info": {"path": "/data", "url": "redis://joe:hunter2@host"},
        "extra_config_json": '{"password": "hunter2", "nested": {"access_key": "AKIA1"}, "prefetch_threshold": 7}',
        "last_error": "AUTH failed with hunter2" if rank else "",
        "last_error_age_s": 61.04,
    }


def test_status_is_the_ranks_truth(server: FakeServer) -> None:
    server.answer_status = attached
    status = server.call("GET", PATH, headers=ADMIN).json()
    ranks = status.pop("ranks")
    config = json.loads(status.pop("hicache_storage_backend_extra_config"))
    assert config == {"password": "***", "nested": {"access_key": "***"}, "prefetch_threshold": 7}
    assert status.pop("breaker")["state"] == "off" and status.pop("operation") == []
    assert status.pop("startup")["backend"] is None
    assert {status.pop(name) for name in ("audit", "audit_head", "state_file")} == {None}
    assert status == {
        "hicache_storage_backend": "file",
        "hicache_storage_prefetch_policy": "timeout",
        "hicache_write_policy": "write_through",
        "why": [],
        "lost_tokens": {},
    }
    assert [(rank["rank"], rank["state"], rank["epoch"], rank["in_flight"]) for rank in ranks] == [
        (0, "attached", 3, {"write": 2}),
        (1, "attached", 3, {"write": 2}),
    ]
    assert ranks[0]["last_error"] is None and ranks[1]["last_error"] == "AUTH failed with ***"
    assert [rank["last_error_age_s"] for rank in ranks] == [None, 61.0]


def test_status_with_nothing_attached(server: FakeServer) -> None:
    status = server.call("GET", PATH, headers=ADMIN).json()
    assert status["hicache_storage_backend"] is None
    assert status["hicache_storage_backend_extra_config"] is None
    assert [rank["state"] for rank in status["ranks"]] == ["detached", "detached"]


@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_rank_is_unknown_and_holds_nothing_up(server: FakeServer, silent: int) -> None:
    server.answer_status = lambda rank: None if rank == silent else attached(rank)
    status = server.call("GET", PATH, headers=ADMIN).json()
    assert status["hicache_storage_backend"] == "file"
    assert status["ranks"][silent]["state"] == "unknown"
    assert status["ranks"][1 - silent]["state"] == "attached"


def test_status_says_why_nothing_is_written_and_who_says_so_alone(server: FakeServer) -> None:
    """1. Attached, and no page is written. 2. Two ranks tell the same with other times. 3. One of them more."""
    said = (
        ["the store has been full for 1.5 s", "nothing waits to be written"],
        ["the store has been full for 1.6 s", "2 backups wait"],
    )
    lost = {"no_space": 64}
    server.answer_status = lambda rank: attached(rank) | {"why": said[rank], "lost_tokens": lost}
    status = server.call("GET", PATH, headers=ADMIN).json()
    assert status["why"] == [
        "the store has been full for 1.5 s", "rank 0: nothing waits to be written", "rank 1: 2 backups wait",
    ]  # fmt: skip
    assert status["lost_tokens"] == lost
    assert [(rank["why"], rank["lost_tokens"]) for rank in status["ranks"]] == [(said[0], lost), (said[1], lost)]
    server.answer_status = lambda rank: None if rank else attached(rank) | {"why": said[0]}
    status = server.call("GET", PATH, headers=ADMIN).json()
    assert status["why"] == [*(f"rank 0: {each}" for each in said[0]), "rank 1: the rank is silent"]


def test_all_ranks_silent(server: FakeServer) -> None:
    server.answer_status = lambda rank: None
    status = server.call("GET", PATH, headers=ADMIN).json()
    assert status["hicache_storage_backend"] is None
    assert [rank["state"] for rank in status["ranks"]] == ["unknown", "unknown"]


# ------------------------------------------------------------------------------------- clear, flush, layout


@pytest.mark.parametrize("path", [f"{PATH}/clear", "/clear_hicache_storage_backend"])
def test_clear(server: FakeServer, path: str) -> None:
    reply = server.call("POST", path, headers=ADMIN)
    assert reply.status_code == 200
    assert reply.text == "Hierarchical cache storage backend cleared.\n"
    assert len(server.commands(wire.ClearStorage)) == 2


def test_clear_that_failed_says_so(server: FakeServer) -> None:
    server.answer_command = lambda rank, command: (False, f"rank {rank} could not")
    reply = server.call("POST", f"{PATH}/clear", headers=ADMIN)
    assert reply.status_code == 400
    assert "cleared." not in reply.text
    assert "rank 0 could not | rank 1 could not" in reply.text


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_flush(server: FakeServer, method: str) -> None:
    assert server.call(method, "/flush_cache?timeout=2.5", headers=ADMIN).status_code == 200
    command = server.commands(wire.FlushCache)[0]
    assert command.timeout_s == 2.5 and command.deadline_s > 2.5
    assert server.call(method, "/flush_cache", headers=ADMIN).status_code == 200
    assert server.commands(wire.FlushCache)[2].timeout_s == 0


def test_flush_keeps_the_storage_unless_told_otherwise(server: FakeServer) -> None:
    for query, keeps in (("", True), ("?keep_storage=true", True), ("?keep_storage=false", False)):
        server.sent.clear()
        assert server.call("POST", f"/flush_cache{query}", headers=ADMIN).status_code == 200
        assert [command.keep_storage for command in server.commands(wire.FlushCache)] == [keeps, keeps]


@pytest.mark.parametrize("value", ["no", "0", "FALSE", ""])
def test_flush_refuses_a_keep_storage_that_is_neither(server: FakeServer, value: str) -> None:
    reply = server.call("POST", f"/flush_cache?keep_storage={value}", headers=ADMIN)
    assert reply.status_code == 400
    assert "keep_storage" in reply.text and "true or false" in reply.text
    assert server.sent == []


def test_half_a_flush_is_a_failure(server: FakeServer) -> None:
    half = "L1 and L2 were flushed, but the storage was not cleared: io"
    server.answer_command = lambda rank, command: (rank == 0, "Cache flushed." if rank == 0 else half)
    reply = server.call("POST", "/flush_cache?keep_storage=false", headers=ADMIN)
    assert reply.status_code == 400 and half in reply.text


def test_flush_that_failed(server: FakeServer) -> None:
    server.answer_command = lambda rank, command: (False, "Another flush is in progress.")
    reply = server.call("POST", "/flush_cache", headers=ADMIN)
    assert reply.status_code == 400
    assert "Another flush is in progress." in reply.text


@pytest.mark.parametrize("timeout", ["-1", "nan", "inf", "soon", "1e9"])
def test_flush_refuses_a_timeout_that_is_none(server: FakeServer, timeout: str) -> None:
    reply = server.call("POST", f"/flush_cache?timeout={timeout}", headers=ADMIN)
    assert reply.status_code == 400
    assert timeout in reply.text
    assert server.sent == []


def test_layout(server: FakeServer) -> None:
    layout = server.call("GET", "/get_hicache_l3_cache_layout").json()
    assert layout["enabled"] is False
    assert layout["page_size"] == 64
    assert layout["hicache_object_layout"] == {"pools": []}
    assert layout["reason"]


def test_no_change_while_shutting_down(server: FakeServer) -> None:
    server.lifecycle.phase = Phase.DRAINING
    for method, path, body in (
        ("PUT", PATH, FILE),
        ("DELETE", PATH, None),
        ("POST", f"{PATH}/clear", None),
        ("POST", "/flush_cache", None),
    ):
        assert server.call(method, path, json=body, headers=ADMIN).status_code == 503
    assert server.sent == []


def test_storage_record_has_a_folder_for_http_only_when_asked() -> None:
    assert StorageConfig().config_dir == ""


def test_a_secret_that_once_came_over_http_stays_hidden(server: FakeServer) -> None:
    """Also when the attach has failed and no rank knows the config any more."""
    server.answer_command = lambda rank, command: (False, "AUTH failed with 27182818 and came-over-http")
    config = {"inner": "memory", "inner_config": {"credentials": {"pin": 27182818, "word": "came-over-http"}}}
    body = {"hicache_storage_backend": "file", "hicache_storage_backend_extra_config_json": json.dumps(config)}
    assert put(server, body).status_code == 400
    server.answer_status = lambda rank: {"state": "detached", "epoch": 1, "last_error": "27182818 came-over-http"}
    replies = [
        server.call("DELETE", PATH, headers=ADMIN),
        server.call("POST", f"{PATH}/clear", headers=ADMIN),
        server.call("GET", PATH, headers=ADMIN),
        server.call("GET", "/server_info", headers=ADMIN),
    ]
    for reply in replies:
        assert "27182818" not in reply.text and "came-over-http" not in reply.text, reply.text
    assert "AUTH failed with *** and ***" in replies[0].text


@pytest.mark.parametrize(
    "text", ['{"x\\ud800": 1}', '{"file_storage_path": "\\ud800"}', '{"\\u0000": "\\ud800\\ud800"}']
)
def test_half_a_surrogate_pair_is_a_mistake_not_a_defect(server: FakeServer, text: str) -> None:
    reply = put(server, FILE | {"hicache_storage_backend_extra_config_json": text})
    assert reply.status_code == 400, reply.text


@pytest.mark.parametrize("given", ["c2VjcmV0LWtleQ==", ["c2VjcmV0LWtleQ=="]])
def test_a_key_in_the_place_of_its_file_is_not_repeated(server: FakeServer, given: Any) -> None:
    config = json.dumps({"encryption": given})
    reply = put(server, {"hicache_storage_backend": "file", "hicache_storage_backend_extra_config_json": config})
    assert reply.status_code == 400 and "key_file" in reply.text
    assert "c2Vj" not in reply.text
