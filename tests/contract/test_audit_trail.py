"""What the audit log says of each call: who, what, before and after, and how it ended.  And what it never says."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache import wire
from sglang_hicache.audit import verify
from sglang_hicache.tokenizer import trail
from sglang_hicache.tokenizer.services import Phase
from tests.contract.fake_server import ADMIN, ADMIN_KEY, API_KEY, FakeServer, make_config

PATH = "/hicache/storage-backend"
FILE = {"hicache_storage_backend": "file"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def audited(model: Path, path: Path) -> Iterator[Callable[..., FakeServer]]:
    """Makes servers that write the log, one after the other."""
    servers: list[FakeServer] = []

    def make(**http: Any) -> FakeServer:
        while servers:
            servers.pop().close()
        servers.append(FakeServer(make_config(model, audit_log=str(path), **http)))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def entries(server: FakeServer, path: Path) -> list[dict[str, Any]]:
    """All entries, and the log is whole."""
    server.run(server.control.close())
    assert verify(str(path)) == []
    return [json.loads(line) for line in path.read_text().splitlines()]


def told_error(server: FakeServer) -> str:
    """What GET says is wrong with the log, once the thread that writes it has found out."""
    for _ in range(10_000):
        if error := server.call("GET", PATH, headers=ADMIN).json()["audit"]["error"]:
            return str(error)
    raise AssertionError("the log is said to be well")


def short(entry: dict[str, Any]) -> tuple[str, str, str | None]:
    return entry["event"], entry["what"], entry.get("outcome")


def news(server: FakeServer, cause: str, before: str, after: str, config: str = "") -> None:
    server.control.news(
        wire.StorageNews(cause=cause, before=before, after=after, epoch=1, extra_config_json=config, detail="why")
    )


def test_a_change_is_two_entries(audited: Callable[..., FakeServer], path: Path) -> None:
    """1. A switch from what is attached. 2. The news come, then the answers. 3. Both states are in the log."""
    server = audited()
    news(server, "command x", "", "memory", '{"password": "hunter2"}')

    def answer(rank: int, command: Any) -> tuple[bool, str]:
        if rank == 0:
            news(server, f"command {command.id}", "memory", "file", command.extra_config_json)
        return True, f"said by {rank}"

    server.answer_command = answer
    config = {"prefetch_threshold": 7, "file_storage_path": "/tmp/x"}
    body = FILE | {"switch": True, "mode": "drain", "hicache_storage_backend_extra_config": config}
    reply = server.call("PUT", PATH, json=body, headers=ADMIN)
    assert reply.status_code == 200
    start, begin, end, stop = entries(server, path)
    assert [short(each) for each in (start, stop)] == [("start", "server", None), ("stop", "server", None)]
    operation_id = reply.headers["X-HiCache-Operation"]
    who = {"key": begin["who"]["key"], "address": "127.0.0.1"}
    assert len(who["key"]) == 8 and who["key"] not in ("unknown", "none", "server")
    for each in (begin, end):
        assert (each["operation"], each["who"], each["what"]) == (operation_id, who, "switch")
        assert each["before"]["backend"] == "memory" and json.loads(each["before"]["extra_config"])["password"] == "***"
    assert json.loads(begin["asked"]["extra_config"]) == config
    assert (begin["asked"]["backend"], begin["asked"]["mode"]) == ("file", "drain")
    assert end["after"]["backend"] == "file" and json.loads(end["after"]["extra_config"]) == config
    assert (end["outcome"], end["message"]) == ("succeeded", "said by 0 | said by 1")
    assert end["ranks"][1] == {"rank": 1, "success": True, "message": "said by 1"}


@pytest.mark.parametrize(
    ("method", "target", "body", "what"),
    [
        ("PUT", PATH, FILE, "attach"),
        ("PUT", PATH, FILE | {"dry_run": True}, "dry_run"),
        ("DELETE", PATH, None, "detach"),
        ("POST", f"{PATH}/clear", None, "clear"),
        ("POST", "/clear_hicache_storage_backend", None, "clear"),
        ("GET", "/flush_cache", None, "flush"),
    ],
)
def test_every_kind_of_change_is_written(
    audited: Callable[..., FakeServer], path: Path, method: str, target: str, body: Any, what: str
) -> None:
    server = audited()
    server.answer_command = lambda rank, command: (False, "no")
    assert server.call(method, target, json=body, headers=ADMIN).status_code == 400
    found = entries(server, path)
    assert [short(each) for each in found[1:-1]] == [("begin", what, None), ("end", what, "failed")]


def test_who_is_not_let_in_is_written(audited: Callable[..., FakeServer], path: Path) -> None:
    server = audited(api_key=API_KEY)
    calls = (("PUT", PATH), ("DELETE", PATH), ("POST", f"{PATH}/clear"), ("POST", "/flush_cache"),
             ("DELETE", "/hicache/operations/x"), ("POST", "/update_weights_from_disk"))  # fmt: skip
    for method, target in calls:
        assert server.call(method, target, headers={"Authorization": "Bearer guess"}).status_code == 401
    assert server.call("PUT", PATH).status_code == 401
    assert server.call("PUT", PATH, headers={"Authorization": f"Bearer {API_KEY}"}).status_code == 401
    for method, target in (("GET", PATH), ("GET", "/hicache/operations"), ("POST", "/generate"), ("GET", "/x")):
        server.call(method, target)
    found = entries(server, path)[1:-1]
    kinds = ["attach", "detach", "clear", "flush", "cancel", "update_weights", "attach", "attach"]
    assert [short(each) for each in found] == [("refused", kind, "refused") for kind in kinds]
    assert [each["who"]["key"] for each in found[:7]] == ["unknown"] * 6 + ["none"]
    assert len(found[7]["who"]["key"]) == 8, "the key of somebody who may not do this is known all the same"
    assert all(each["message"] == "401 Unauthorized" for each in found)
    assert all(each["who"]["address"] == "127.0.0.1" for each in found)


def test_what_is_refused_after_the_key_is_written(audited: Callable[..., FakeServer], path: Path) -> None:
    server = audited()
    for body in (FILE | {"mode": "gently"}, {}, FILE | {"hicache_storage_backend_extra_config": {"colour": 1}}):
        assert server.call("PUT", PATH, json=body, headers=ADMIN).status_code == 400
    assert server.call("DELETE", f"{PATH}?timeout_s=5", headers=ADMIN).status_code == 400
    assert server.call("POST", "/flush_cache?timeout=soon", headers=ADMIN).status_code == 400
    assert server.call("POST", "/update_weights_from_disk", json={}, headers=ADMIN).status_code == 400
    assert server.call("POST", "/update_weights_from_disk", json={"model_path": "/x"}, headers=ADMIN).status_code == 400
    server.lifecycle.phase = Phase.DRAINING
    assert server.call("POST", f"{PATH}/clear", headers=ADMIN).status_code == 503
    found = entries(server, path)[1:-1]
    kinds = ["attach", "attach", "attach", "detach", "flush", "update_weights", "update_weights", "clear"]
    assert [short(each) for each in found] == [("refused", kind, "refused") for kind in kinds]
    assert "gently" in found[0]["message"] and "shutting down" in found[-1]["message"]
    assert len({each["who"]["key"] for each in found}) == 1


def test_a_body_that_is_too_large_is_written(audited: Callable[..., FakeServer], path: Path) -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(2):
            yield b"x" * 60

    server = audited(max_body_bytes=100)
    for method in ("PUT", "DELETE"):
        assert server.call(method, PATH, content=body(), headers=ADMIN).status_code == 413
    assert [short(each) for each in entries(server, path)[1:-1]] == [
        ("refused", "attach", "refused"), ("refused", "detach", "refused"),
    ]  # fmt: skip


def test_the_gate_without_an_admin_key_is_written(audited: Callable[..., FakeServer], path: Path) -> None:
    server = audited(admin_api_key="")
    for method, target in (("PUT", PATH), ("DELETE", PATH), ("DELETE", "/hicache/operations/x"), ("GET", PATH)):
        assert server.call(method, target).status_code == 400
    found = entries(server, path)[1:-1]
    assert [short(each)[1] for each in found] == ["attach", "detach", "cancel"]
    assert all("--admin-api-key" in each["message"] and each["who"]["key"] == "none" for each in found)


def test_a_stranger_does_not_fill_the_disk(audited: Callable[..., FakeServer], path: Path) -> None:
    server = audited()
    for _ in range(trail.MOST_REFUSALS + 5):
        assert server.call("PUT", PATH).status_code == 401
    assert server.call("DELETE", f"{PATH}?mode=gently", headers=ADMIN).status_code == 400
    found = entries(server, path)[1:-1]
    assert len(found) == trail.MOST_REFUSALS + 1
    assert found[-1]["what"] == "detach" and found[-1]["refusals_not_written"] == 5


def test_what_the_server_does_by_itself_is_written(audited: Callable[..., FakeServer], path: Path) -> None:
    server = audited()
    news(server, "command x", "", "file", "{}")
    news(server, "breaker", "file", "")
    news(server, "failover", "", "memory", '{"api_key": "hunter2"}')
    broken, over = entries(server, path)[1:-1]
    assert (broken["event"], broken["what"], broken["who"]["key"]) == ("news", "breaker", "server")
    assert (broken["before"]["backend"], broken["after"], broken["message"]) == ("file", None, "why")
    assert over["after"] == {"backend": "memory", "extra_config": '{"api_key": "***"}'}


def test_a_late_answer_is_a_second_end(audited: Callable[..., FakeServer], path: Path) -> None:
    server = audited()
    server.answer_command = lambda rank, command: (True, "done") if rank else None
    operation_id = server.call("PUT", PATH, json=FILE, headers=ADMIN).headers["X-HiCache-Operation"]
    server.desk.deliver(wire.CommandAnswer(id=operation_id, rank=0, success=True, message="done"))
    found = entries(server, path)[1:-1]
    assert [short(each)[2] for each in found] == [None, "unknown", "succeeded"]


def test_what_the_end_of_the_server_cuts_off_has_an_end(audited: Callable[..., FakeServer], path: Path) -> None:
    server = audited()
    server.answer_command = lambda rank, command: None
    # With a deadline far behind the end of the server: one that came first would be another end.
    patient = FILE | {"dry_run": True, "async": True, "timeout_s": 600}
    accepted = server.call("PUT", PATH, json=patient, headers=ADMIN).json()
    found = entries(server, path)[1:-1]
    assert [short(each) for each in found] == [("begin", "dry_run", None), ("end", "dry_run", "unknown")]
    assert "the server has stopped" in found[1]["message"]
    assert {each["operation"] for each in found} == {accepted["operation_id"]}


def test_a_cancel_names_its_target(audited: Callable[..., FakeServer], path: Path) -> None:
    async def scenario() -> str:
        held: list[Any] = []

        def hear(rank: int, command: Any) -> tuple[bool, str] | None:
            held.append(command)
            if isinstance(command, wire.CancelCommand):
                server.desk.deliver(wire.CommandAnswer(id=command.target, rank=rank, success=False, message="given up"))
                return True, "given up"
            return None

        server.answer_command = hear
        accepted = (await server.request("PUT", PATH, json=FILE | {"dry_run": True, "async": True, "timeout_s": 60},
                                         headers=ADMIN)).json()  # fmt: skip
        while len(held) < 2:
            await asyncio.sleep(0)
        assert (await server.request("DELETE", accepted["status_url"], headers=ADMIN)).status_code == 200
        assert (await server.request("DELETE", accepted["status_url"], headers=ADMIN)).status_code == 409
        assert (await server.request("DELETE", "/hicache/operations/nobody", headers=ADMIN)).status_code == 404
        return str(accepted["operation_id"])

    server = audited()
    target = server.run(scenario())
    found = entries(server, path)[1:-1]
    assert [(each["event"], each["what"]) for each in found if each["what"] == "cancel"] == [
        ("begin", "cancel"), ("end", "cancel"), ("refused", "cancel"), ("refused", "cancel"),
    ]  # fmt: skip
    [asked] = [each["asked"] for each in found if each["event"] == "begin" and each["what"] == "cancel"]
    assert asked == {"target": target}
    assert [each["outcome"] for each in found if each["what"] == "dry_run" and each["event"] == "end"] == ["cancelled"]


def test_secrets_are_never_in_it(audited: Callable[..., FakeServer], path: Path) -> None:
    server = audited()
    server.answer_command = lambda rank, command: (False, "AUTH failed for redis://joe:hunter2@host with s3cr3t-pass")
    config = {"file_storage_path": "/x", "password": "s3cr3t-pass"}
    for body in (
        FILE | {"hicache_storage_backend_extra_config": config},
        FILE | {"hicache_storage_backend_extra_config_json": '{"password": "s3cr3t-pass", broken'},
        FILE | {"hicache_storage_backend_extra_config": config, "dry_run": True},
    ):
        assert server.call("PUT", PATH, json=body, headers=ADMIN).status_code == 400
    server.call("PUT", PATH, json=FILE, headers=ADMIN)
    news(server, "breaker", "file", "redis", '{"password": "other-s3cr3t"}')
    entries(server, path)
    text = path.read_text()
    for secret in ("s3cr3t-pass", "hunter2", "other-s3cr3t", ADMIN_KEY):
        assert secret not in text


def test_the_head_is_told(
    audited: Callable[..., FakeServer], path: Path, server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with_log = audited()
    with_log.call("POST", "/flush_cache", headers=ADMIN)
    status = with_log.call("GET", PATH, headers=ADMIN).json()
    assert status["audit"] == {"head": status["audit_head"], "error": None}
    assert verify(str(path), status["audit_head"]) == []
    again = audited()
    head = [record.args[1] for record in caplog.records if record.getMessage().startswith("audit log")][-1]
    again.call("POST", "/flush_cache", headers=ADMIN)
    entries(again, path)
    assert verify(str(path), head) == [], "the head of the start before is still in it"
    assert server.call("GET", PATH, headers=ADMIN).json()["audit_head"] is None
    assert again.call("GET", "/server_info", headers=ADMIN).status_code == 200
    assert "audit" not in again.call("GET", "/server_info", headers=ADMIN).json()["internal_states"][0]


def test_a_disk_that_takes_nothing_stops_nobody_and_is_told(
    audited: Callable[..., FakeServer], path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    server = audited()
    server.call("POST", "/flush_cache", headers=ADMIN)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", full)
        for _ in range(3):
            assert server.call("POST", "/flush_cache", headers=ADMIN).status_code == 200
        assert "No space left" in (error := told_error(server)) and "wait in memory" in error
        assert "No space left" in caplog.text
    found = entries(server, path)
    assert [short(each)[0] for each in found[1:-1]] == ["begin", "end"] * 4, "nothing was lost, and nothing twice"


def test_a_log_that_is_removed_is_told(audited: Callable[..., FakeServer], path: Path) -> None:
    server = audited()
    server.call("POST", "/flush_cache", headers=ADMIN)
    path.unlink()
    assert server.call("POST", "/flush_cache", headers=ADMIN).status_code == 200
    assert "was removed" in told_error(server)
    server.run(server.control.close())
    assert "are missing" in verify(str(path))[0]


def test_the_address_is_the_connections(audited: Callable[..., FakeServer], path: Path) -> None:
    server = audited()
    headers = ADMIN | {"X-Forwarded-For": "6.6.6.6", "Forwarded": "for=6.6.6.6", "X-Real-IP": "6.6.6.6"}
    server.call("POST", "/flush_cache", headers=headers)
    assert {each["who"]["address"] for each in entries(server, path)[1:-1]} == {"127.0.0.1"}
    assert "6.6.6.6" not in path.read_text()
