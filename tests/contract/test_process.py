"""The tokenizer process itself, started as the launcher starts it, over real sockets to fake ranks."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from msgspec import structs

from sglang_hicache import wire
from sglang_hicache.child import Orders
from sglang_hicache.config import StorageConfig
from sglang_hicache.heartbeat import Heartbeat, ServerState
from sglang_hicache.sockets import Poller, Pull, Push, ipc_address
from tests.contract.fake_server import ADMIN, echo, make_config

PATIENCE_S = 60


class Tokenizer:
    """One tokenizer process, and both ranks that it talks to."""

    def __init__(self, model: Path, run_dir: str, **http: Any) -> None:
        self.config = structs.replace(
            make_config(model, port=0, drain_timeout_s=PATIENCE_S, **http),
            run_dir=run_dir,
            storage=StorageConfig(attach_timeout_s=PATIENCE_S, drain_timeout_s=PATIENCE_S / 2),
        )
        self.inboxes = [Pull(ipc_address(run_dir, f"to_rank_{rank}"), wire.ToRank) for rank in range(2)]
        self.outboxes = [Push(ipc_address(run_dir, "from_ranks"), wire.FromRank) for _ in range(2)]
        self.poller = Poller()
        for inbox in self.inboxes:
            self.poller.register(inbox)
        self.heartbeat = Heartbeat.create(2)
        self.process: subprocess.Popen[bytes] | None = None
        self.log: Any = None
        self.channel = -1
        self._told = b""

    def start(self, **storage: Any) -> None:
        self.config = structs.replace(self.config, storage=structs.replace(self.config.storage, **storage))
        self.channel, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.channel, False)
        orders = Orders(
            config=self.config,
            rank=0,
            parent_pid=os.getpid(),
            channel_fd=writer,
            heartbeat_fd=self.heartbeat.fd,
        )
        self.poller.register(self.channel)
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sglang_hicache.tokenizer"],
            stdin=subprocess.PIPE,
            stderr=self.log,
            pass_fds=(writer, self.heartbeat.fd),
        )
        os.close(writer)
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.msgpack.encode(orders))
        self.process.stdin.close()

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        if self.process is not None:
            self.process.wait()
        if self.channel >= 0:
            os.close(self.channel)
        for end in [*self.inboxes, *self.outboxes]:
            end.close()
        if self.log is not None:
            self.log.close()
        self.heartbeat.close()

    def receive(self) -> list[tuple[int, Any]]:
        """Whatever comes next, from the process to the ranks or to the launcher (then the rank is -1)."""
        found: list[tuple[int, Any]] = []
        ready = self.poller.wait(PATIENCE_S * 1000)
        assert ready, "the process says nothing"
        for rank, inbox in enumerate(self.inboxes):
            found += [(rank, message) for message in inbox.receive_all()]
        if self.channel in ready:
            self._told += os.read(self.channel, 4096)
            *lines, self._told = self._told.split(b"\n")
            found += [(-1, line.decode()) for line in lines]
        return found

    def until(self, wanted: type, answer: Callable[[int, Any], None] | None = None) -> list[Any]:
        """Play the ranks until a message of a type has come from the process; all of that type so far."""
        found: list[Any] = []
        while not found:
            for rank, message in self.receive():
                found += [message] if isinstance(message, wanted) else []
                if rank >= 0:
                    (answer or self.answer)(rank, message)
        return found

    def answer(self, rank: int, message: Any) -> None:
        """A rank for which everything succeeds at once."""
        match message:
            case wire.QueryStatus():
                self.say(rank, wire.StatusAnswer(id=message.id, rank=rank, state="detached", epoch=0))
            case wire.NewRequest():
                for output in echo(message):
                    self.say(rank, wire.OutputBatch(outputs=[output]))
            case wire.AttachStorage() | wire.DetachStorage() | wire.FlushCache() | wire.ClearStorage():
                self.say(rank, wire.CommandAnswer(id=message.id, rank=rank, success=True, message="done"))

    def say(self, rank: int, message: Any) -> None:
        assert self.outboxes[rank].send(message)

    def ready(self) -> httpx.Client:
        """Play the ranks until the process serves; a client of it."""
        [line] = self.until(str)
        word, port = line.split()
        assert word == "ready", line
        return httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(PATIENCE_S)

    def log_text(self) -> str:
        self.log.seek(0)
        return self.log.read().decode()


@pytest.fixture
def tokenizer(model: Path) -> Iterator[Tokenizer]:
    with tempfile.TemporaryDirectory() as run_dir:  # tmp_path is too long for a unix socket
        found = Tokenizer(model, run_dir)
        yield found
        found.close()


def raw_request(client: httpx.Client, path: str, body: bytes) -> socket.socket:
    """A request whose answer is not waited for."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port), PATIENCE_S)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_serves_and_stops_in_order(tokenizer: Tokenizer) -> None:
    """Ready, a request in flight, SIGTERM: /ready is 503 first, the request ends, then detach, shutdown, exit 0."""
    tokenizer.start()
    with tokenizer.ready() as client:
        assert client.get("/ready").status_code == 200
        with raw_request(client, "/generate", b'{"text": "abc"}') as connection:
            [request] = tokenizer.until(wire.NewRequest, lambda rank, message: None)
            assert tokenizer.process is not None
            tokenizer.process.send_signal(signal.SIGTERM)
            while client.get("/ready").status_code == 200:
                continue
            assert client.post("/generate", json={"text": "no"}).status_code == 503
            tokenizer.answer(0, request)
            reply = b""
            while b'"text":"abc"' not in reply:  # head and body may come apart
                part = connection.recv(65536)
                assert part, reply
                reply += part
            order: list[str] = []

            def note(rank: int, message: Any) -> None:
                order.append(f"{type(message).__name__} {rank}")
                tokenizer.answer(rank, message)

            [detach, *_] = tokenizer.until(wire.DetachStorage, note)
            assert detach.flush_timeout_s is not None
            if "Shutdown 0" not in order:
                tokenizer.until(wire.Shutdown, note)
            assert sorted(order[:2]) == ["DetachStorage 0", "DetachStorage 1"]
            assert order[2:] == ["Shutdown 0"]
    assert tokenizer.wait() == 0, tokenizer.log_text()


