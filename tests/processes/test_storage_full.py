"""A storage process over a file store that is full: it says so, serves what it has, and takes pages again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache import wire
from sglang_hicache.storage.page_format import HEADER_BYTES
from tests.processes.storage_world import PAGE_BYTES, Rank

PAGE = HEADER_BYTES + PAGE_BYTES


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    ranks: list[Rank] = []

    def start_one(number: int, **config: Any) -> Rank:
        run_dir = tmp_path / f"run{number}"
        run_dir.mkdir()
        ranks.append(Rank(run_dir, "file", {"file_storage_path": str(tmp_path / "store"), **config}))
        ranks[-1].opened()
        return ranks[-1]

    yield start_one
    for rank in ranks:
        rank.close()


def _until(rank: Rank, holds: Callable[[dict[str, int]], bool]) -> dict[str, int]:
    """Numbers come after work: make some, until they are as they should be."""
    for number in range(1000, 1100):
        rank.read(number, 1, first=500)
        stats = rank.next_message(lambda message: isinstance(message, wire.BackendStats)).stats
        if holds(stats):
            return stats
    raise AssertionError(f"in the end: {stats}")


def test_fm53_writes_to_a_full_store_are_refused_with_their_reason_and_reads_are_served(start: Any) -> None:
    rank = start(0, max_size=3 * PAGE)
    rank.write(1, 8)
    end = rank.end_of(1)
    assert 1 <= end.pages < 8
    assert end.reason.startswith("no_space: no room for page")
    rank.read(2, 1)
    assert rank.end_of(2).pages == 1
    stats = _until(rank, lambda stats: stats["no_space_pages"] > 0)
    assert stats["max_bytes"] == 3 * PAGE >= stats["used_bytes"]


def test_fm53_by_default_a_store_is_bounded(start: Any) -> None:
    rank = start(0)
    rank.write(1, 3)
    assert rank.end_of(1).pages == 3
    stats = _until(rank, lambda stats: stats["max_bytes"] > 0)
    assert stats["max_bytes"] < stats["free_bytes"] + stats["used_bytes"]


def test_two_servers_on_one_folder_count_each_others_pages(start: Any) -> None:
    first, second = start(0), start(1)
    for rank, first_key in ((first, 1), (second, 100)):
        rank.write(1, 5, first=first_key)
        assert rank.end_of(1).pages == 5
    for rank in (first, second):
        assert _until(rank, lambda stats: stats["used_bytes"] == 10 * PAGE)["used_pages"] == 10
