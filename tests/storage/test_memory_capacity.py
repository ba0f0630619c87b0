"""The memory store stays within its limit, by itself, and takes the right pages out."""

from __future__ import annotations

import random

import pytest

from sglang_hicache.storage.backend import OpenContext
from sglang_hicache.storage.checked import CheckedStore
from sglang_hicache.storage.memory import DEFAULT_MAX_BYTES, MemoryBackend
from sglang_hicache.storage.page_format import HEADER_BYTES
from sglang_hicache.storage.settings import MemorySettings
from tests.storage import pages

PAGE = HEADER_BYTES + pages.PAGE_BYTES
CONTENT = pages.content(1)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _open(clock: Clock, **settings: object) -> tuple[MemoryBackend, CheckedStore]:
    context = OpenContext(rank=0, namespace=pages.NAMESPACE, page_bytes=pages.PAGE_BYTES)
    backend = MemoryBackend(MemorySettings(**settings), context, clock)
    return backend, pages.store(backend)


def _write(store: CheckedStore, numbers: list[int], parent: int | None = None, depth: int = 0) -> int:
    before = b"" if parent is None else pages.key(parent)
    return store.write_blocking([pages.key(n) for n in numbers], [CONTENT] * len(numbers), before, depth).pages


def _has(store: CheckedStore, number: int) -> bool:
    return store.lookup_blocking([pages.key(number)]) == 1


def test_default_is_four_gib(clock: Clock) -> None:
    backend, _ = _open(clock)
    assert backend.stats()["max_bytes"] == DEFAULT_MAX_BYTES == 4 << 30


def test_the_longest_unused_pages_make_room(clock: Clock) -> None:
    backend, store = _open(clock, max_size=10 * PAGE, low_watermark=0.5)
    for number in range(1, 10):
        clock.now_s += 1
        assert _write(store, [number]) == 1
        store.touch_blocking([pages.key(1)])
    clock.now_s += 1
    assert _write(store, [10]) == 1
    assert _has(store, 1) and _has(store, 9) and _has(store, 10)
    assert not _has(store, 2)
    stats = backend.stats()
    assert stats["evicted_pages"] == 5
    assert stats["used_bytes"] == stats["used_pages"] * PAGE <= 10 * PAGE


def test_a_chain_longer_than_the_store_loses_its_end_and_keeps_its_start(clock: Clock) -> None:
    backend, store = _open(clock, max_size=10 * PAGE)
    assert _write(store, list(range(1, 100))) <= 99
    length = store.lookup_blocking(pages.keys(99))
    assert 5 <= length <= 10
    assert backend.stats()["used_bytes"] <= 10 * PAGE


def test_pages_past_their_time_go_with_the_next_write(clock: Clock) -> None:
    backend, store = _open(clock, ttl_s=60)
    _write(store, [1, 2, 3])
    clock.now_s += 50
    store.touch_blocking(pages.keys(2))
    clock.now_s += 50
    _write(store, [9])
    assert [_has(store, number) for number in (1, 2, 3)] == [True, True, False]
    assert backend.stats()["expired_pages"] == 1
    assert backend.stats()["evicted_pages"] == 0


def test_pages_of_old_weights_go_first(clock: Clock) -> None:
    backend, store = _open(clock, max_size=10 * PAGE)
    _write(store, [1, 2])
    other = pages.store(backend, namespace="77" * 32)
    backend.use_namespace("77" * 32)
    clock.now_s -= 100
    assert _write(other, [21, 22, 23, 24, 25, 26, 27]) == 7
    assert _write(other, [28, 29]) == 2
    assert other.lookup_blocking(pages.keys(7, 21)) == 7
    assert not _has(store, 2)


def test_a_page_that_does_not_fit_is_refused_and_the_next_one_is_not(clock: Clock) -> None:
    backend, store = _open(clock, max_size=4 * PAGE)
    large = pages.store(backend, size=5 * PAGE)
    result = large.write_blocking([pages.key(1)], [pages.content(1, 5 * PAGE)], b"", 0)
    assert (result.pages, result.reason.split(":")[0]) == (0, "no_space")
    assert backend.stats()["no_space_pages"] == 1
    assert _write(store, [2]) == 1


def test_books_are_right_after_deletes_clears_and_other_sizes(clock: Clock) -> None:
    backend, store = _open(clock)
    _write(store, [1, 2, 3])
    pages.store(backend, heads=(2, 4)).write_blocking([pages.key(1)], [CONTENT], b"", 0)
    pages.store(backend, size=100).write_blocking([pages.key(2)], [pages.content(1, 100)], pages.key(1), 1)
    assert backend.stats()["used_bytes"] == 3 * PAGE + HEADER_BYTES + 100
    backend.delete_blocking([pages.layout().name(pages.key(1))])
    assert backend.stats()["used_bytes"] == 2 * PAGE + HEADER_BYTES + 100
    assert backend.clear_blocking(pages.NAMESPACE) == 3
    assert (backend.stats()["used_bytes"], backend.stats()["used_pages"]) == (0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_random_trees_stay_prefix_closed_within_the_limit(clock: Clock, seed: int) -> None:
    chance, paths = random.Random(seed), [[]]
    backend, store = _open(clock, max_size=40 * PAGE, high_watermark=0.9, low_watermark=0.6)
    for number in range(1, 400):
        clock.now_s += chance.random() * 2
        path = chance.choice(paths)
        if store.lookup_blocking([pages.key(n) for n in path]) == len(path):
            if path and chance.random() < 0.5:
                store.touch_blocking([pages.key(n) for n in path[chance.randrange(len(path)) :]])
            assert _write(store, [number], path[-1] if path else None, len(path)) == 1
            paths.append([*path, number])
        assert backend.stats()["used_bytes"] <= 40 * PAGE
    for path in paths:
        there = [_has(store, number) for number in path]
        assert there == sorted(there, reverse=True), path
    assert backend.stats()["evicted_pages"] > 100
