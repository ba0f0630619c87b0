"""Every shipped drill, run as people run it, on real servers; and one that must not pass."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sglang_hicache.ctl.exits import Exit
from sglang_hicache.storage.registry import ALLOW_FAULTY_ENV
from tests.processes.server import ADMIN_KEY, ROOT, Server

DRILLS = sorted((ROOT / "scripts" / "drills").glob("*.toml"))
TP_SIZES = {path.stem: tomllib.loads(path.read_text())["server"].get("tp_size", 1) for path in DRILLS}
NEED_A_PROGRAM = {path.stem for path in DRILLS if "programs" in tomllib.loads(path.read_text()).get("needs", {})}

#: Wants to see what a good server does not do, on the same server as the others.
RED = """
name = "red"
about = "This must fail."
[server]
[stores.main]
backend = "file"
[[timeline]]
do = "attach"
store = "main"
mode = "drain"
[[timeline]]
do = "wait"
until = { requests = 10 }
[expect]
store = ""
storage_tokens = 1000000000
breaker = ["half_open"]
"""


class Ran:
    """What one call of `hicachectl drill` said about several drills."""

    def __init__(
        self, folder: Path, paths: list[Path], *flags: str, has_red: bool = False, env: dict[str, str] | None = None
    ) -> None:
        if has_red:
            red = folder / "red.toml"
            red.write_text(RED)
            paths = [*paths, red]
        command = [sys.executable, "-m", "sglang_hicache.ctl", "drill", *flags, "--json", "--report", str(folder / "r")]
        done = subprocess.run(
            [*command, *map(str, paths)], cwd=ROOT, capture_output=True, text=True, timeout=1800,
            env=os.environ | {"TMPDIR": str(folder)} | (env or {}),
        )  # fmt: skip
        self.code, self.progress = done.returncode, done.stderr
        found = json.loads(done.stdout) if done.stdout else {"drills": [], "reports": []}
        self.drills: dict[str, dict[str, Any]] = {drill["name"]: drill for drill in found["drills"]}
        self.reports = [Path(path) for path in found["reports"]]

    def check(self, name: str) -> None:
        """A drill passed, or something that it needs is not there."""
        drill = self.drills[name]
        if drill["verdict"] == "skipped":
            assert name in NEED_A_PROGRAM and "not there" in drill["message"]
            pytest.skip(drill["message"])
        bad = [item for item in drill["assertions"] if item["verdict"] != "passed"]
        assert drill["verdict"] == "passed" and not bad, (bad, drill, self.progress)
        assert drill["figures"]["requests"] > 40 and drill["figures"]["storage_tokens"] > 0


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Ran]:
    """Calls for so many ranks, once: those drills share a server."""

    @functools.cache
    def run(tp_size: int) -> Ran:
        paths = [path for path in DRILLS if TP_SIZES[path.stem] == tp_size]
        return Ran(tmp_path_factory.mktemp("drills"), paths, "--short", has_red=tp_size == 1)

    return run


@pytest.mark.parametrize("name", sorted(TP_SIZES, key=lambda name: (TP_SIZES[name], name)))
def test_a_drill_in_its_short_form(short: Callable[[int], Ran], name: str) -> None:
    short(TP_SIZES[name]).check(name)


def test_a_drill_that_must_not_pass_does_not(short: Callable[[int], Ran]) -> None:
    assert short(2).code == Exit.OK and short(1).code == Exit.DRILL_FAILED
    red = {item["name"]: item["verdict"] for item in short(1).drills["red"]["assertions"]}
    assert [name for name, verdict in red.items() if verdict == "failed"] == [
        "tokens from storage", "breaker", "store at the end"
    ]  # fmt: skip
    assert red["failed requests"] == red["text of the reference run"] == red["nothing is left over"] == "passed"


def test_all_of_them_are_in_the_reports(short: Callable[[int], Ran]) -> None:
    ran = short(1)
    assert {path.name for path in ran.reports} == {f"{name}.html" for name in ran.drills} | {"junit.xml"}
    suites = {suite.get("name"): suite for suite in ElementTree.parse(ran.reports[-1]).getroot()}
    assert suites.keys() == ran.drills.keys() >= {"red", "restart-warm"}
    assert {name for name, suite in suites.items() if suite.get("failures") != "0"} == {"red"}
    assert "<svg" in next(path for path in ran.reports if path.stem == "restart-warm").read_text()


def test_a_server_that_does_not_start_is_no_verdict_on_its_storage(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(RED.replace("[stores", 'flags = ["--no-such-flag"]\n[stores').replace('"red"', '"wrong"'))
    ran = Ran(tmp_path, [wrong])
    assert ran.code == Exit.REFUSED and ran.drills["wrong"]["verdict"] == "error"
    assert "did not start" in ran.drills["wrong"]["message"] and "--no-such-flag" in ran.drills["wrong"]["message"]


@pytest.mark.long
def test_the_drills_in_their_full_form(tmp_path: Path) -> None:
    ran = Ran(tmp_path, DRILLS)
    for path in DRILLS:
        if ran.drills[path.stem]["verdict"] != "skipped":
            ran.check(path.stem)


@pytest.mark.long
def test_a_drill_on_a_server_that_was_there_before(tmp_path: Path) -> None:
    """It breaks the storage through the wrapper that the server was started with, and leaves it as it was."""
    config = {"inner": "file", "inner_config": {"file_storage_path": str(tmp_path / "pages")}, "prefetch_threshold": 16}
    config |= {"control": str(tmp_path / "faults.json")}
    flags = (
        "--enable-deterministic-inference", "--page-size", "16", "--max-total-tokens", "1024", "--hicache-ratio", "1.2",
        "--enable-hierarchical-cache", "--enable-cache-report", "--hicache-storage-prefetch-policy", "wait_complete",
        "--hicache-storage-backend", "faulty", "--hicache-storage-backend-extra-config", json.dumps(config),
    )  # fmt: skip
    with Server(tmp_path / "server", *flags, env={ALLOW_FAULTY_ENV: "1"}) as server:
        before = server.status()["hicache_storage_backend_extra_config"]
        where = ["--short", "--url", str(server.http.base_url), "--i-mean-it"]
        drill = ROOT / "scripts" / "drills" / "hung-backend.toml"
        ran = Ran(tmp_path, [drill], *where, env={"HICACHECTL_KEY": ADMIN_KEY})
        assert server.status()["hicache_storage_backend_extra_config"] == before
    assert ran.code == Exit.OK, (ran.drills, ran.progress)
    ran.check("hung-backend")
    assert {"storage left as found", "text of the reference run"} <= {
        item["name"] for item in ran.drills["hung-backend"]["assertions"]
    }
