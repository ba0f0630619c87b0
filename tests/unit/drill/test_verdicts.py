"""A drill is worth something because it can be red: every assertion, against a server that breaks it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sglang_hicache.ctl import main
from sglang_hicache.ctl.drill import stores, watch
from sglang_hicache.ctl.exits import Exit
from tests.unit.drill.conftest import SCENARIO, Ran
from tests.unit.drill.fake import STATUS, FakeServer

Drill = Callable[..., Ran]


def red(ran: Ran) -> list[str]:
    return [name for name, verdict in ran.verdicts.items() if verdict == "failed"]


def test_a_good_server_passes_and_its_faults_are_taken_away(drill: Drill, server: FakeServer, tmp_path: Path) -> None:
    ran = drill()
    assert ran.code == Exit.OK, ran
    assert set(ran.verdicts.values()) == {"passed"} and ran.drill["verdict"] == "passed"
    assert json.loads(server.control.read_text()) == {"faults": {}}
    assert server.commands() == []
    assert ran.drill["figures"]["requests"] >= 12 and ran.drill["figures"]["failed_requests"] == 0
    suite = ElementTree.parse(tmp_path / "report" / "junit.xml").getroot()[0]
    assert suite.attrib["failures"] == suite.attrib["errors"] == suite.attrib["skipped"] == "0"
    assert len(suite) == int(suite.attrib["tests"]) == len(ran.verdicts)


@pytest.mark.parametrize(
    ("misbehaviour", "name", "words"),
    [
        ("lose", "failed requests", "HTTP status 503"),
        ("cut", "failed requests", "the answer ended early"),
        ("odd", "failed requests", "has not the form of one"),
        ("lie", "text of the reference run", "answers differ; the first, at"),
    ],
)
def test_requests_that_are_lost_or_answered_wrong(
    drill: Drill, server: FakeServer, misbehaviour: str, name: str, words: str
) -> None:
    server.good_requests, server.misbehaviour = 6, misbehaviour
    ran = drill()
    assert ran.code == Exit.DRILL_FAILED
    assert red(ran) == [name] and words in ran.details[name]


def test_so_many_failures_may_be_allowed(drill: Drill, server: FakeServer) -> None:
    server.good_requests = 6
    assert drill(SCENARIO + "[expect]\nfailed_requests = 1000000\n").code == Exit.OK


def test_a_server_that_answers_nothing_at_all_does_not_pass(drill: Drill, server: FakeServer) -> None:
    server.good_requests = 4
    ran = drill(SCENARIO + "[expect]\nfailed_requests = 1000000\n")
    assert red(ran) == ["answers"]


def test_text_is_not_judged_where_it_may_change_by_itself(drill: Drill, server: FakeServer) -> None:
    server.is_exact, server.good_requests, server.misbehaviour = False, 6, "lie"
    ran = drill()
    assert ran.code == Exit.OK and ran.verdicts["text of the reference run"] == "skipped"


def test_ranks_that_do_not_agree(drill: Drill, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_TICKS_APART_S", 0.0)
    server.ranks[1]["epoch"] = 2
    ran = drill(SCENARIO + "after = { seconds = 0.3 }\n")
    assert red(ran) == ["ranks agree"]


def test_ranks_that_are_a_tick_apart_agree(drill: Drill, server: FakeServer) -> None:
    server.looks_apart = 5
    assert drill().code == Exit.OK


def test_ranks_that_still_differ_when_the_load_ends_are_looked_at_until_that_is_clear(
    drill: Drill, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_TICKS_APART_S", 1.0)
    server.ranks[1]["epoch"] = 2
    assert red(drill()) == ["ranks agree"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_stops_looking_has_not_seen_that_ranks_agree(drill: Drill, server: FakeServer) -> None:
    """A defect ends the watcher."""
    server.odd_look = 4
    ran = drill(SCENARIO + "after = { seconds = 0.5 }\n")
    assert red(ran) == ["ranks agree"] and "not to the end" in ran.details["ranks agree"]


def test_a_breaker_that_a_restart_sets_back_has_opened_all_the_same(drill: Drill, server: FakeServer) -> None:
    server.trips = [4, 4, 4, 0, 1, 1]
    ran = drill(SCENARIO + "after = { seconds = 0.5 }\n[expect]\ntrips = 0\n")
    assert red(ran) == ["times that the breaker opened"], ran


def test_faults_that_cannot_be_taken_away_are_an_error_and_the_load_ends(
    drill: Drill, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = stores.write_faults, []

    def full(path: Path, faults: object) -> None:
        written.append(faults)
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        write(path, faults)

    monkeypatch.setattr(stores, "write_faults", full)
    ran = drill()
    assert ran.code == Exit.REFUSED and ran.drill["verdict"] == "error"
    assert "No space left" in ran.drill["message"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("stream", "watch"))]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quarantined_pages": 3}, "rank 1: 3 pages in quarantine"),
        ({"load": {"device_pages": 65}}, "rank 1: 40 + 24 of 65 device pages are free"),
    ],
)
def test_pages_that_are_left_over(drill: Drill, server: FakeServer, change: dict, words: str) -> None:
    rank = server.ranks[1]
    rank |= {name: rank[name] | value if isinstance(value, dict) else value for name, value in change.items()}
    ran = drill()
    assert red(ran) == ["nothing is left over"] and ran.details["nothing is left over"] == words


@pytest.mark.parametrize(
    ("expect", "name", "words"),
    [
        ('breaker = ["closed", "open"]', "breaker", "closed; expected closed -> open"),
        ("storage_tokens = 1000000", "tokens from storage", "at least 1000000"),
        ("reprefilled_tokens = 0", "tokens computed again", "at most 0"),
        ("ttft_p99_s = 0.000001", "p99 of the time to the first token, s", "at most 1e-06"),
        ('store = ""', "store at the end", "backend faulty; expected none"),
    ],
)
def test_expectations_that_are_not_met(drill: Drill, expect: str, name: str, words: str) -> None:
    ran = drill(f"{SCENARIO}[expect]\n{expect}\n")
    assert ran.code == Exit.DRILL_FAILED
    assert red(ran) == [name] and words in ran.details[name]


def test_a_store_that_is_the_one_that_was_expected_does_not_read_like_another(drill: Drill) -> None:
    """"passed ... backend faulty; expected main" was read as a mistake of the verdict."""
    ran = drill(SCENARIO + '[expect]\nstore = "main"\n')
    assert ran.code == Exit.OK and ran.details["store at the end"] == "main; backend faulty"


def test_what_comes_from_storage_is_not_computed_again(drill: Drill, server: FakeServer) -> None:
    server.storage_tokens = 1000
    assert drill(SCENARIO + "[expect]\nreprefilled_tokens = 0\nstorage_tokens = 4000\n").code == Exit.OK


def test_a_breaker_that_opens_too_often(drill: Drill, server: FakeServer) -> None:
    taken = server.answer

    def answer(method: str, path: str, body: object) -> tuple[int, str]:
        server.breaker["trips"] += path == "/generate"
        return taken(method, path, body)

    server.answer = answer
    ran = drill(SCENARIO + "after = { seconds = 0.3 }\n[expect]\ntrips = 1\n")
    assert red(ran) == ["times that the breaker opened"]


STEPS = [
    ('do = "wait"\nuntil = { requests = 1000000 }\nwithin_s = 0.2', "not so after 0.2 s"),
    ('do = "wait"\nuntil = { status = { state = "detached" } }\nwithin_s = 0.2', "'attached', 1"),
    ('do = "wait"\nuntil = { status = { last_error = "x", breaker = "open" } }\nwithin_s = 0.2', "breaker closed"),
    ('do = "detach"\nexpect = "refused"', "it was done, not refused"),
    ('do = "attach"\nstore = "wrong"', "it was refused, not done"),
    ('do = "attach"\nstore = "wrong"\nexpect = "refused"\nsays = "no permission"', "does not say 'no permission'"),
    ('do = "dry-run"\nstore = "main"', "it was refused, not done"),
    ('do = "dry-run"\nstore = "main"\nexpect = "refused"\ncode = "tls"', "no rank gave the code 'tls'"),
    ('do = "dry-run"\nstore = "main"\nexpect = "refused"\nwithin_s = 0.0000001', "at most 1e-07 s are allowed"),
]


@pytest.mark.parametrize(("step", "words"), STEPS)
def test_a_step_that_goes_wrong_ends_the_timeline(drill: Drill, server: FakeServer, step: str, words: str) -> None:
    wrong = '[stores.wrong]\nbackend = "wrong"\nbroken = true\n[[timeline]]\n'
    never = '[[timeline]]\ndo = "detach"\nname = "never"\n'
    ran = drill(f"{SCENARIO}{wrong}{step}\n{never}")
    assert ran.code == Exit.DRILL_FAILED
    assert words in ran.details[red(ran)[0]]
    assert "never" not in ran.verdicts


@pytest.mark.parametrize(
    "step",
    [
        'do = "attach"\nstore = "wrong"\nexpect = "refused"\nsays = "unknown storage backend"\nwithin_s = 60',
        'do = "dry-run"\nstore = "main"\nexpect = "refused"\ncode = "no_space"\nwithin_s = 60',
        'do = "wait"\nuntil = { at_s = 0.01, status = { store = "main", serving = "primary", state = "attached" } }',
    ],
)
def test_a_step_that_goes_as_expected(drill: Drill, step: str) -> None:
    ran = drill(f'{SCENARIO}[stores.wrong]\nbackend = "wrong"\nbroken = true\n[[timeline]]\n{step}\n')
    assert ran.code == Exit.OK, ran


def test_a_server_that_is_left_with_another_storage(drill: Drill, server: FakeServer) -> None:
    ran = drill(SCENARIO + '[[timeline]]\ndo = "detach"\nmode = "force"\ntimeout_s = 0.5\n')
    assert red(ran) == ["storage left as found"]
    assert server.commands() == [("DELETE", STATUS, {"mode": "force", "timeout_s": 0.5})]


def test_a_store_that_is_attached_again_is_the_one_that_was_there(drill: Drill, server: FakeServer) -> None:
    steps = '[[timeline]]\ndo = "detach"\n[[timeline]]\ndo = "switch"\nstore = "main"\nmode = "drain"\n'
    config = dict(server.config)
    assert drill(SCENARIO + steps).code == Exit.OK
    assert server.config == config
    assert server.commands()[1][2]["switch"] is True


def test_a_kill_of_a_storage_process_is_a_crash_by_fault(drill: Drill, server: FakeServer) -> None:
    taken = server.answer

    def answer(method: str, path: str, body: object) -> tuple[int, str]:
        if server.control.exists() and "crash" in server.control.read_text():
            server.ranks[0]["epoch"] = server.ranks[1]["epoch"] = 2
        return taken(method, path, body)

    server.answer = answer
    assert drill(SCENARIO + '[[timeline]]\ndo = "kill"\nrank = 0\n').code == Exit.OK
    assert json.loads(server.control.read_text()) == {"faults": {}}


# ----------------------------------------------------------------------- what a drill does not even begin


def test_somebody_elses_server_needs_to_be_meant(drill: Drill, server: FakeServer) -> None:
    ran = drill(sure=False)
    assert ran.code == Exit.USAGE and "--i-mean-it" in ran.error
    assert server.asked == []


REFUSED = [
    ({"backend": "file"}, "", "not started with a fault wrapper"),
    ({"config": {"inner": "file"}, "info": {}}, "", "not started with a fault wrapper"),
    ({"control": Path("/proc/no-such/control.json")}, "", "cannot be written from here"),
    ({"backend": None}, "", "the server has none"),
    ({"config": {"password": "***"}}, '[[timeline]]\ndo = "attach"\nstore = "main"\n', "holds secrets"),
    ({}, '[[timeline]]\ndo = "restart"\n', "needs its own server"),
    ({}, '[programs.redis]\ncommand = ["redis-server"]\n', "needs its own server"),
    ({}, '[stores.b]\nbackend = "file"\n[[timeline]]\ndo = "attach"\nstore = "b"\n', "drill's own server only"),
]


@pytest.mark.parametrize(("state", "more", "words"), REFUSED)
def test_what_it_may_not_do_is_refused_before_anything_is_done(
    drill: Drill, server: FakeServer, state: dict, more: str, words: str
) -> None:
    server.backend = state.get("backend", server.backend)
    server.config = state.get("config", server.config)
    info = {"control": str(state["control"])} if "control" in state else state.get("info")
    for rank in server.ranks:
        rank["backend_info"] = rank["backend_info"] if info is None else info
    ran = drill(SCENARIO + more)
    assert ran.code == Exit.USAGE and words in ran.error
    assert [asked[:2] for asked in server.asked] == [("GET", STATUS)]
    assert not server.control.exists()


@pytest.mark.parametrize("key", ["ordi\nnary-key", "schlüssel", "ordi nary-key"])
def test_a_key_of_the_load_that_is_none_is_not_shown(
    drill: Drill, server: FakeServer, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("HICACHECTL_LOAD_KEY", key)
    ran = drill()
    assert ran.code == Exit.USAGE and "the key of HICACHECTL_LOAD_KEY holds characters" in ran.error
    assert key[-4:] not in ran.error and server.asked == []


def test_meaning_it_without_a_url_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text(SCENARIO)
    assert main.main(["drill", str(path), "--i-mean-it"]) == Exit.USAGE
    assert "--url" in capsys.readouterr().err


def test_what_is_missing_on_this_machine_is_said_and_nothing_is_tried(drill: Drill, server: FakeServer) -> None:
    ran = drill(SCENARIO + '[needs]\nprograms = ["no-such-program"]\nbackends = ["no-such-backend"]\n')
    assert ran.code == Exit.OK and ran.drill["verdict"] == "skipped"
    assert ran.drill["message"] == "the program no-such-program and the storage backend no-such-backend are not there"
    assert server.asked == []


def test_a_server_that_is_gone_cannot_be_drilled(drill: Drill, server: FakeServer) -> None:
    server.url = "http://127.0.0.1:1"
    assert drill().code == Exit.UNREACHABLE
