"""Keys that could not be read: how long they are left alone, and for how long they are known."""

from __future__ import annotations

from sglang_hicache.storage.negative import MOST_KEYS, NegativeCache
from tests.storage import pages


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_look_ups_end_in_front_of_a_key_until_its_time_is_over() -> None:
    clock = Clock()
    negative = NegativeCache(clock, ttl_s=60.0)
    assert negative.readable(pages.keys(5)) == 5
    negative.add(pages.key(3))
    negative.add(pages.key(5))
    assert negative.readable(pages.keys(5)) == 2
    assert negative.readable(pages.keys(2)) == 2
    clock.now_s += 59.9
    assert negative.readable(pages.keys(5)) == 2
    clock.now_s += 0.1
    assert negative.readable(pages.keys(5)) == 5


def test_a_key_is_known_after_its_time() -> None:
    """Its page is still in the store: a write that finds it there has not stored ours."""
    clock = Clock()
    negative = NegativeCache(clock, ttl_s=1.0)
    negative.add(pages.key(1))
    clock.now_s += 100.0
    assert pages.key(1) in negative
    assert pages.key(2) not in negative


def test_another_failure_begins_another_while() -> None:
    clock = Clock()
    negative = NegativeCache(clock, ttl_s=10.0)
    negative.add(pages.key(1))
    clock.now_s += 10.0
    negative.add(pages.key(1))
    assert negative.readable(pages.keys(1)) == 0
    assert len(negative) == 1


def test_a_page_that_was_read_or_written_is_forgotten() -> None:
    negative = NegativeCache(Clock(), ttl_s=60.0)
    negative.discard(pages.keys(3))
    for key in pages.keys(3):
        negative.add(key)
    negative.discard([pages.key(2), pages.key(9), pages.key(1)])
    assert (len(negative), negative.readable(pages.keys(3))) == (1, 2)


def test_no_time_to_live_blocks_nothing_and_still_knows() -> None:
    negative = NegativeCache(Clock(), ttl_s=0.0)
    negative.add(pages.key(1))
    assert negative.readable(pages.keys(1)) == 1
    assert pages.key(1) in negative


def test_the_oldest_keys_make_room() -> None:
    negative = NegativeCache(Clock(), ttl_s=60.0, most_keys=3)
    for number in (1, 2, 3, 1, 4):
        negative.add(pages.key(number))
    assert [pages.key(number) in negative for number in (1, 2, 3, 4)] == [True, False, True, True]


def test_memory_is_bounded() -> None:
    negative = NegativeCache(Clock(), ttl_s=60.0)
    for number in range(MOST_KEYS + 100):
        negative.add(pages.key(number))
    assert len(negative) == MOST_KEYS
