"""Calls side by side: at the same time, answers in order, and an end that is heard by all threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from sglang_hicache.storage.side_by_side import SideBySide

_PATIENCE_S = 60.0


@pytest.fixture
def four() -> Iterator[SideBySide]:
    made = SideBySide("test", 4)
    yield made
    made.close_blocking()


def test_answers_come_in_order(four: SideBySide) -> None:
    assert four.run_blocking(lambda number: number * number, range(100), lambda _: True) == [n * n for n in range(100)]
    assert four.run_blocking(lambda number: number, [], lambda _: True) == []


def test_as_many_as_there_are_threads_are_under_way(four: SideBySide) -> None:
    together = threading.Barrier(4)
    assert len(four.run_blocking(lambda _: together.wait(_PATIENCE_S), range(8), lambda _: True)) == 8


def test_one_thing_is_done_by_whoever_asks(four: SideBySide) -> None:
    assert four.run_blocking(lambda _: threading.current_thread(), [0], lambda _: True) == [threading.current_thread()]


def test_an_answer_that_ends_it(four: SideBySide) -> None:
    """What comes before it is complete, although other threads were behind it already."""
    behind = threading.Event()

    def call(number: int) -> int:
        if number == 3:
            behind.set()  # the first one is still under way
        if number == 0:
            assert behind.wait(_PATIENCE_S)
        return number

    assert four.run_blocking(call, range(1000), lambda number: number != 3) == [0, 1, 2, 3]


def test_nobody_goes_on_after_the_end(four: SideBySide) -> None:
    called: list[int] = []
    four.run_blocking(lambda number: called.append(number), range(1000), lambda _: False)
    assert len(called) <= 4


def test_a_defect_is_heard_when_all_threads_are_done(four: SideBySide) -> None:
    """Host memory may be somebody else's as soon as the call returns."""
    inside, failed, busy = threading.Event(), threading.Event(), threading.Event()

    def call(number: int) -> None:
        if number == 0:
            assert inside.wait(_PATIENCE_S)
            failed.set()
            raise RuntimeError("a defect")
        inside.set()
        assert failed.wait(_PATIENCE_S)
        busy.set()

    with pytest.raises(RuntimeError, match="a defect"):
        four.run_blocking(call, range(1000), lambda _: True)
    assert busy.is_set()


def test_a_machine_that_starts_no_thread_more(four: SideBySide, monkeypatch: pytest.MonkeyPatch) -> None:
    """1. The first helper fills host memory; the second cannot be started.
    2. Whoever asked would be told so at once, and give the memory to others, which the first helper goes on filling.
    So the rest is done without it."""
    start, started = threading.Thread.start, []

    def start_one(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    # Two are under way at once: the first helper, and whoever asks.
    together = threading.Barrier(2)
    assert len(four.run_blocking(lambda _: together.wait(_PATIENCE_S), range(8), lambda _: True)) == 8
    assert len(started) == 1
