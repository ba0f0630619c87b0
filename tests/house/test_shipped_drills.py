"""The drills that are shipped, and their manual: what is promised is there, and every key is explained."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from sglang_hicache.ctl.drill import scenario
from sglang_hicache.ctl.drill.scenario import Scenario, title
from sglang_hicache.ctl.drill.scenario_file import read
from sglang_hicache.storage.registry import ALLOW_FAULTY_ENV
from tests.house.source import ROOT

SHIPPED = sorted((ROOT / "scripts" / "drills").glob("*.toml"))
#: What the project promises to ship.
NAMES = {
    "hung-backend", "slow-backend", "flapping", "disk-full", "kill-storage-process", "kill-redis",
    "kill-s3", "kill-mooncake", "failover-and-back", "hot-upgrade", "bad-config", "restart-warm",
}  # fmt: skip

RECORDS = [
    value
    for name, value in vars(scenario).items()
    if not name.startswith("_") and isinstance(value, type) and issubclass(value, msgspec.Struct)
    if value.__module__ == scenario.__name__
]


@pytest.fixture(autouse=True)
def saboteur_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_FAULTY_ENV, "1")


def test_all_of_the_promised_drills_are_shipped() -> None:
    assert {path.stem for path in SHIPPED} == NAMES


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_drill_is_valid_and_has_a_short_form_that_is_shorter(path: Path) -> None:
    full, short = read(path, is_short=False), read(path, is_short=True)
    assert full.name == path.stem
    assert _requests(short) < _requests(full)
    assert [title(step) for step in short.timeline if step.name] == [title(step) for step in full.timeline if step.name]


def _requests(found: Scenario) -> int:
    conditions = [step.until for step in found.timeline if isinstance(step, scenario.WaitStep)]
    return sum(condition.requests or 0 for condition in conditions)


@pytest.mark.parametrize("record", RECORDS)
def test_every_key_is_in_the_manual(record: type[msgspec.Struct]) -> None:
    manual = (ROOT / "docs" / "drills.md").read_text(encoding="utf-8")
    keys = [field.name for field in msgspec.structs.fields(record)]
    assert not [key for key in keys if f"`{key}`" not in manual and f"[{key}]" not in manual]
    tag = record.__struct_config__.tag
    assert tag is None or f'`"{tag}"`' in manual


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_drill_is_in_the_manual(name: str) -> None:
    assert f"| `{name}` |" in (ROOT / "docs" / "drills.md").read_text(encoding="utf-8")
