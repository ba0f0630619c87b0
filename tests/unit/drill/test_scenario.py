"""What a scenario file may say, and that a mistake in one is found before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_hicache.ctl.drill.scenario import Condition
from sglang_hicache.ctl.drill.scenario_file import parse, read
from sglang_hicache.errors import UserError
from sglang_hicache.storage.registry import ALLOW_FAULTY_ENV

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
    (BASE.replace("file", "redsi") + WAIT, "stores.main: unknown storage backend 'redsi'"),
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
        BASE.replace('"file"', '"tape"') + 'extra_config = { url = "x" }\n' + WAIT + '[needs]\nbackends = ["tape"]\n'
    )


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.toml cannot be read"):
        read(tmp_path / "none.toml", is_short=False)
    (tmp_path / "bad.toml").write_text(BASE)
    with pytest.raises(UserError, match="bad.toml: .*timeline"):
        read(tmp_path / "bad.toml", is_short=False)


def test_a_config_is_judged_with_what_will_stand_in_it() -> None:
    """An address with a port that nobody knows yet has the form of an address."""
    text = BASE.replace('"file"', '"redis"') + 'extra_config = { url = "redis://127.0.0.1:{cache.port}/0" }\n' + WAIT
    parse(text + '[programs.cache]\ncommand = ["redis-server"]\n')
    with pytest.raises(UserError, match="no valid host and port"):
        parse(text + '[programs.other]\ncommand = ["redis-server"]\n')
