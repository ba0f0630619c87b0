"""What a rank tells Python's garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from sglang_hicache.collector import THRESHOLDS, settle_collector


@pytest.fixture(autouse=True)
def collector_as_it_was() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


class _Cycle:
    def __init__(self) -> None:
        self.own = self


def test_what_is_there_is_never_walked_again() -> None:
    long_lived = [[number] for number in range(1000)]
    settle_collector()
    assert gc.get_threshold() == THRESHOLDS
    assert gc.get_freeze_count() > len(long_lived)
    assert not any(found is long_lived for found in gc.get_objects())


def test_garbage_from_before_is_collected_not_kept_for_ever() -> None:
    gc.disable()
    try:
        garbage = weakref.ref(_Cycle())
        settle_collector()
    finally:
        gc.enable()
    assert garbage() is None


def test_cycles_of_later_are_still_collected() -> None:
    settle_collector()
    garbage = weakref.ref(_Cycle())
    gc.collect()
    assert garbage() is None
