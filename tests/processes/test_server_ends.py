"""How a server ends: as told, by the death of a part, or before it has begun.  It never hangs half alive."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import httpx

from sglang_hicache.storage.registry import ALLOW_FAULTY_ENV
from tests.processes.server import FAIL_S, ROOT, Server
from tests.processes.store_scan import Scan

FLAGS = ("--page-size", "16", "--enable-hierarchical-cache", "--max-total-tokens", "4096")
PROMPT = "The function returns the first item of the list that is given as its argument. " * 8


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_fm56_sigterm_finishes_requests_writes_backups_and_exits_0(tmp_path: Path) -> None:
    """1. A long answer runs. 2. SIGTERM: not ready, new requests 503. 3. The answer comes whole. 4. Exit 0.

    Long enough to be met in the middle, and on a slow machine far from the time that a drain may take.
    """
    store = tmp_path / "store"
    with Server(tmp_path / "a", *FLAGS, tp_size=2) as server:
        assert server.attach(store).status_code == 200
        server.generate(PROMPT)
        got: list[dict] = []
        long = threading.Thread(target=lambda: got.append(server.generate(PROMPT + "And then", max_new_tokens=300)))
        long.start()
        server.wait_until(lambda ranks: ranks[0]["load"]["running-req"] == 1, "the long request runs")
        pids = server.pids(".")
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("stopping: 1 request")
        assert server.http.get("/ready").status_code == 503
        refused = server.http.post("/generate", json={"text": "late"})
        assert refused.status_code == 503, refused.text
        long.join()
        assert got[0]["meta_info"]["completion_tokens"] == 300
        assert server.finish() == 0, server.log
    assert not alive(pids)
    scan = Scan(store)
    assert scan.pages() > 10, "the pages of the long answer were not written"
    assert scan.temporary_folders() == 0


def test_fm56_what_a_slow_store_does_not_take_in_time_is_reported(tmp_path: Path) -> None:
    """More waits for the store than it can write before the drain is over: what it took is whole, the rest is told."""
    store = tmp_path / "store"
    slow = {"kind": "slow", "first": 1, "delay_ms": 1000}
    flags = (*FLAGS, "--hicache-storage-drain-timeout", "0.5")
    with Server(tmp_path / "a", *flags, env={ALLOW_FAULTY_ENV: "1"}) as server:
        body = {"inner": "file", "inner_config": {"file_storage_path": str(store)}, "faults": {"write": slow}}
        reply = server.admin(
            "PUT", "/hicache/storage-backend",
            json={"hicache_storage_backend": "faulty", "hicache_storage_backend_extra_config_json": json.dumps(body)},
        )  # fmt: skip
        assert reply.status_code == 200, reply.text
        server.generate_all([f"{number}. {PROMPT}" for number in range(16)], max_new_tokens=1)
        pids = server.pids(".")
        server.process.send_signal(signal.SIGTERM)
        assert server.finish() == 0, server.log
    assert not alive(pids)
    told = r"storage detached: \d+ tokens were stored, ([1-9]\d*) were not \(.*(shutdown|detached) \d+"
    assert re.search(told, server.log), server.log
    Scan(store).pages()



def test_a_rank_that_dies_takes_the_server_down_with_its_name(tmp_path: Path) -> None:
    with Server(tmp_path / "a", *FLAGS, tp_size=2) as server:
        server.exit_code = 1
        pids = server.pids(".")
        (victim,) = server.pids("scheduler rank 1")
        os.kill(victim, signal.SIGKILL)
    assert "rank 1" in server.log and "SIGKILL" in server.log, server.log
    assert not alive(pids)


def test_a_backend_that_does_not_open_at_start_is_a_clear_exit(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.write_text("a file, not a folder")
    command = [
        sys.executable, "-m", "sglang_hicache.launch_server", "--port", "0", *FLAGS,
        "--hicache-storage-backend", "file", "--file-storage-path", str(store),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=FAIL_S)
    assert done.returncode != 0
    assert str(store) in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_launcher_that_is_killed_leaves_no_orphan(tmp_path: Path) -> None:
    with Server(tmp_path / "a", *FLAGS) as server:
        server.attach(tmp_path / "store")
        pids = server.pids(".")
        assert len(pids) == 3  # tokenizer, rank, storage process
        watched = [os.pidfd_open(pid) for pid in pids]
        server.exit_code = -signal.SIGKILL
        server.process.kill()
    for fd in watched:
        assert select.select([fd], [], [], FAIL_S)[0], "an orphan lives on"
        os.close(fd)


def test_tls(tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(cert),
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )
    with Server(tmp_path / "a", "--ssl-certfile", str(cert), "--ssl-keyfile", str(key)) as server:
        url = server.wait_for_log(r"ready: (https://\S+)").group(1)
        reply = httpx.get(f"{url}/ready", verify=ssl.create_default_context(cafile=str(cert)))
        assert reply.status_code == 200
