"""Sentences about stores inside another one."""

from __future__ import annotations

from sglang_hicache.scheduler.left_alone import left_alone


def test_a_store_inside_that_fails_is_named_and_one_that_is_well_is_not() -> None:
    stats = {"away_stores": 1, "copy1_away": 0, "copy2_away": 1, "copy2_failed_calls": 7, "copy1_copy3_away": 1}
    (told,) = left_alone(stats)
    assert told.startswith("copy 2 of the store fails and is left alone for now (backend_stats copy2_away; ")
    assert left_alone({"tier1_away": 1})[0].startswith("tier 1 of the store fails ")
    assert left_alone({"tier1_away": 0, "away_stores": 0}) == left_alone({}) == []