def test_a_client_that_hangs_up_is_aborted(tokenizer: Tokenizer) -> None:
    tokenizer.start()
    with tokenizer.ready() as client:
        for body in (b'{"text": "abc"}', b'{"text": "abc", "stream": true}'):
            connection = raw_request(client, "/generate", body)
            [request] = tokenizer.until(wire.NewRequest, lambda rank, message: None)
            connection.close()
            [abort] = tokenizer.until(wire.AbortRequest)
            assert abort.rid == request.rid


def test_attaches_before_it_is_ready(tokenizer: Tokenizer) -> None:
    tokenizer.start(backend="file", extra_config_json='{"prefetch_threshold": 7}')
    held: list[tuple[int, Any]] = []

    def hold_the_attach(rank: int, message: Any) -> None:
        if isinstance(message, wire.AttachStorage):
            held.append((rank, message))
        else:
            tokenizer.answer(rank, message)

    while len(held) < 2:
        for rank, message in tokenizer.receive():
            assert rank >= 0, f"ready too early: {message}"
            hold_the_attach(rank, message)
    assert held[0][1].backend == "file"
    for rank, message in held:
        tokenizer.answer(rank, message)
    tokenizer.ready().close()


def test_storage_that_does_not_attach_ends_the_start(tokenizer: Tokenizer) -> None:
    tokenizer.start(backend="file")

    def refuse(rank: int, message: Any) -> None:
        if isinstance(message, wire.AttachStorage):
            refusal = wire.CommandAnswer(id=message.id, rank=rank, success=False, message="no space left")
            tokenizer.say(rank, refusal)
        else:
            tokenizer.answer(rank, message)

    [line] = tokenizer.until(str, refuse)
    assert line.startswith("failed") and "'file'" in line and "no space left" in line
    assert tokenizer.wait() == 3


