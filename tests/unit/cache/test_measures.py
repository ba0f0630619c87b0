"""Buckets, and what the end of an op says about durations and bandwidths."""

import pytest

from sglang_hicache.cache.measures import GB_PER_S, LOAD_BACK_SECONDS, PAGES, Histogram, Measures
from sglang_hicache.cache.op import Op, OpKind


def ended(kind: OpKind, done: int = 0, seconds: float = 0.1, page_bytes: int = 10_000_000):
    """The histograms after one op."""
    measures = Measures(page_bytes)
    op = Op(1, kind, epoch=1, pages=8, started_us=5_000_000, done=done)
    measures.op_ended(op, 5_000_000 + round(seconds * 1e6), "file")
    return measures.snapshot()


def test_a_value_counts_in_the_first_bucket_that_holds_it():
    histogram = Histogram((1.0, 5.0))
    for value in (0, 1, 1.5, 5, 5.001, 1e9):
        histogram.observe(value)
    found = histogram.snapshot()
    assert (found.bounds, found.counts, found.total) == ((1.0, 5.0), (2, 2, 2), 12.501 + 1e9)


@pytest.mark.parametrize("kind", OpKind)
def test_every_kind_of_op_has_its_durations(kind):
    found = ended(kind, seconds=0.003)[f"op_duration_seconds/{kind.name.lower()}"]
    assert found.total == pytest.approx(0.003) and found.counts[found.bounds.index(0.005)] == 1 == sum(found.counts)


def test_copies_count_under_the_names_that_others_know():
    assert "hicache_backup_duration_seconds" in ended(OpKind.WRITE_THROUGH)
    assert "hicache_backup_duration_seconds" in ended(OpKind.DEMOTE)
    found = ended(OpKind.LOAD_BACK)
    assert found["load_back_duration_seconds"].bounds == LOAD_BACK_SECONDS
    assert "hicache_backup_duration_seconds" not in found


@pytest.mark.parametrize(
    ("kind", "direction"), [(OpKind.READ, "prefetch"), (OpKind.WRITE, "backup"), (OpKind.UPLOAD, "backup")]
)
def test_pages_and_bandwidth_of_the_backend(kind, direction):
    found = ended(kind, done=6, seconds=0.02)
    pages, bandwidth = found[f"{direction}_pgs/file"], found[f"{direction}_bandwidth/file"]
    assert (pages.bounds, pages.total) == (PAGES, 6)
    assert (bandwidth.bounds, bandwidth.total) == (GB_PER_S, pytest.approx(3.0))


@pytest.mark.parametrize("kind", [OpKind.READ, OpKind.WRITE, OpKind.LOOKUP])
def test_an_op_that_moved_nothing_says_nothing_about_bandwidth(kind):
    assert list(ended(kind)) == [f"op_duration_seconds/{kind.name.lower()}"]


def test_an_op_within_one_tick_has_no_bandwidth():
    assert "prefetch_bandwidth/file" not in ended(OpKind.READ, done=6, seconds=0)
