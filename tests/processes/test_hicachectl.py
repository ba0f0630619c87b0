"""hicachectl against a real server: an operator's evening, from the first look to the audit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache.ctl import main
from tests.processes.server import ADMIN_KEY, ROOT, Server

FLAGS = ("--page-size", "16", "--max-total-tokens", "4096", "--enable-hierarchical-cache")
PROMPT = "Return a list of the names of all the modules in the given directory, sorted by name and by size. " * 4

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def audit_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    folder.chmod(0o700)
    return folder / "audit.jsonl"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, audit_log: Path) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server"), *FLAGS, "--hicache-audit-log", str(audit_log)) as running:
        yield running


@pytest.fixture
def run(server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("HICACHECTL_URL", str(server.http.base_url))
    monkeypatch.setenv("HICACHECTL_KEY", ADMIN_KEY)

    def call(*argv: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main.main(argv)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


def told(run: Run, *argv: str) -> Any:
    code, out = run(*argv, "--json")
    assert code == 0, out
    return json.loads(out)


def test_from_the_first_look_to_the_audit(server: Server, run: Run, tmp_path: Path, audit_log: Path) -> None:
    one, two = (json.dumps({"file_storage_path": str(tmp_path / name)}) for name in ("one", "two"))
    assert "storage   detached" in run("status")[1]

    # What does not work says so before anything is attached, what works says how fast it is.
    code, out = run("dry-run", "file", "--extra-config", '{"file_storage_path": "/proc/nowhere"}')
    assert code == 1 and "cannot be attached" in out and "docs/runbooks/not_found.md" in out
    assert told(run, "dry-run", "file", "--extra-config", one)["ok"] is True
    assert run("attach", "file", "--extra-config", one)[0] == 0
    server.generate(PROMPT)
    server.quiesce()

    code, out = run("switch", "file", "--extra-config", two, "--timeout", "20")
    assert code == 0 and "switch succeeded" in out
    code, out = run("status")
    assert code == 0 and "storage   attached, file" in out and str(tmp_path / "two") in out
    # The console script's way in, as another process.
    command = [sys.executable, "-m", "sglang_hicache.ctl", "detach", "--force"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "detach succeeded" in done.stdout, done.stderr
    assert told(run, "status")["ranks"][0]["state"] == "detached"

    kinds = [operation["kind"] for operation in told(run, "operations")["operations"]]
    assert kinds == ["detach", "switch", "attach", "dry_run", "dry_run"]
    operation_id = told(run, "operations")["operations"][0]["id"]
    assert operation_id in run("operations", "show", operation_id)[1]
    assert run("incidents")[0] == 0

    head = told(run, "status")["audit_head"]
    assert run("audit", "verify", str(audit_log), "--expect", head)[0] == 0
    assert "switch" in run("audit", "show", str(audit_log))[1]
    # The same log without the entry that was its head a moment ago, and without what may have come since.
    copy = tmp_path / "audit.jsonl"
    lines = audit_log.read_bytes().splitlines(keepends=True)
    copy.write_bytes(b"".join(lines[: int(head.partition("-")[0]) - 1]))
    key = Path(f"{copy}.key")
    key.write_bytes(Path(f"{audit_log}.key").read_bytes())
    key.chmod(0o600)
    code, out = run("audit", "verify", str(copy), "--expect", head)
    assert code == 1 and "missing" in out


def test_a_refusal_and_an_operation_that_is_left_alone(run: Run, tmp_path: Path) -> None:
    code, out = run("attach", "nope")
    assert code == 1 and "'nope'" in out and "memory" in out
    begun = told(run, "attach", "memory", "--no-wait")["operation_id"]
    assert run("operations", "wait", begun)[0] == 0
    code, out = run("attach", "file", "--extra-config", json.dumps({"file_storage_path": str(tmp_path / "three")}))
    assert code == 1 and "switch" in out, "another backend is attached: the message says what would do it"
    assert run("operations", "cancel", begun)[0] == 1, "it has ended"
    assert run("clear", "--yes")[0] == 0
    assert run("detach", "--mode", "idle")[0] == 0


def test_the_wrong_key(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HICACHECTL_KEY", "not-this-one")
    code, out = run("detach")
    assert code == 1 and "--key-file" in out and "not-this-one" not in out
