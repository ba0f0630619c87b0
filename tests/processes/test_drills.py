"""Every shipped drill, run as people run it, on real servers; and one that must not pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sglang_hicache.ctl.exits import Exit
from tests.processes.server import ROOT

DRILLS = sorted((ROOT / "scripts" / "drills").glob("*.toml"))

#: Wants to see what a good server does not do, on the same server as the others.
RED = """
name = "red"
about = "This must fail."
[server]
tp_size = 2
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

    def __init__(self, folder: Path, *flags: str) -> None:
        red = folder / "red.toml"
        red.write_text(RED)
        command = [sys.executable, "-m", "sglang_hicache.ctl", "drill", *flags, "--json", "--report", str(folder / "r")]
        done = subprocess.run(
            [*command, *map(str, DRILLS), str(red)], cwd=ROOT, capture_output=True, text=True, timeout=1800,
            env=os.environ | {"TMPDIR": str(folder)},
        )  # fmt: skip
        self.code, self.progress = done.returncode, done.stderr
        found = json.loads(done.stdout) if done.stdout else {"drills": [], "reports": []}
        self.drills: dict[str, dict[str, Any]] = {drill["name"]: drill for drill in found["drills"]}
        self.reports = [Path(path) for path in found["reports"]]

    def check(self, name: str) -> None:
        """A drill passed, or something that it needs is not there."""
        drill = self.drills[name]
        if drill["verdict"] == "skipped":
            assert name == "kill-redis" and "redis" in drill["message"]
            pytest.skip(drill["message"])
        bad = [item for item in drill["assertions"] if item["verdict"] != "passed"]
        assert drill["verdict"] == "passed" and not bad, (bad, drill, self.progress)
        assert drill["figures"]["requests"] > 40 and drill["figures"]["storage_tokens"] > 0


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("drills"), "--short")


@pytest.mark.parametrize("name", [path.stem for path in DRILLS])
def test_a_drill_in_its_short_form(short: Ran, name: str) -> None:
    short.check(name)


def test_a_drill_that_must_not_pass_does_not(short: Ran) -> None:
    assert short.code == Exit.DRILL_FAILED, short.progress
    red = {item["name"]: item["verdict"] for item in short.drills["red"]["assertions"]}
    assert [name for name, verdict in red.items() if verdict == "failed"] == [
        "tokens from storage", "breaker", "store at the end"
    ]  # fmt: skip
    assert red["failed requests"] == red["text of the reference run"] == red["nothing is left over"] == "passed"


def test_all_of_them_are_in_the_reports(short: Ran) -> None:
    names = {path.stem for path in DRILLS} | {"red"}
    assert {path.name for path in short.reports} == {f"{name}.html" for name in names} | {"junit.xml"}
    suites = {suite.get("name"): suite for suite in ElementTree.parse(short.reports[-1]).getroot()}
    assert suites.keys() == names
    assert {name for name, suite in suites.items() if suite.get("failures") != "0"} == {"red"}
    assert all("<svg" in path.read_text() for path in short.reports if path.stem in names - {"kill-redis"})


@pytest.mark.long
def test_the_drills_in_their_full_form(tmp_path: Path) -> None:
    ran = Ran(tmp_path)
    for path in DRILLS:
        if ran.drills[path.stem]["verdict"] != "skipped":
            ran.check(path.stem)
