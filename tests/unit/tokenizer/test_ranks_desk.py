"""The desk: ids, deadlines, merging, and answers that nobody waits for."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from sglang_hicache.tokenizer.ranks_desk import MOST_LATE, Outcome, RanksDesk, Result, merge, new_id
from sglang_hicache.wire import CommandAnswer, FlushCache, QueryStatus, Shutdown, StatusAnswer


class Port:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: Any) -> bool:
        self.sent.append(message)
        return True


class Bench:
    """A desk over two ports, inside a running loop."""

    def __init__(self, **options: float) -> None:
        self.ports = [Port(), Port()]
        self.desk = RanksDesk(self.ports, **options)
        #: Outcomes that came after the deadline.
        self.late: list[Outcome] = []

    def flush(self, deadline_s: float) -> asyncio.Task[Outcome]:
        order = FlushCache(id=new_id(), deadline_s=deadline_s)
        return asyncio.ensure_future(self.desk.command(order, self.late.append))

    async def sent(self, count: int) -> list[Any]:
        """What rank 0 got, once it has got that many."""
        while len(self.ports[0].sent) < count:
            await asyncio.sleep(0)
        return self.ports[0].sent

    def answer(self, id: str, rank: int, success: bool = True, message: str = "done") -> None:
        self.desk.deliver(CommandAnswer(id=id, rank=rank, success=success, message=message))


def run(scenario: Any) -> Any:
    return asyncio.run(asyncio.wait_for(scenario, 10))


def test_two_commands_at_once_keep_their_answers_apart() -> None:
    async def scenario() -> tuple[Outcome, Outcome]:
        bench = Bench()
        tasks = bench.flush(30), bench.flush(30)
        first, second = await bench.sent(2)
        bench.answer(second.id, 0, message="second")
        bench.answer(first.id, 1, message="first")
        bench.answer(second.id, 1, message="second")
        bench.answer(first.id, 0, message="first")
        return await tasks[0], await tasks[1]

    first, second = run(scenario())
    assert (first.message, second.message) == ("first", "second")
    assert first.operation_id != second.operation_id
    assert first.result is second.result is Result.SUCCEEDED


def test_deadline_then_unknown_then_the_late_answer_goes_to_its_own_command() -> None:
    """The reference handed a late reply to whoever asked next."""

    async def scenario() -> tuple[Outcome, Outcome, list[Outcome]]:
        bench = Bench(grace_s=0.01)
        early = bench.flush(0.01)
        [sent] = await bench.sent(1)
        bench.answer(sent.id, 1)
        unknown = await early
        task = bench.flush(30)
        again = (await bench.sent(2))[1]
        bench.answer(sent.id, 0, success=False, message="late")
        bench.answer(again.id, 0)
        bench.answer(again.id, 1)
        return unknown, await task, bench.late

    unknown, known, [late] = run(scenario())
    assert unknown.result is Result.UNKNOWN
    assert unknown.operation_id in unknown.message
    assert "rank 0" in unknown.message and "answered: 1" in unknown.message
    assert sorted(unknown.answers) == [1]
    assert known.result is Result.SUCCEEDED and known.message == "done"
    assert late.operation_id == unknown.operation_id and late.result is Result.FAILED
    assert late.message == "late | done" and sorted(late.answers) == [0, 1]


def test_late_answers_are_not_waited_for_without_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def scenario() -> tuple[list[str], list[Outcome]]:
        bench = Bench(grace_s=0.0)
        for _ in range(MOST_LATE + 1):
            await bench.flush(0.0)
        first, second, *_ = bench.ports[0].sent
        for rank in (0, 1):
            bench.answer(first.id, rank)
            bench.answer(second.id, rank)
        return [second.id], bench.late

    second, late = run(scenario())
    assert [outcome.operation_id for outcome in late] == second
    assert "nobody waits for" in caplog.text


def test_an_answer_given_twice_or_of_a_wrong_kind_counts_once() -> None:
    async def scenario() -> Outcome:
        bench = Bench()
        task = bench.flush(30)
        [sent] = await bench.sent(1)
        bench.answer(sent.id, 0)
        bench.answer(sent.id, 0, success=False)
        bench.answer(sent.id, 7, success=False)
        bench.desk.deliver(StatusAnswer(id=sent.id, rank=1, state="detached", epoch=0))
        assert not task.done()
        bench.answer(sent.id, 1)
        return await task

    assert run(scenario()).result is Result.SUCCEEDED


def test_status_of_a_silent_rank_is_none() -> None:
    async def scenario() -> list[StatusAnswer | None]:
        bench = Bench(status_timeout_s=0.01)
        task = asyncio.ensure_future(bench.desk.status())
        [query] = await bench.sent(1)
        assert isinstance(query, QueryStatus)
        bench.desk.deliver(StatusAnswer(id=query.id, rank=1, state="attached", epoch=1))
        return await task

    first, second = run(scenario())
    assert first is None
    assert second is not None and second.state == "attached"


def test_ready_means_that_every_rank_answers() -> None:
    async def scenario() -> None:
        bench = Bench(status_timeout_s=0.0)
        task = asyncio.ensure_future(bench.desk.wait_ready())
        [query] = await bench.sent(1)
        bench.desk.deliver(StatusAnswer(id=query.id, rank=1, state="detached", epoch=0))
        await asyncio.sleep(0)
        assert not task.done()
        bench.desk.deliver(StatusAnswer(id=query.id, rank=0, state="detached", epoch=0))
        await task

    run(scenario())


def test_shutdown_goes_to_the_leader_alone() -> None:
    bench = Bench()
    bench.desk.shutdown()
    assert isinstance(bench.ports[0].sent[0], Shutdown)
    assert bench.ports[1].sent == []


@pytest.mark.parametrize(
    ("answers", "result", "message"),
    [
        ([(0, True, "a"), (1, True, "a")], Result.SUCCEEDED, "a"),
        ([(1, True, "b"), (0, True, "a")], Result.SUCCEEDED, "a | b"),
        ([(0, True, "a"), (1, False, "b")], Result.FAILED, "a | b"),
        ([(0, False, ""), (1, False, "")], Result.FAILED, ""),
    ],
)
def test_merge(answers: list[tuple[int, bool, str]], result: Result, message: str) -> None:
    given = {rank: CommandAnswer(id="x", rank=rank, success=ok, message=text) for rank, ok, text in answers}
    outcome = merge("x", given, 2, 1.0)
    assert (outcome.result, outcome.message) == (result, message)


def test_one_failure_and_one_silence_is_unknown_and_tells_both() -> None:
    outcome = merge("op", {1: CommandAnswer(id="op", rank=1, success=False, message="no space")}, 2, 30.0)
    assert outcome.result is Result.UNKNOWN
    assert "rank 0" in outcome.message and "no space" in outcome.message
