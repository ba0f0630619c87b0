"""A real server for benchmarks: started on a free port, asked over HTTP, stopped in order."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx

#: Tensor-parallel start-up on a busy machine; a server that takes longer is broken.
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
#: How often a server that is starting, or still writing, is asked again.
POLL_S = 0.02


class Answer(NamedTuple):
    """One streamed answer, as the client saw it."""

    first_token_s: float
    total_s: float
    output_tokens: int
    #: Cached prompt tokens by tier.
    cached: dict[str, int]

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second after the first one."""
        return (self.output_tokens - 1) / max(self.total_s - self.first_token_s, 1e-9)


class Server:
    """`with Server(folder, flags) as server:` - a running server; its log is a file in the folder."""

    def __init__(self, folder: Path, flags: list[str]) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = secrets.token_urlsafe(16)
        key_file = folder / "admin.key"
        key_file.touch(mode=0o600)
        key_file.write_text(key, encoding="ascii")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        where = ["--host", "127.0.0.1", "--port", str(port), "--admin-api-key-file", str(key_file)]
        self._command = [sys.executable, "-m", "sglang_hicache.launch_server", *where, *flags]
        self._log_path = folder / f"server-{port}.log"
        self._admin = {"Authorization": f"Bearer {key}"}
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120.0)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            if self._pause() or time.monotonic() > deadline:
                self.__exit__(None, None, None)
                raise SystemExit(f"the server did not start; the end of {self._log_path}:\n{self._log_tail()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _is_ready(self) -> bool:
        try:
            return self._client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def _pause(self, seconds: float = POLL_S) -> bool:
        """Waits a moment; True if the server ended meanwhile."""
        assert self._process is not None
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _log_tail(self) -> str:
        return "\n".join(self._log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])

    def ask(self, token_ids: list[int], output_tokens: int) -> Answer:
        """A greedy streamed answer of exactly so many tokens."""
        body = {
            "input_ids": token_ids,
            "stream": True,
            "sampling_params": {"temperature": 0, "max_new_tokens": output_tokens, "ignore_eos": True},
        }
        first: float | None = None
        meta: dict[str, Any] = {}
        started = time.perf_counter()
        with self._client.stream("POST", "/generate", json=body) as response:
            if response.status_code != 200:
                raise SystemExit(f"/generate answered {response.status_code}: {response.read().decode()}")
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise SystemExit(f"/generate failed: {event['error']}")
                meta = event["meta_info"]
                if first is None and meta["completion_tokens"]:
                    first = time.perf_counter()
        ended = time.perf_counter()
        details = meta.get("cached_tokens_details") or {}
        cached = {tier: details.get(tier, 0) for tier in ("device", "host", "storage")}
        return Answer((first or ended) - started, ended - started, meta["completion_tokens"], cached)

    def admin(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON, or the text, of an answer to the operator."""
        response = self._client.request(method, path, json=body, headers=self._admin)
        if response.status_code != 200:
            raise SystemExit(f"{method} {path} answered {response.status_code}: {response.text}")
        return response.json() if "json" in response.headers["content-type"] else response.text

    def rest(self, seconds: float) -> None:
        """Leaves the server alone for so long: what it does after an answer is not for the next one to pay."""
        if self._pause(seconds):
            raise SystemExit(f"the server ended; the end of {self._log_path}:\n{self._log_tail()}")

    def flush(self) -> None:
        """Empties device and host; storage keeps what it has."""
        response = self._client.post("/flush_cache", params={"timeout": "30"}, headers=self._admin)
        if response.status_code != 200:
            raise SystemExit(f"/flush_cache answered {response.status_code}: {response.text}")

    def settle(self) -> None:
        """Waits until nothing is on its way to storage any more."""
        while True:
            ranks = self._client.get("/hicache/storage-backend", headers=self._admin).json()["ranks"]
            if not any(rank["queued_backups"] or any((rank["in_flight"] or {}).values()) for rank in ranks):
                return
            if self._pause():
                raise SystemExit(f"the server ended; the end of {self._log_path}:\n{self._log_tail()}")


def share_of_cores() -> int:
    """Cores that this process may use: what the numbers were measured on."""
    return len(os.sched_getaffinity(0))
