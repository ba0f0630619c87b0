"""Operations and incidents: as tables, as the server's own JSON, and what a cancel or a wait comes to."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.ctl.answers import ID, incident, operation
from tests.unit.ctl.conftest import Ran
from tests.unit.ctl.fake import FakeServer, Said

Run = Callable[..., Ran]
ALL, ONE = "/hicache/operations", f"/hicache/operations/{ID}"


@pytest.mark.parametrize("line", ["operations", "operations list"])
def test_list(server: FakeServer, run: Run, line: str) -> None:
    latest = operation("running", id="ffff", kind="dry_run", mode=None, backend="memory")
    server.says("GET", ALL, Said({"operations": [latest, operation()]}))
    ran = run(*line.split())
    assert ran.code == 0
    assert [text.split()[0] for text in ran.out.splitlines()] == ["operation", ID, "ffff"], "the latest comes last"
    assert "attach file (drain)" in ran.out and "dry run memory" in ran.out and "2026-11-22 22:40:01" in ran.out
    assert json.loads(run(*line.split(), "--json").out) == {"operations": [latest, operation()]}


@pytest.mark.parametrize(
    ("line", "path", "told", "words"),
    [
        ("operations", ALL, {"operations": []}, "no operation since the server started"),
        ("incidents", "/hicache/incidents", {"incidents": []}, "no incident since the server started"),
    ],
)
def test_nothing_to_tell(server: FakeServer, run: Run, line: str, path: str, told: Any, words: str) -> None:
    server.says("GET", path, Said(told))
    assert run(line) == (0, f"{words}\n", "")


def test_show(server: FakeServer, run: Run) -> None:
    server.says("GET", ONE, Said(operation("failed")))
    ran = run("operations", "show", ID)
    assert ran.code == 0, "it was asked for and shown, however the operation ended"
    assert "failed" in ran.out and "rank 0's words" in ran.out
    assert json.loads(run("operations", "show", ID, "--json").out) == operation("failed")


@pytest.mark.parametrize("action", ["show", "wait", "cancel"])
def test_an_operation_that_nobody_knows(server: FakeServer, run: Run, action: str) -> None:
    """The id is quoted into the path: one with a slash must not become another route."""
    assert run("operations", action, "a/../b c").code == 1
    assert server.asked[0].path == "/hicache/operations/a%2F..%2Fb%20c"


def test_wait_says_how_it_ended(server: FakeServer, run: Run) -> None:
    server.says("GET", ONE, Said(operation("running")), Said(operation("cancelled", kind="switch")))
    ran = run("operations", "wait", ID)
    assert ran.code == 1 and "switch cancelled" in ran.err
    assert len(server.asked) == 2


def test_a_change_that_failed_names_its_runbook(server: FakeServer, run: Run) -> None:
    """The words of the server: the code stands behind the name of the backend."""
    words = "Failed to attach storage backend 'file': not_found: rank 1: cannot use /proc/x as storage folder"
    server.says("GET", ONE, Said(operation("failed", kind="switch", message=words)))
    ran = run("operations", "wait", ID)
    assert ran.code == 1 and ran.err.endswith(f"{words}\n  what to do: docs/runbooks/not_found.md\n")


def test_cancel(server: FakeServer, run: Run) -> None:
    told = {"cancelled": True, "message": "given up", "operation_id": "c1", "target": operation("cancelled")}
    server.says("DELETE", ONE, Said(told, 200, "c1"))
    assert run("operations", "cancel", ID) == (0, "given up\n", "")
    server.says("DELETE", ONE, Said(told | {"cancelled": False, "message": "a drain cannot be given up"}, 400))
    ran = run("operations", "cancel", ID)
    assert ran.code == 1 and "a drain cannot be given up" in ran.err
    server.says("DELETE", ONE, Said({"error": {"message": "it has ended"}}, 409))
    assert "it has ended" in run("operations", "cancel", ID).err


def test_incidents(server: FakeServer, run: Run) -> None:
    lasting = incident(number=2, kind="cold_start", backend=None, ended=None, reprefilled_tokens=0, lasted_s=5.0)
    server.says("GET", "/hicache/incidents", Said({"incidents": [incident(), lasting]}))
    ran = run("incidents")
    first, second = ran.out.splitlines()[1:]
    assert "1 min 30 s  " in first and "3400 tokens" in first and "tripped_errors: 5 reads failed" in first
    assert "cold start" in second and "5.0 s so far" in second and "at most 9000 tokens" in second
    assert json.loads(run("incidents", "--json").out)["incidents"] == [incident(), lasting]
