"""Drills against a fake server, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sglang_hicache.ctl import main
from sglang_hicache.storage.registry import ALLOW_FAULTY_ENV
from tests.unit.drill.fake import FakeServer

#: A scenario that a good server passes: four questions, asked again and again.
SCENARIO = """
name = "fake"
about = "A drill against <a fake>."
[server]
store = "main"
[stores.main]
backend = "file"
sabotaged = true
[load]
streams = 2
conversations = 2
output_tokens = 3
pause_s = 0.0
[[timeline]]
do = "fault"
store = "main"
faults = { read = { kind = "hang" } }
[[timeline]]
do = "wait"
until = { requests = 12 }
"""


class Ran(NamedTuple):
    """How a drill ended."""

    code: int
    #: By name of an assertion.
    verdicts: dict[str, str]
    details: dict[str, str]
    drill: dict[str, Any]
    error: str


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv("HICACHECTL_KEY", "the-admin-key")
    monkeypatch.setenv(ALLOW_FAULTY_ENV, "1")
    fake = FakeServer(tmp_path / "control.json")
    yield fake
    fake.close()


@pytest.fixture
def drill(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs a scenario on the fake server."""

    def run(text: str = SCENARIO, *flags: str, sure: bool = True) -> Ran:
        path = tmp_path / "scenario.toml"
        path.write_text(text)
        meant = ["--i-mean-it"] if sure else []
        report = ["--report", str(tmp_path / "report")]
        code = main.main(["drill", str(path), "--json", "--url", server.url, *meant, *report, *flags])
        said = json.loads(capsys.readouterr().out)
        found = said["drills"][0] if "drills" in said else {}
        assertions = found.get("assertions", [])
        return Ran(
            code,
            {item["name"]: item["verdict"] for item in assertions},
            {item["name"]: item["detail"] for item in assertions},
            found,
            said.get("message", ""),
        )

    return run
