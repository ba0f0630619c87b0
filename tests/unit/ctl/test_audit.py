"""The audit log, as somebody reads it who asks what happened, and whether somebody else has been there before."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_hicache.audit import AuditLog
from tests.unit.ctl.conftest import Ran

Run = Callable[..., Ran]

ENTRIES = (
    {"event": "start", "who": {"key": "server", "address": None}, "what": "server"},
    {
        "event": "end", "who": {"key": "1a2b3c4d", "address": "10.0.0.7"}, "what": "switch",
        "before": {"backend": "file", "extra_config": '{"path": "/a"}'}, "after": {"backend": "memory"},
        "outcome": "succeeded", "message": "It took over.",
    },
    {"event": "news", "who": {"key": "server", "address": None}, "what": "breaker", "after": None, "message": "sick"},
)  # fmt: skip


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Three entries, written by the server's own code."""
    path = tmp_path / "audit.jsonl"
    tmp_path.chmod(0o700)
    written = AuditLog(str(path))
    for entry in ENTRIES:
        written.append(entry).result(timeout=60)
    (tmp_path / "head").write_text(written.head)
    written.close_blocking()
    return path


def test_a_whole_log(run: Run, log: Path) -> None:
    head = (log.parent / "head").read_text()
    ran = run("audit", "verify", str(log), "--expect", head)
    assert (ran.code, ran.out, ran.err) == (0, f"{log} is whole\n", "")
    ran = run("audit", "verify", str(log))
    assert ran.code == 0 and "without --expect nobody can tell" in ran.out
    assert json.loads(run("audit", "verify", str(log), "--json").out)["complaints"] == []


def test_an_edited_line_and_a_missing_one(run: Run, log: Path) -> None:
    head = (log.parent / "head").read_text()
    first, second, third = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(first + second.replace(b"10.0.0.7", b"10.0.0.8") + third)
    ran = run("audit", "verify", str(log), "--expect", head)
    assert ran.code == 1 and ran.out == "" and "line 2 (entry 2) was changed" in ran.err
    log.write_bytes(first + second)
    assert run("audit", "verify", str(log)).code == 0
    ran = run("audit", "verify", str(log), "--expect", head, "--json")
    told = json.loads(ran.out)
    assert ran.code == 1 and told["ok"] is False and "entry 3 is missing" in told["complaints"][0]


def test_what_cannot_be_verified(run: Run, log: Path) -> None:
    assert run("audit", "verify", str(log.parent / "nothing")).code == 1
    assert run("audit", "verify", str(log), "--expect", "the head").code == 2
    assert run("audit").code == 2


def test_show(run: Run, log: Path) -> None:
    ran = run("audit", "show", str(log))
    assert ran.code == 0
    first, second, *details, third, message = ran.out.splitlines()
    assert first.startswith("1 20") and first.endswith(" start server, key server")
    assert second.startswith("2 20") and second.endswith(" end switch, succeeded, key 1a2b3c4d, 10.0.0.7")
    assert details == [
        '    before: backend file, extra_config {"path": "/a"}', "    after: backend memory",
        "    message: It took over.",
    ]  # fmt: skip
    assert third.endswith(" news breaker, key server") and message == "    message: sick"
    assert len(run("audit", "show", str(log), "--last", "1").out.splitlines()) == 2
    assert [entry["number"] for entry in json.loads(run("audit", "show", str(log), "--json").out)] == [1, 2, 3]


def test_what_an_entry_does_not_know_is_not_shown(run: Run, log: Path) -> None:
    """The first entry of every log said "warning None"."""
    log.write_text(json.dumps({"event": "start", "asked": {"backend": "file", "warning": None}}) + "\n")
    assert run("audit", "show", str(log)).out.splitlines()[1:] == ["    asked: backend file"]


@pytest.mark.parametrize(
    "line",
    [
        "\x1b[2Jnothing", '{"number": 2, "who": "me", "before": 7, "event": "\\u001b[2J", "outcome": [1]}', "[1]",
        "[" * 100_000,
    ],
)  # fmt: skip
def test_a_line_that_somebody_has_been_at_is_shown_and_not_obeyed(run: Run, log: Path, line: str) -> None:
    log.write_text(line + "\n")
    ran = run("audit", "show", str(log))
    assert ran.code == 0 and "\x1b" not in ran.out and len(ran.out.splitlines()) == 2


@pytest.mark.parametrize("last", ["0", "-1", "all"])
def test_how_many_lines(run: Run, log: Path, last: str) -> None:
    assert run("audit", "show", str(log), f"--last={last}").code == 2


def test_a_log_that_is_not_there(run: Run, tmp_path: Path) -> None:
    ran = run("audit", "show", str(tmp_path / "nothing"))
    assert ran.code == 2 and "No such file" in ran.err


def test_a_log_that_is_a_pipe(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    ran = run("audit", "show", str(tmp_path / "pipe"))
    assert ran.code == 2 and "no regular file" in ran.err
