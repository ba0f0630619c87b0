"""A whole server in processes of its own: launcher, tokenizer, ranks, storage processes, real model, real HTTP."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
ADMIN_KEY = "an-admin-key-of-the-tests"
#: Upper bound of every wait: reached only when a test fails.
FAIL_S = 240.0
#: A look-up that takes longer is a miss, and the drain of a request that takes longer is cut off: right for people who
#: wait, and a matter of chance in a test on a busy machine.
PATIENT = ("--hicache-storage-lookup-timeout", "30", "--shutdown-drain-timeout", "100")


class Server:
    """Started with `with Server(folder, *flags)`; stopped, and its exit code and log checked, at the end."""

    def __init__(self, folder: Path, *flags: str, tp_size: int = 1, env: dict[str, str] | None = None) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        key_file = folder / "admin-key"
        key_file.write_text(ADMIN_KEY)
        key_file.chmod(0o600)
        command = [
            sys.executable, "-m", "sglang_hicache.launch_server", "--port", "0", "--tp-size", str(tp_size),
            "--admin-api-key-file", str(key_file), *PATIENT, *flags,
        ]
        self.log = ""
        #: What the launcher's end must be.
        self.exit_code = 0
        self.process = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, env=os.environ | {"TMPDIR": str(folder)} | (env or {})
        )
        # No idle connection outlives its request: the leak check of the tests would take it for theirs.
        self.http = httpx.Client(timeout=FAIL_S, limits=httpx.Limits(max_keepalive_connections=0))

    def __enter__(self) -> Server:
        url = self.wait_for_log(r"ready: (https?://\S+)").group(1)
        self.http.base_url = httpx.URL(url)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.finish()
        if error is None:
            assert code == self.exit_code, self.log
            assert "Traceback" not in self.log, self.log

    def finish(self) -> int:
        """Wait until every process of the server is gone; the exit code of the launcher."""
        self.http.close()
        try:
            _, rest = self.process.communicate(timeout=FAIL_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, rest = self.process.communicate()
        self.log += rest.decode()
        return self.process.returncode

    def wait_for_log(self, pattern: str) -> re.Match[str]:
        """Wait for a line of the log."""
        assert self.process.stderr is not None
        deadline = time.monotonic() + FAIL_S
        while not (match := re.search(pattern, self.log)):
            ready, _, _ = select.select([self.process.stderr], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self.process.stderr.fileno(), 65536) if ready else b""
            if not data:
                self.process.kill()
                self.finish()
                raise AssertionError(f"{pattern!r} never came:\n{self.log}")
            self.log += data.decode()
        return match

    # ----------------------------------------------------------------------------------------- requests

    def generate(self, text: str, max_new_tokens: int = 16, **fields: Any) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        reply = self.http.post("/generate", json={"text": text, "sampling_params": sampling} | fields)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def generate_all(self, texts: list[str], max_new_tokens: int = 16) -> list[dict[str, Any]]:
        """All at once, so that they are computed in one batch."""
        with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
            return list(pool.map(lambda text: self.generate(text, max_new_tokens), texts))

    def admin(self, method: str, path: str, **fields: Any) -> httpx.Response:
        return self.http.request(method, path, headers={"Authorization": f"Bearer {ADMIN_KEY}"}, **fields)

    def attach(self, path: Path, backend: str = "file", **config: Any) -> httpx.Response:
        return self.attach_store(backend, {"file_storage_path": str(path)} | config)

    def attach_store(self, backend: str, config: dict[str, Any], **fields: Any) -> httpx.Response:
        body = {
            "hicache_storage_backend": backend,
            "hicache_storage_backend_extra_config_json": json.dumps({"prefetch_threshold": 16} | config),
            "hicache_storage_prefetch_policy": "wait_complete",
        }
        return self.admin("PUT", "/hicache/storage-backend", json=body | fields)

    def status_now(self) -> dict[str, Any]:
        """What GET says now; the state of a rank that needs more than 1.5 s for its answer is "unknown"."""
        reply = self.admin("GET", "/hicache/storage-backend")
        assert reply.status_code == 200, reply.text
        return reply.json()

    def status(self) -> dict[str, Any]:
        """What every rank says: a rank in a long forward on a busy machine is asked again."""
        return self.wait_until(lambda ranks: True, "every rank answers")

    def wait_until(self, holds: Any, what: str) -> dict[str, Any]:
        """Ask for the status until it says so: the only way to see an event inside a server from outside."""
        deadline = time.monotonic() + FAIL_S
        pause = concurrent.futures.Future()
        while time.monotonic() < deadline:
            status = self.status_now()
            if all(rank["state"] != "unknown" for rank in status["ranks"]) and holds(status["ranks"]):
                return status
            concurrent.futures.wait([pause], timeout=0.05)
        raise AssertionError(f"never: {what}; last status {status}")

    def quiesce(self) -> dict[str, Any]:
        """Until nothing is on its way to storage."""
        return self.wait_until(
            lambda ranks: not any(r["queued_backups"] or r["in_flight"] or r["load"]["copy-ops"] for r in ranks),
            "backups written",
        )

    def flush(self) -> None:
        reply = self.admin("POST", "/flush_cache", params={"timeout": 30})
        assert reply.status_code == 200, reply.text

    # ---------------------------------------------------------------------------------------- processes

    def pids(self, pattern: str) -> list[int]:
        """Processes of this server whose command line matches."""
        found, parents = [], [self.process.pid]
        while parents:
            parent = parents.pop()
            for task in Path(f"/proc/{parent}/task").glob("*/children"):
                for child in _read(task).split():
                    parents.append(int(child))
                    command = _read(Path(f"/proc/{child}/cmdline")).replace("\0", " ")
                    if command and re.search(pattern, command):
                        found.append(int(child))
        return found


def _read(path: Path) -> str:
    """A file of /proc, or nothing: the thread or process may have ended meanwhile."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def cached(reply: dict[str, Any]) -> dict[str, Any]:
    return reply["meta_info"]["cached_tokens_details"] or {"device": 0, "host": 0}
