"""The edge: exit codes, where errors go, and what a script reads with --json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable

import pytest

from tests.house.source import ROOT
from tests.unit.ctl.conftest import Ran
from tests.unit.ctl.fake import FakeServer, Said

Run = Callable[..., Ran]
COMMANDS = ("status", "attach", "switch", "detach", "dry-run", "clear", "operations", "incidents", "audit", "drill")


def test_every_command_is_in_the_help(run: Run) -> None:
    ran = run("--help")
    assert ran.code == 0
    assert all(f"\n    {name}" in ran.out for name in COMMANDS)
    assert "exit codes:" in ran.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run: Run, command: str) -> None:
    ran = run(command, "--help")
    assert ran.code == 0 and "--key-file" in ran.out


@pytest.mark.parametrize("line", ["", "no-such", "attach", "operations show", "detach --mode soon", "status --colour"])
def test_a_mistake_in_the_line(server: FakeServer, run: Run, line: str) -> None:
    assert run(*line.split()).code == 2
    assert not server.asked


def test_nobody_is_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HICACHECTL_URL", "http://127.0.0.1:1")
    ran = run("detach")
    assert ran.code == 3 and ran.out == "" and "cannot reach" in ran.err
    ran = run("detach", "--json")
    assert ran.code == 3 and ran.err == "" and json.loads(ran.out)["ok"] is False


def test_the_wrong_key(server: FakeServer, run: Run) -> None:
    server.says("GET", "/hicache/operations", Said({"error": "Unauthorized"}, 401))
    ran = run("operations")
    assert ran.code == 1 and "Unauthorized" in ran.err and "--key-file" in ran.err


@pytest.mark.parametrize("line", ["status", "operations", "incidents"])
@pytest.mark.parametrize("told", [[], {}, 7, {"operations": [1], "incidents": [{}], "ranks": {}}])
def test_a_server_of_another_kind(server: FakeServer, run: Run, line: str, told: object) -> None:
    for path in ("storage-backend", "operations", "incidents"):
        server.says("GET", f"/hicache/{path}", Said(told))
    ran = run(line)
    assert ran.code == 1 and "is --url that of a server?" in ran.err and len(ran.err.splitlines()) == 1
    assert json.loads(run(line, "--json").out) == told


def test_a_reader_that_has_seen_enough(server: FakeServer) -> None:
    """`hicachectl ... | head -1` is no error, and says nothing about one."""
    server.says("GET", "/hicache/operations", Said({"operations": ["x" * 100_000]}))
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "sglang_hicache.ctl", "operations", "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_console_script_is_this() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts["hicachectl"] == "sglang_hicache.ctl.main:main"
