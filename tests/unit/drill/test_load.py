"""The load: the same prompts again and again, each answer measured and compared."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sglang_hicache.ctl.drill.load import Known, Load, Prompts, reference_answers
from sglang_hicache.ctl.drill.scenario import LoadTable
from sglang_hicache.ctl.drill.stream import StreamClient
from sglang_hicache.ctl.exits import Unreachable
from tests.unit.drill.fake import FakeServer

TABLE = LoadTable(
    streams=2, conversations=3, turns=2, prefixes=2, shared_tokens=32, unique_tokens=16, output_tokens=3, pause_s=0
)


def test_prompts_depend_on_the_table_alone_and_share_their_beginnings() -> None:
    one, other = Prompts(TABLE), Prompts(TABLE)
    answers = {(conversation, 0): (7, 8, 9) for conversation in range(3)}
    first = [one.prompt((conversation, 0), {}) for conversation in range(3)]
    assert first == [other.prompt((conversation, 0), {}) for conversation in range(3)]
    assert first[0][:32] == first[2][:32] != first[1][:32]
    assert first[0][32:] != first[2][32:]
    second = one.prompt((0, 1), answers)
    assert second[:48] == first[0] and second[48:51] == [7, 8, 9]
    assert len(second) == TABLE.prompt_tokens() == 67


def test_another_seed_asks_something_else() -> None:
    other = LoadTable(streams=2, seed=2)
    assert Prompts(other).prompt((0, 0), {}) != Prompts(LoadTable(streams=2)).prompt((0, 0), {})


def test_known_is_what_was_computed_from_the_first_token_on() -> None:
    known = Known()
    tokens = list(range(100))
    assert known.tokens(tokens) == 0
    known.learn(tokens[:50])
    assert known.tokens(tokens) == 48
    assert known.tokens([1, *tokens[1:]]) == 0
    known.learn(tokens)
    assert known.tokens(tokens[:96]) == 80, "its last token is computed whatever is known"


@pytest.fixture
def client(tmp_path: Path, request: pytest.FixtureRequest) -> StreamClient:
    server = FakeServer(tmp_path / "control.json")
    request.addfinalizer(server.close)
    request.node.server = server
    return StreamClient(server.url, "a-key")


def test_streams_ask_until_they_are_stopped_and_nobody_asks_while_they_are_held(
    client: StreamClient, request: pytest.FixtureRequest
) -> None:
    answers = reference_answers(TABLE, client)
    assert answers.keys() == {(conversation, turn) for conversation in range(3) for turn in range(2)}
    load = Load(TABLE, lambda: client, answers)
    load.start()
    _until(lambda: len(load.records) >= 10)
    with load.held():
        asked = len(request.node.server.asked)
        assert len(load.records) == asked - len(answers)
        _until(lambda: load.now_s() > 0.2)
        assert len(request.node.server.asked) == asked
    _until(lambda: len(load.records) >= asked + 5)
    load.stop_blocking()
    assert not any(record.error for record in load.records)
    assert all(record.answer == answers[record.question] for record in load.records)
    assert all(0 < record.ttft_s <= record.total_s for record in load.records)
    assert {record.question for record in load.records} == set(answers)


def test_a_reference_run_that_fails_is_no_reference(client: StreamClient, request: pytest.FixtureRequest) -> None:
    request.node.server.good_requests = 2
    with pytest.raises(Unreachable, match="the reference run failed: HTTP status 503"):
        reference_answers(TABLE, client)


def _until(holds: object) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
