"""What a restart brings back, what it does not, and a start without its storage."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from sglang_hicache import private_file, wire
from sglang_hicache.tokenizer import startup, state_file
from sglang_hicache.tokenizer.startup import CannotStart, attach_at_start
from tests.contract.fake_server import ADMIN, FakeServer, make_config

PATH = "/hicache/storage-backend"
FILE = {"hicache_storage_backend": "file"}
CONFIG = '{"file_storage_path": "/tmp/${rank}", "prefetch_threshold": 7}'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.json"


class Ranks:
    """Ranks that attach whatever they are told to, and tell the news of it."""

    def __init__(self, server: FakeServer) -> None:
        self._server = server
        self._now = ""
        self.works = True
        server.answer_command = self.answer

    def answer(self, rank: int, command: Any) -> tuple[bool, str] | None:
        if not self.works:
            return False, "refused: nobody listens there"
        match command:
            case wire.AttachStorage() if rank == 0 and (command.switch or command.backend != self._now):
                self.news(f"command {command.id}", command.backend, command.extra_config_json or "{}")
            case wire.DetachStorage() if rank == 0 and self._now:
                self.news(f"command {command.id}", "")
        return True, "done"

    def news(self, cause: str, backend: str, config: str = "") -> None:
        news = wire.StorageNews(cause=cause, before=self._now, after=backend, epoch=1, extra_config_json=config)
        self._now = backend
        self._server.control.news(news)


@pytest.fixture
def start(model: Path, path: Path) -> Iterator[Callable[..., FakeServer]]:
    """Starts servers with the state file, one after the other."""
    servers: list[FakeServer] = []

    def make(**storage: Any) -> FakeServer:
        while servers:
            servers.pop().close()
        config = make_config(model)
        given = {"state_file": str(path), "attach_timeout_s": 20.0} | storage
        servers.append(FakeServer(structs.replace(config, storage=structs.replace(config.storage, **given))))
        Ranks(servers[-1])
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def attach(server: FakeServer) -> list[wire.AttachStorage]:
    """What the start attaches; one for each rank."""
    server.run(attach_at_start(server.control, server.startup))
    return server.commands(wire.AttachStorage)


def put(server: FakeServer, **body: Any) -> None:
    assert server.call("PUT", PATH, json=FILE | body, headers=ADMIN).status_code == 200


def told(server: FakeServer) -> Any:
    return server.call("GET", PATH, headers=ADMIN).json()["startup"]


def test_what_was_attached_over_http_comes_back(start: Callable[..., FakeServer], path: Path) -> None:
    server = start()
    assert attach(server) == [] and not path.exists()
    put(server, hicache_storage_backend_extra_config_json=CONFIG, hicache_write_policy="write_back")
    assert path.stat().st_mode & 0o777 == 0o600
    again = start()
    restored = attach(again)[0]
    assert (restored.backend, json.loads(restored.extra_config_json)) == ("file", json.loads(CONFIG))
    assert (restored.prefetch_policy, restored.write_policy, restored.mode) == (None, "write_back", "idle")
    shown = told(again)
    assert (shown["source"], shown["backend"], shown["outcome"]) == ("state file", "file", "succeeded")
    assert (shown["prefetch_policy"], shown["write_policy"]) == ("timeout", "write_back")
    assert json.loads(shown["extra_config"]) == json.loads(CONFIG)


def test_it_wins_over_the_command_line_and_says_so(
    start: Callable[..., FakeServer], caplog: pytest.LogCaptureFixture
) -> None:
    put(start())
    server = start(backend="memory")
    assert {command.backend for command in attach(server)} == {"file"}
    assert "not what the command line says (memory)" in caplog.text


def test_a_detach_comes_back_as_well(start: Callable[..., FakeServer]) -> None:
    server = start(backend="file")
    assert attach(server)
    assert server.call("DELETE", PATH, headers=ADMIN).status_code == 200
    again = start(backend="file")
    assert attach(again) == []
    assert (told(again)["source"], told(again)["backend"], told(again)["outcome"]) == ("state file", None, None)


def test_a_detach_of_what_is_off_already_is_kept(start: Callable[..., FakeServer]) -> None:
    """The breaker has taken the store out; then an operator detaches, so that it stays out: no news of that."""
    server = start()
    ranks = Ranks(server)
    put(server)
    ranks.news("breaker", "")
    assert {command.backend for command in attach(start())} == {"file"}, "the breaker is not the operator"
    again = start()
    Ranks(again).news("breaker", "")
    assert again.call("DELETE", PATH, headers=ADMIN).status_code == 200
    assert attach(start()) == []


def test_new_policies_alone_are_kept(start: Callable[..., FakeServer]) -> None:
    server = start()
    put(server, hicache_storage_backend_extra_config_json=CONFIG, hicache_write_policy="write_back")
    put(server, hicache_storage_prefetch_policy="wait_complete")
    restored = attach(start())[0]
    assert (restored.prefetch_policy, restored.write_policy) == ("wait_complete", "write_back")
    assert json.loads(restored.extra_config_json) == json.loads(CONFIG)


@pytest.mark.parametrize("by_flag", [False, True], ids=["put", "command line"])
def test_policies_that_are_changed_while_a_standby_serves_do_not_make_it_the_primary(
    start: Callable[..., FakeServer], path: Path, by_flag: bool
) -> None:
    server = start(backend="file", extra_config_json=CONFIG) if by_flag else start()
    ranks = Ranks(server)
    if by_flag:
        attach(server)
    else:
        put(server, hicache_storage_backend_extra_config_json=CONFIG)
    ranks.news("failover", "memory", "{}")
    put(server, hicache_storage_backend="memory", hicache_write_policy="write_back")
    kept = json.loads(path.read_text())
    assert (kept["backend"], kept["write_policy"]) == ("file", "write_back")
    assert json.loads(kept["extra_config_json"]) == json.loads(CONFIG)


@pytest.mark.parametrize("later", ["breaker", "command"])
def test_answers_that_come_after_later_news_do_not_undo_them(
    start: Callable[..., FakeServer], path: Path, later: str
) -> None:
    """1. A change is committed, and one rank answers late.  2. Meanwhile something else is attached, or nothing."""
    server = start(attach_timeout_s=0.01, drain_timeout_s=0.01)
    ranks = Ranks(server)
    answer = ranks.answer
    change = ("PUT", {"json": FILE}) if later == "breaker" else ("DELETE", {})
    if later == "command":
        put(server, hicache_storage_backend="memory")
    server.answer_command = lambda rank, command: None if rank else answer(rank, command)
    late = server.call(change[0], PATH, headers=ADMIN, **change[1])
    assert late.status_code == 504
    server.answer_command = answer
    if later == "breaker":
        ranks.news("breaker", "")
    else:
        put(server)
    said = wire.CommandAnswer(id=late.headers["X-HiCache-Operation"], rank=1, success=True, message="done")

    async def come() -> None:
        server.desk.deliver(said)
        await server.control.state_file.settled()

    server.run(come())
    assert json.loads(path.read_text())["backend"] == "file"


def test_what_nobody_asked_for_is_not_kept(start: Callable[..., FakeServer], path: Path) -> None:
    """The attach of a start, what fault tolerance does, a dry run, a failure, and the detach of a shutdown."""
    server = start(backend="file")
    ranks = Ranks(server)
    attach(server)
    ranks.news("failover", "memory", "{}")
    put(server, dry_run=True)
    ranks.works = False
    assert server.call("PUT", PATH, json=FILE, headers=ADMIN).status_code == 400
    ranks.works = True
    server.run(server.control.run(wire.DetachStorage(id="end", deadline_s=1.0, flush_timeout_s=1.0)))
    assert not path.exists()


def test_a_change_that_commits_after_all_is_kept(start: Callable[..., FakeServer], path: Path) -> None:
    server = start(attach_timeout_s=0.01)
    server.answer_command = lambda rank, command: None
    reply = server.call("PUT", PATH, json=FILE, headers=ADMIN)
    assert reply.status_code == 504 and not path.exists()

    async def commit() -> None:
        cause = f"command {reply.headers['X-HiCache-Operation']}"
        server.control.news(wire.StorageNews(cause=cause, before="", after="file", epoch=1))
        await server.control.close()

    server.run(commit())
    assert json.loads(path.read_text())["backend"] == "file"


def test_secrets_are_kept_but_not_shown(
    start: Callable[..., FakeServer], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A login in a placeholder's neighbourhood: what is kept must work, what is shown must not."""
    caplog.set_level("INFO")
    config = '{"file_storage_path": "/tmp/x", "encryption": {"key_file": "/keys/hunter2"}}'
    put(start(), hicache_storage_backend_extra_config_json=config)
    server = start()
    assert json.loads(attach(server)[0].extra_config_json) == json.loads(config)
    news = wire.StorageNews(cause="breaker", before="", after="redis", epoch=1,
                            extra_config_json='{"url": "redis://joe:hunter3@host"}')  # fmt: skip
    server.control.news(news)
    shown = json.dumps(server.call("GET", PATH, headers=ADMIN).json()) + caplog.text
    assert "hunter3" not in shown


