"""The counters of a storage process reach its rank: soon after something happened, at its end, and never else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_hicache import wire
from sglang_hicache.workers.storage_process import StatsClock
from tests.processes.storage_world import Rank


class Clock:
    """Seconds, as the test says."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Rank]:
    started = Rank(tmp_path, "memory", {})
    started.opened()
    yield started
    started.close()


def _is_stats(message: wire.FromStorage) -> bool:
    return isinstance(message, wire.BackendStats)


def test_they_are_told_after_the_open_after_work_and_at_the_end(rank: Rank) -> None:
    assert rank.next_message(_is_stats).stats["used_pages"] == 0
    rank.write(1, 5)
    assert rank.end_of(1).pages == 5
    assert rank.next_message(lambda message: _is_stats(message) and message.stats["used_pages"] == 5)
    rank.write(2, 7)
    assert rank.end_of(2).pages == 7
    rank.client.stop()
    assert rank.exit_status() == 0
    assert [message.stats["used_pages"] for message in rank.heard if _is_stats(message)][-1] == 7


def test_an_idle_process_is_not_woken() -> None:
    """1. A report is due every second. 2. A server with nothing to do wakes up all night, on every rank."""
    clock = Clock()
    stats = StatsClock(clock)
    assert stats.wait_ms() is None and not stats.is_due()
    stats.activity()
    assert 0 < stats.wait_ms() <= 1001 and not stats.is_due()
    clock.now_s += 0.9
    stats.activity()  # steady work puts nothing off
    assert 0 < stats.wait_ms() <= 101
    clock.now_s += 0.1
    assert stats.wait_ms() <= 1
    clock.now_s += 0.01
    assert stats.is_due() and not stats.is_due()
    assert stats.wait_ms() > 1001, "told once more later, when the others on the folder are counted"
    clock.now_s += 4
    stats.activity()
    assert 0 < stats.wait_ms() <= 1001, "what happens meanwhile does not wait for that"
    clock.now_s += 1.1
    assert stats.is_due()
    clock.now_s += 5.1
    assert stats.is_due()
    assert stats.wait_ms() is None and not stats.is_due(), "and then asleep"
