"""What a scenario file may say, and that a mistake in one is found before anything is started."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from sglang_hicache.ctl.drill import scenario
from sglang_hicache.ctl.drill.scenario import Condition, Scenario, title
from sglang_hicache.ctl.drill.scenario_file import parse, read
from sglang_hicache.errors import UserError
from sglang_hicache.storage.registry import ALLOW_FAULTY_ENV

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted((ROOT / "scripts" / "drills").glob("*.toml"))
#: What the project promises to ship.
NAMES = {
    "hung-backend", "slow-backend", "flapping", "disk-full", "kill-storage-process", "kill-redis",
    "failover-and-back", "hot-upgrade", "bad-config", "restart-warm",
}  # fmt: skip

BASE = """
name = "base"
about = "A base."
[stores.main]
backend = "file"
"""
WAIT = '[[timeline]]\ndo = "wait"\nuntil = { requests = 5 }\n'


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


def test_short_forms_lie_over_what_they_name() -> None:
    text = f"""{BASE}
    [load]
    streams = 9
    turns = 3
    [[timeline]]
    do = "wait"
    until = {{ requests = 500, storage_tokens = 7 }}
    short = {{ until = {{ requests = 5 }} }}
    [short.load]
    streams = 2
    [short.expect]
    failed_requests = 1
    """
    full, short = parse(text), parse(text, is_short=True)
    assert (full.load.streams, short.load.streams, short.load.turns) == (9, 2, 3)
    assert (full.expect.failed_requests, short.expect.failed_requests) == (0, 1)
    assert full.timeline[0].until == Condition(requests=500, storage_tokens=7)
    assert short.timeline[0].until == Condition(requests=5, storage_tokens=7)


WRONG = [
    ("name = ", "not valid TOML"),
    (BASE, "missing required field `timeline`"),
    (BASE + WAIT + "[loads]\n", "unknown field `loads`"),
    (BASE + WAIT + "[load]\nstreams = 0\n", r"Expected `int` >= 1 - at `\$.load.streams`"),
    (BASE.replace("base", "Base") + WAIT, r"Expected `str` matching regex .* - at `\$.name`"),
    (BASE + WAIT + "[server]\nstore = 'mian'\n", "server: there is no store 'mian'"),
    (BASE + WAIT + "[expect]\nstore = 'mian'\n", "expect: there is no store 'mian'"),
    (BASE + '[[timeline]]\ndo = "sleep"\n', "Invalid value 'sleep' - at `\\$.timeline"),
    (BASE + '[[timeline]]\ndo = "switch"\nstore = "b"\n', "step 1 \\(switch\\): there is no store 'b'"),
    (BASE + '[[timeline]]\ndo = "wait"\nuntil = {}\n', "step 1 \\(wait\\): `until` names nothing to wait for"),
    (BASE + '[[timeline]]\ndo = "wait"\nuntil = { status = { store = "b" } }\n', "step 1 .*: there is no store 'b'"),
    (BASE + '[[timeline]]\ndo = "heal"\nstore = "main"\n', "the store 'main' takes no faults"),
    (BASE + '[[timeline]]\ndo = "kill"\nwhat = "redis"\n', "there is no program 'redis'"),
    (BASE + '[[timeline]]\ndo = "kill"\nrank = 1\n', "there is no rank 1; tp_size is 1"),
    (BASE + '[[timeline]]\ndo = "start"\nprogram = "redis"\n', "there is no program 'redis'"),
    (BASE + '[[timeline]]\ndo = "detach"\nmode = "now"\n', "Invalid enum value 'now'"),
    (BASE + 'extra_config = { max_sise = "1GB" }\n' + WAIT, "stores.main: unknown extra config 'max_sise'"),
    (BASE + 'standby = ["main"]\n' + WAIT, "standby 'main' is not a store of its own"),
    (BASE.replace("file", "redis") + WAIT, "stores.main: unknown storage backend 'redis'"),
    (BASE + WAIT + "short = 3\n", "`short` is not a table"),
    ("short = 3\n" + BASE + WAIT, "`short` is not a table"),
    (
        BASE
        + 'sabotaged = true\n[[timeline]]\ndo = "fault"\nstore = "main"\nfaults = { exists = { kind = "flip" } }\n',
        "fault 'flip' cannot strike 'exists'",
    ),
]


@pytest.mark.parametrize(("text", "words"), WRONG)
def test_a_mistake_is_named(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse(text, is_short=True)


def test_what_is_wrong_on_purpose_or_not_there_is_not_checked() -> None:
    parse(BASE + 'extra_config = { max_sise = "1GB" }\nbroken = true\n' + WAIT)
    parse(
        BASE.replace('"file"', '"redis"') + 'extra_config = { url = "x" }\n' + WAIT + '[needs]\nbackends = ["redis"]\n'
    )


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.toml cannot be read"):
        read(tmp_path / "none.toml", is_short=False)
    (tmp_path / "bad.toml").write_text(BASE)
    with pytest.raises(UserError, match="bad.toml: .*timeline"):
        read(tmp_path / "bad.toml", is_short=False)


@pytest.mark.parametrize("record", [
    value for value in vars(scenario).values()
    if isinstance(value, type) and issubclass(value, msgspec.Struct) and value.__module__ == scenario.__name__
    and not value.__name__.startswith("_")
])  # fmt: skip
def test_every_key_is_in_the_manual(record: type[msgspec.Struct]) -> None:
    manual = (ROOT / "docs" / "drills.md").read_text(encoding="utf-8")
    keys = [field.name for field in msgspec.structs.fields(record)]
    assert not [key for key in keys if f"`{key}`" not in manual and f"[{key}]" not in manual]
    tag = record.__struct_config__.tag
    assert tag is None or f'`"{tag}"`' in manual
