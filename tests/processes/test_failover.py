"""Stores that die, fail and come back, with processes: one synthetic rank, its storage processes and its canaries."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache import wire
from sglang_hicache.storage import registry
from sglang_hicache.storage.fault_control import write_faults
from sglang_hicache.storage.faulty_settings import Fault
from tests.processes.synthetic_server import SyntheticServer

#: Waits that a test has patience for; canaries start a process each.
HASTY = {"backoff_initial_s": 0.05, "backoff_max_s": 0.4, "healthy_s": 0.5, "canary_timeout_s": 60}
PROMPTS = [[family * 100 + i % 97 for i in range(90)] for family in range(4)]


def config(level: str, **common: Any) -> dict[str, Any]:
    standby = common.pop("standby", [])
    return {"prefetch_threshold": 4, "fault_tolerance": {"level": level, "standby": standby} | HASTY} | common


def serves(name: str) -> Callable[[wire.StatusAnswer], bool]:
    return lambda status: status.breaker.serving == name and status.state == "attached"


def is_out(status: wire.StatusAnswer) -> bool:
    return status.breaker.trips > 0


def test_fm55_a_killed_storage_process_comes_back_by_itself(tmp_path: Path) -> None:
    given = config("auto_reconnect", file_storage_path=str(tmp_path / "s"))
    with SyntheticServer(tmp_path / "server", given) as server:
        server.attach()
        server.ask(PROMPTS)
        server.quiesce()
        rids = [server.submit(prompt + [7], max_new_tokens=40) for prompt in PROMPTS]
        for pid in server.storage_pids():
            os.kill(pid, signal.SIGKILL)
        server.wait_for_status(is_out, "the loss is noticed")
        server.finish(rids)
        status = server.wait_for_status(serves("primary"), "the store is back")
        assert status.epoch == 2 and not status.last_error
        assert status.breaker.reason.startswith("killed: "), status.breaker.reason
        assert status.breaker.total_s["open"] + status.breaker.total_s["half_open"] >= 0.05
        server.quiesce()
        server.flush()
        assert server.ask(PROMPTS) > 0, "nothing came from the store that is back"
        assert [(n.cause.split()[0], n.before, n.after) for n in server.news] == [
            ("command", "", "file"), ("breaker", "file", ""), ("reconnect", "", "file")
        ]  # fmt: skip
        for rid, prompt in zip(rids, PROMPTS):
            assert server.tokens[rid] == server.model.reference(prompt + [7], 40)
        server.quiesce()
        server.detach()


def test_a_store_that_fails_is_replaced_and_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its faults are those of a control file, so that they strike every process of it: also its canaries."""
    monkeypatch.setenv(registry.ALLOW_FAULTY_ENV, "1")
    control = tmp_path / "faults.json"
    write_faults(control, {})
    standby = [{"backend": "file", "extra_config": {"file_storage_path": str(tmp_path / "b"), "prefetch_threshold": 4}}]
    given = config("failover", standby=standby, inner="memory", control=str(control))
    with SyntheticServer(tmp_path / "server", given) as server:
        assert server.try_to_attach("faulty").success, server.log()
        server.ask(PROMPTS)
        write_faults(control, {call: Fault(kind="error") for call in ("exists", "read", "write")})
        for number in range(200):
            server.ask([[number, *prompt] for prompt in PROMPTS])
            if is_out(server.status()):
                break
        status = server.wait_for_status(serves("standby 1"), "the standby serves")
        assert status.backend == "file" and status.breaker.failovers == 1
        assert status.breaker.reason.startswith("tripped_errors: ")
        assert any("standby 1 serves in the place of the primary" in why for why in status.why)
        server.ask(PROMPTS)
        server.quiesce()
        write_faults(control, {})
        status = server.wait_for_status(serves("primary"), "the primary is taken back")
        assert status.backend == "faulty" and status.breaker.failbacks == 1 and status.breaker.trips == 1
        server.ask(PROMPTS)
        assert [(n.cause.split()[0], n.before, n.after) for n in server.news] == [
            ("command", "", "faulty"), ("breaker", "faulty", ""), ("failover", "", "file"),
            ("failback", "file", "faulty"),
        ]  # fmt: skip
        server.quiesce()
        server.detach()
        assert server.status().breaker.state == "off"


def test_a_store_that_is_not_there_at_the_start_is_attached_when_it_comes(tmp_path: Path) -> None:
    in_the_way = tmp_path / "mount"
    in_the_way.touch()
    with SyntheticServer(tmp_path / "server", config("off", file_storage_path=str(in_the_way / "store"))) as server:
        answer = server.try_to_attach("file", keeps_trying=True)
        assert not answer.success
        status = server.wait_for_status(is_out, "it is tried again")
        assert status.why[0].startswith("storage is out since "), status.why
        server.ask(PROMPTS)
        in_the_way.unlink()
        server.wait_for_status(serves("primary"), "the store has come")
        server.ask(PROMPTS)
        server.quiesce()
        server.detach()