# --------------------------------------------------------------------------------------------- what goes wrong


BROKEN = (
    b"", b"{", b"[]", b'{"backend": 3}', b'{"backend": "file", "colour": 1}', b"\xff\xfe",
    b'{"version": 2, "backend": "file"}', b'{"backend": "tape"}', b'{"backend": "file", "extra_config_json": "{"}',
    b'{"backend": "file", "extra_config_json": "{\\"colour\\": 1}"}',
    b'{"backend": "file", "extra_config_json": "{\\"file_storage_path\\": \\"/${env.HOME}\\"}"}',
    b'{"backend": "file", "prefetch_policy": "soon"}', b"[" * 100_000,
    json.dumps({"backend": "file", "extra_config_json": '{"a": ' * 900 + "1" + "}" * 900}).encode(),
    b'{"backend": "memory", "extra_config_json": "@/etc/hostname"}',
)  # fmt: skip


@pytest.mark.parametrize("content", BROKEN)
def test_a_file_that_cannot_be_used_is_set_aside_and_told(
    start: Callable[..., FakeServer], path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(content)
    path.chmod(0o600)
    server = start(backend="memory")
    assert {command.backend for command in attach(server)} == {"memory"}
    [aside] = path.parent.glob("state.json.unusable-*")
    assert aside.read_bytes() == content and not path.exists()
    shown = told(server)
    assert shown["source"] == "command line" and str(aside) in shown["warning"]
    assert str(aside) in caplog.text


@pytest.mark.parametrize("mode", [0o644, 0o660])
def test_a_file_of_others_is_not_trusted(start: Callable[..., FakeServer], path: Path, mode: int) -> None:
    path.write_text('{"backend": "file"}')
    path.chmod(mode)
    server = start()
    assert attach(server) == []
    assert "chmod 600" in told(server)["warning"]


def test_a_disk_that_takes_nothing_is_told_and_tried_again(
    start: Callable[..., FakeServer], path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_file, "RETRY_S", 0.01)
    monkeypatch.setattr(state_file, "SETTLE_S", 0.05)
    server = start()
    with monkeypatch.context() as broken:
        broken.setattr(private_file.os, "fsync", full)
        put(server)
        while not (error := server.call("GET", PATH, headers=ADMIN).json()["state_file"]["error"]):
            continue
        assert "No space left" in error
        assert "No space left" in caplog.text and not path.exists()

    async def healed() -> None:
        while server.control.state_file.error:
            await asyncio.sleep(0)

    server.run(asyncio.wait_for(healed(), 30))
    assert server.call("GET", PATH, headers=ADMIN).json()["state_file"] == {"error": None}
    assert list(path.parent.iterdir()) == [path], "nothing half-written stays behind"


# ----------------------------------------------------------------------------------------- optional storage


def test_storage_that_does_not_attach_ends_the_start(start: Callable[..., FakeServer]) -> None:
    put(start())
    server = start()
    Ranks(server).works = False
    with pytest.raises(CannotStart, match=r"of the state file could not be attached: refused.*--hicache-storage-optio"):
        attach(server)


def test_an_optional_storage_is_tried_again_and_the_server_serves(
    start: Callable[..., FakeServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = start(backend="file", is_optional=True)
    Ranks(server).works = False
    assert attach(server)[0].keeps_trying is True
    shown = told(server)
    assert (shown["optional"], shown["outcome"]) == (True, "failed")
    assert "nobody listens there" in shown["message"] and "nobody listens there" in caplog.text


def test_an_optional_storage_that_hangs_holds_the_start_up_for_a_moment_only(
    start: Callable[..., FakeServer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(startup, "OPTIONAL_PATIENCE_S", 0.05)
    server = start(backend="file", is_optional=True)
    server.answer_command = lambda rank, command: None
    attach(server)
    assert told(server)["outcome"] == "running" and "has not opened within" in caplog.text
    for rank in (0, 1):
        server.desk.deliver(wire.CommandAnswer(id=server.sent[0][1].id, rank=rank, success=True, message="attached"))
    server.run(asyncio.wait_for(server.startup.attach.ended.wait(), 30))
    assert told(server)["outcome"] == "succeeded"


def test_a_storage_that_is_needed_is_not_tried_again(start: Callable[..., FakeServer]) -> None:
    assert attach(start(backend="file"))[0].keeps_trying is False