def test_port_in_use_ends_the_start(tokenizer: Tokenizer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        tokenizer.config = structs.replace(tokenizer.config, http=structs.replace(tokenizer.config.http, port=port))
        tokenizer.start()
        [line] = tokenizer.until(str)
    assert line.startswith("failed") and str(port) in line
    assert tokenizer.wait() == 3


def test_failing_server_tells_its_clients_and_leaves(tokenizer: Tokenizer) -> None:
    """A rank has died: nothing will answer a drain, so there is none."""
    tokenizer.start()
    with tokenizer.ready() as client, raw_request(client, "/generate", b'{"text": "abc"}') as connection:
        tokenizer.until(wire.NewRequest, lambda rank, message: None)
        tokenizer.heartbeat.state = ServerState.FAILING
        assert client.get("/health").status_code == 503
        assert tokenizer.process is not None
        tokenizer.process.send_signal(signal.SIGTERM)
        assert connection.recv(65536).startswith(b"HTTP/1.1 503")
        assert tokenizer.wait() == 1


def test_a_dry_run_under_way_does_not_hold_the_end_up(tokenizer: Tokenizer) -> None:
    """Nobody needs its result any more; its caller was cut off, with a traceback, when all else was done."""
    tokenizer.start()
    order = {"hicache_storage_backend": "memory", "dry_run": True}

    def hear(rank: int, message: Any) -> None:
        if not isinstance(message, wire.CancelCommand):
            tokenizer.answer(rank, message)
            return
        for command_id, success in ((message.target, False), (message.id, True)):
            tokenizer.say(rank, wire.CommandAnswer(id=command_id, rank=rank, success=success, message="given up"))

    with tokenizer.ready() as client, ThreadPoolExecutor(1) as hands:
        asked = hands.submit(client.put, "/hicache/storage-backend", json=order, headers=ADMIN)
        tokenizer.until(wire.DryRunStorage, hear)
        assert tokenizer.process is not None
        tokenizer.process.send_signal(signal.SIGTERM)
        tokenizer.until(wire.CancelCommand, hear)
        tokenizer.until(wire.Shutdown, hear)
        assert tokenizer.wait() == 0
        assert asked.result(PATIENCE_S).status_code == 400
    assert "Traceback" not in tokenizer.log_text()


def test_a_second_sigterm_ends_the_drain(tokenizer: Tokenizer) -> None:
    """The launcher sends it when a rank dies while the server drains: what the drain waits for will never come."""
    tokenizer.start()
    with tokenizer.ready() as client, raw_request(client, "/generate", b'{"text": "abc"}') as connection:
        tokenizer.until(wire.NewRequest, lambda rank, message: None)
        assert tokenizer.process is not None
        tokenizer.process.send_signal(signal.SIGTERM)
        while client.get("/ready").status_code == 200:
            continue
        tokenizer.process.send_signal(signal.SIGTERM)
        assert connection.recv(65536).startswith(b"HTTP/1.1 503")
        assert tokenizer.wait() == 1


def test_a_request_that_outlasts_the_drain_is_cut_off_and_told(tokenizer: Tokenizer) -> None:
    tokenizer.config = structs.replace(
        tokenizer.config, http=structs.replace(tokenizer.config.http, drain_timeout_s=0.05)
    )
    tokenizer.start()
    with tokenizer.ready() as client, raw_request(client, "/generate", b'{"text": "abc"}') as connection:
        tokenizer.until(wire.NewRequest, lambda rank, message: None)
        assert tokenizer.process is not None
        tokenizer.process.send_signal(signal.SIGTERM)
        tokenizer.until(wire.Shutdown)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 503") and b"send it again" in answer
        assert tokenizer.wait() == 0


def test_keys_never_reach_the_log(tokenizer: Tokenizer) -> None:
    tokenizer.start()
    with tokenizer.ready() as client:
        assert client.get("/hicache/storage-backend", headers={"Authorization": "Bearer wrong-key"}).status_code == 401
        assert client.put("/hicache/storage-backend", json={}, headers=ADMIN).status_code == 400
    text = tokenizer.log_text()
    assert text
    for key in ("wrong-key", ADMIN["Authorization"].split()[1]):
        assert key not in text


def test_tls(tokenizer: Tokenizer, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        + ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        capture_output=True,
        check=False,
    )
    if made.returncode != 0:
        pytest.skip("openssl is not installed here")
    http = structs.replace(tokenizer.config.http, ssl_certfile=str(certificate), ssl_keyfile=str(key))
    tokenizer.config = structs.replace(tokenizer.config, http=http)
    tokenizer.start()
    with tokenizer.ready() as plain:
        url = f"https://127.0.0.1:{plain.base_url.port}"
    context = ssl.create_default_context(cafile=str(certificate))
    with httpx.Client(base_url=url, verify=context, timeout=PATIENCE_S) as client:
        assert client.get("/ready").status_code == 200


def test_a_key_that_does_not_fit_its_certificate_ends_the_start(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rubbish = tmp_path / "x.pem"
    rubbish.write_text("rubbish")
    http = structs.replace(tokenizer.config.http, ssl_certfile=str(rubbish), ssl_keyfile=str(rubbish))
    tokenizer.config = structs.replace(tokenizer.config, http=http)
    tokenizer.start()
    [line] = tokenizer.until(str)
    assert line.startswith("failed") and "--ssl-certfile" in line
    assert tokenizer.wait() == 3
