"""The screen that somebody reads who was woken up."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.ctl.answers import breaker, incident, operation, rank, silent, status
from tests.unit.ctl.conftest import Ran
from tests.unit.ctl.fake import FakeServer, Said

Run = Callable[..., Ran]


@pytest.fixture
def show(server: FakeServer, run: Run) -> Callable[..., str]:
    """The screen of a server that says this."""

    def call(incidents: Any = (), **fields: Any) -> str:
        server.says("GET", "/hicache/storage-backend", Said(status(**fields)))
        server.says("GET", "/hicache/incidents", Said({"incidents": list(incidents)}))
        ran = run("status")
        assert (ran.code, ran.err) == (0, "")
        return ran.out

    return call


def test_all_is_well(server: FakeServer, show: Callable[..., str]) -> None:
    lines = show().splitlines()
    assert lines[0] == f"server    {server.url}, 2 ranks"
    assert lines[1] == "storage   attached, file, epoch 3"
    assert lines[2] == 'config    {"path": "/pages"}'
    assert lines[3] == "policies  prefetch timeout, write write_through"
    assert lines[4] == "at start  the same (command line)"
    assert lines[5] == "breaker   closed for 2 h 5 min, level failover, primary serves"
    assert lines[6] == "audit     head 17-9f86d081"
    assert lines[8].startswith("rank  state     backend  epoch  in flight")
    assert lines[9].startswith("0     attached  file     3      write 2    5") and "4 run, 1 wait" in lines[9]
    assert lines[-2:] == ["why", "  - nothing waits to be written"]


def test_json_is_what_the_server_says(server: FakeServer, run: Run) -> None:
    server.says("GET", "/hicache/storage-backend", Said(status()))
    ran = run("status", "--json")
    assert (ran.code, ran.err, json.loads(ran.out)) == (0, "", status())
    assert len(server.asked) == 1


def test_an_error_comes_with_its_age_and_its_page(show: Callable[..., str]) -> None:
    error = "tripped_errors: 5 reads failed in a row"
    gone = {"state": "detached", "backend": None, "last_error": error, "last_error_age_s": 61.0}
    out = show(
        hicache_storage_backend=None, hicache_storage_backend_extra_config=None,
        ranks=[rank(0, **gone), rank(1, **gone)],
        breaker=breaker(state="open", in_state_s=12.0, trips=1, reason=error, serving="", next_try_s=3.2),
    )  # fmt: skip
    assert "storage   detached, epoch 3\n" in out and "config" not in out
    assert "breaker   open for 12 s, level failover, next try in 3.2 s, 1 trip\n" in out
    assert f"  - all ranks, 1 min 1 s ago: {error}\n    what to do: docs/runbooks/tripped_errors.md" in out
    assert out.count(error) == 1, "the breaker's reason is no news then"


def test_why_the_breaker_opened_is_told_while_another_store_serves(show: Callable[..., str]) -> None:
    out = show(breaker=breaker(trips=2, failovers=1, serving="standby 1", reason="tripped_slow: 12 times as slow"))
    assert "standby 1 serves, 2 trips, 1 failover\n" in out
    assert "  - the breaker, when it opened last: tripped_slow: 12 times as slow\n    what to do: docs/runb" in out


@pytest.mark.parametrize(
    ("error", "page"),
    [
        ("rank 1: no_space: the disk is full | rank 2: io", "docs/runbooks/no_space.md"),
        ("lost: hung: a read did not end", ""),
        ("something else", ""),
    ],
)
def test_a_code_is_found_where_codes_stand(show: Callable[..., str], error: str, page: str) -> None:
    out = show(ranks=[rank(0), rank(1, last_error=error, last_error_age_s=5.0)])
    assert f"rank 1, 5.0 s ago: {error}" in out
    assert ("what to do: " in out) == bool(page) and page in out


def test_a_switch_shows_its_places_and_its_operation(show: Callable[..., str]) -> None:
    candidate = {"role": "candidate", "state": "attaching", "epoch": 4, "backend": "memory", "in_flight": 0}
    places = [*rank()["places"], candidate]
    out = show(ranks=[rank(0, places=places), rank(1, places=places)], operation=[operation("running", kind="switch")])
    assert "a change is under way" in out
    assert "1     candidate  attaching  memory   4      0" in out
    assert "running operations" in out and "switch file (drain)" in out


def test_one_place_is_no_news(show: Callable[..., str]) -> None:
    assert "candidate" not in show() and "under way" not in show() and "running operations" not in show()


def test_a_silent_rank_and_ranks_that_differ(show: Callable[..., str]) -> None:
    out = show(ranks=[rank(0), silent(1)], why=["rank 1: the rank is silent"])
    assert "storage   attached, file, epoch 3, rank 1 silent\n" in out
    assert "1     silent" in out and "\nlast error\n" not in out
    assert "storage   attached, file, epoch 3 and 4" in show(ranks=[rank(0), rank(1, epoch=4)])
    assert "storage   ranks differ" in show(ranks=[rank(0), rank(1, state="detached")])
    assert "storage   unknown, rank 0, 1 silent" in show(
        ranks=[silent(0), silent(1)], hicache_storage_backend=None, breaker=None
    )


@pytest.mark.parametrize(
    ("then", "words"),
    [
        ({"source": "state file"}, "the same (state file)"),
        ({"extra_config": '{"path": "/b"}'}, 'not what is live: file {"path": "/b"} (command line)'),
        ({"backend": None, "extra_config": None}, "not what is live: no storage (command line)"),
        ({"write_policy": "write_back"}, "policies: prefetch timeout, write write_back (command line)"),
    ],
)
def test_what_is_live_and_what_the_start_was_told(show: Callable[..., str], then: dict[str, Any], words: str) -> None:
    assert f"at start  {words}\n" in show(startup=status()["startup"] | then)


def test_what_does_not_work_beside_the_storage(show: Callable[..., str]) -> None:
    started = status()["startup"] | {"outcome": "failed", "message": "not_found: no folder", "warning": "set aside"}
    broken = {
        "startup": started,
        "audit": {"head": "3-abc", "error": "disk full"},
        "state_file": {"error": "read-only"},
    }
    out = show(hicache_storage_backend=None, hicache_storage_backend_extra_config=None, **broken)
    assert "trouble   set aside\ntrouble   the attach at start: failed: not_found: no folder\n" in out
    assert "trouble   audit: disk full\ntrouble   state file: read-only\n" in out
    assert "trouble" not in show()
    assert "the attach at start" not in show(**broken), "somebody has attached it since"


def test_the_latest_incidents(show: Callable[..., str]) -> None:
    out = show(incidents=[incident(number=number) for number in (1, 2, 3, 4)])
    section = out.split("latest incidents\n")[1].splitlines()
    assert [line.split()[0] for line in section[1:]] == ["2", "3", "4"]


def test_a_cold_start_that_met_no_request_alarms_nobody(show: Callable[..., str]) -> None:
    over = incident(kind="cold_start", requests=0, reprefilled_tokens=0)
    assert "latest incidents" not in show(incidents=[over])
    assert "cold start" in show(incidents=[over | {"requests": 1}])
    assert "so far" in show(incidents=[over | {"ended": None}])


def test_incidents_that_cannot_be_told_hide_nothing(server: FakeServer, run: Run) -> None:
    server.says("GET", "/hicache/storage-backend", Said(status()))
    server.says("GET", "/hicache/incidents", Said({"error": {"message": "no rank has answered in time"}}, 503))
    ran = run("status")
    assert ran.code == 0 and "storage   attached" in ran.out


def test_without_hierarchical_cache(show: Callable[..., str]) -> None:
    none = rank(0, state="detached", backend=None, epoch=0, places=[], in_flight={}, load={})
    out = show(
        hicache_storage_backend=None, hicache_storage_backend_extra_config=None, hicache_storage_prefetch_policy=None,
        ranks=[none], breaker=breaker(state="off", level="off"), audit=None,
    )  # fmt: skip
    assert "policies  prefetch -" in out and "breaker   off" in out and "audit" not in out


def test_no_text_of_the_server_steers_the_terminal(show: Callable[..., str]) -> None:
    hostile = "hung: \x1b[2J\x1b[1;1Hall is well"
    bad = rank(0, last_error=hostile, last_error_age_s=1.0, backend=hostile)
    out = show(
        ranks=[bad, bad], why=[hostile], hicache_storage_backend=hostile, operation=[operation(message=hostile)],
        breaker=breaker(reason=hostile, serving=hostile, state=hostile, level=hostile),
        incidents=[incident(cause=hostile)], hicache_storage_prefetch_policy=hostile, hicache_write_policy=hostile,
    )  # fmt: skip
    assert "\x1b" not in out
