"""The fake model answers the same whatever the cache did, and notices every page that does not fit."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hicache.cache.pools import HostPool
from sglang_hicache.errors import IntegrityError
from sglang_hicache.workers.batch import ForwardBatch, ForwardRow, RowSampling, Worker
from sglang_hicache.workers.synthetic import SyntheticWorker

GREEDY = RowSampling()
PROMPT = [7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5]


def make(page_size: int = 4, host: HostPool | None = None, **options: object) -> SyntheticWorker:
    worker = SyntheticWorker(**options)
    worker.load_blocking(page_size)
    worker.allocate(16, host)
    return worker


def run(worker: SyntheticWorker, tokens: list[int], prefix_len: int, pages: list[int]) -> int:
    """Compute tokens[prefix_len:]; the greedy next id."""
    row = ForwardRow(tokens[prefix_len:], prefix_len, pages, GREEDY)
    (next_id,) = worker.forward_blocking(ForwardBatch([row]))
    return next_id


@pytest.fixture
def host() -> Iterator[HostPool]:
    with HostPool(4, 2 * 4 * 8 * 4) as pool:
        yield pool


@given(
    tokens=st.lists(st.integers(0, 999), min_size=1, max_size=40),
    cuts=st.sets(st.integers(1, 39)),
    page_size=st.sampled_from([1, 4, 16]),
)
def test_chunks_and_decodes_give_the_same_ids_as_no_cache(tokens: list[int], cuts: set[int], page_size: int) -> None:
    worker = SyntheticWorker()
    worker.load_blocking(page_size)
    worker.allocate(64, None)
    pages = list(range(63, 0, -1))
    ends = [*sorted(cut for cut in cuts if cut < len(tokens)), len(tokens)]
    start = 0
    for end in ends:
        next_id = run(worker, tokens[:end], start, pages)
        start = end
    generated = [next_id]
    for _ in range(3):
        sequence = tokens + generated
        generated.append(run(worker, sequence, len(sequence) - 1, pages))
    assert generated == worker.reference(tokens, 4)
    assert worker.computed_tokens == len(tokens) + 3


def test_a_prefix_that_another_row_computed_gives_the_same_ids() -> None:
    worker = make()
    run(worker, PROMPT, 0, [1, 2, 3])
    assert run(worker, PROMPT, 8, [1, 2, 9]) == worker.reference(PROMPT, 1)[0]
    assert worker.computed_tokens == len(PROMPT) + 3


def test_another_prompts_prefix_gives_other_ids() -> None:
    worker = make()
    run(worker, [9] * 8 + PROMPT[8:], 0, [1, 2, 3])
    assert run(worker, PROMPT, 8, [1, 2, 9]) != worker.reference(PROMPT, 1)[0]


def test_rows_without_sampling_get_no_id() -> None:
    worker = make()
    rows = [ForwardRow(PROMPT[:4], 0, [1], None), ForwardRow(PROMPT, 0, [2, 3, 4], GREEDY)]
    assert worker.forward_blocking(ForwardBatch(rows)) == worker.reference(PROMPT, 1)


def test_sampling_depends_on_seed_and_position_only() -> None:
    worker = make()
    one = RowSampling(temperature=0.8, seed=1)
    assert worker.reference(PROMPT, 6, one) == worker.reference(PROMPT, 6, one)
    assert worker.reference(PROMPT, 6, one) != worker.reference(PROMPT, 6, RowSampling(temperature=0.8, seed=2))
    assert worker.reference(PROMPT, 6, RowSampling(temperature=0.8, top_k=1)) == worker.reference(PROMPT, 6)
    here = RowSampling(temperature=0.8, seed=1, position=len(PROMPT))
    row = ForwardRow(PROMPT, 0, [1, 2, 3], here)
    assert worker.forward_blocking(ForwardBatch([row])) == worker.reference(PROMPT, 1, one)


def test_ranks_agree_on_ids_and_other_models_do_not() -> None:
    assert make(rank=1, tp_size=2).reference(PROMPT, 8) == make(rank=0, tp_size=2).reference(PROMPT, 8)
    assert make(seed=1).reference(PROMPT, 8) != make(seed=0).reference(PROMPT, 8)


def test_ids_do_not_depend_on_the_interpreter() -> None:
    code = (
        "from sglang_hicache.workers.synthetic import SyntheticWorker as W;"
        f"w = W(); w.load_blocking(4); print(w.reference({PROMPT}, 8)); import sys; assert 'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(make().reference(PROMPT, 8))


# ----------------------------------------------------------------------------------------- wrong bytes


def _swapped(worker: SyntheticWorker) -> ForwardRow:
    run(worker, PROMPT, 0, [1, 2, 3])
    return ForwardRow(PROMPT[8:], 8, [2, 1, 9])


def _mixed(worker: SyntheticWorker) -> ForwardRow:
    run(worker, PROMPT, 0, [1, 2, 3])
    run(worker, [9] * 8, 0, [4, 2])  # page 2 was given to another sequence
    return ForwardRow(PROMPT[8:], 8, [1, 2, 9])


def _unwritten(worker: SyntheticWorker) -> ForwardRow:
    run(worker, PROMPT[:4], 0, [1])
    return ForwardRow(PROMPT[8:], 8, [1, 2, 9])


def _partial(worker: SyntheticWorker) -> ForwardRow:
    run(worker, PROMPT[:6], 0, [1, 2])
    return ForwardRow(PROMPT[8:], 8, [1, 2, 9])


def _overwriting(worker: SyntheticWorker) -> ForwardRow:
    run(worker, PROMPT[:8], 0, [1, 2])
    return ForwardRow(PROMPT[6:], 6, [1, 2, 9])


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_swapped, "device page 2, page 0 of a row with prefix 8, .* 4 positions of another sequence or place"),
        (_mixed, "device page 2, page 1 .* another sequence or place"),
        (_unwritten, "device page 2, page 1 .* holds nothing"),
        (_partial, "device page 2, page 1 .* must hold 4 positions .* holds 2 positions"),
        (_overwriting, "device page 2, page 1 .* must hold 2 positions .* holds 4 positions"),
        (lambda _: ForwardRow(PROMPT, 0, [1, 0, 2]), "device page 0 belongs to nobody"),
        (lambda _: ForwardRow(PROMPT, 0, [1, 2, 16]), "device page 16 belongs to nobody"),
        (lambda _: ForwardRow(PROMPT, 0, [1, 2]), r"computes positions 0\.\.11 on 2 pages"),
        (lambda _: ForwardRow([], 0, [1]), r"computes positions 0\.\.0"),
        (lambda _: ForwardRow(PROMPT, 0, [1, 2, 1]), "device page 1 is written by one row"),
    ],
)
def test_fm39_a_page_that_does_not_fit_is_named(prepare: Callable[[SyntheticWorker], ForwardRow], message: str) -> None:
    worker = make()
    row = prepare(worker)
    with pytest.raises(IntegrityError, match=message):
        worker.forward_blocking(ForwardBatch([row]))


def test_two_rows_must_not_meet_on_a_page() -> None:
    worker = make()
    run(worker, PROMPT[:4], 0, [1])
    reader, writer = ForwardRow(PROMPT[4:8], 4, [1, 2]), ForwardRow([9, 9], 0, [1])
    with pytest.raises(IntegrityError, match="device page 1 is written"):
        worker.forward_blocking(ForwardBatch([reader, writer]))


# ---------------------------------------------------------------------------------------------- copies


def test_pages_come_back_from_real_host_memory(host: HostPool) -> None:
    worker = make(host=host)
    run(worker, PROMPT, 0, [1, 2, 3])
    worker.copy_out(5, [1, 2], [3, 0])
    assert worker.finished_copies() == [5]
    assert worker.finished_copies() == []
    other = make(host=host)  # as after a restart: the bytes are all there is
    other.copy_in(6, [7, 8], [3, 0])
    assert run(other, PROMPT, 8, [7, 8, 9]) == other.reference(PROMPT, 1)[0]
    worker.close()
    other.close()


def test_pages_come_back_without_host_memory() -> None:
    worker = make()
    run(worker, PROMPT, 0, [1, 2, 3])
    worker.copy_out(5, [1, 2], [3, 0])
    run(worker, [9] * 8, 0, [1, 2])
    worker.copy_in(6, [7, 8], [3, 0])
    assert run(worker, PROMPT, 8, [7, 8, 9]) == worker.reference(PROMPT, 1)[0]
    with pytest.raises(IntegrityError, match="host page 2 is read, but nothing"):
        worker.copy_in(7, [7], [2])


@pytest.mark.parametrize("offset", [0, 20, 47, 255])
def test_a_flipped_byte_in_a_host_page_is_noticed(host: HostPool, offset: int) -> None:
    worker = make(host=host)
    run(worker, PROMPT, 0, [1, 2, 3])
    worker.copy_out(5, [1], [0])
    host.page(0)[offset] ^= 1
    with pytest.raises(IntegrityError, match="host page 0 holds wrong bytes"):
        worker.copy_in(6, [7], [0])


def test_another_ranks_page_is_noticed(host: HostPool) -> None:
    worker, other = (make(host=host, rank=rank, tp_size=2) for rank in (0, 1))
    run(worker, PROMPT, 0, [1, 2, 3])
    worker.copy_out(5, [1], [0])
    with pytest.raises(IntegrityError, match="host page 0 holds wrong bytes"):
        other.copy_in(6, [7], [0])


def test_only_full_pages_are_copied_out() -> None:
    worker = make()
    run(worker, PROMPT, 0, [1, 2, 3])
    with pytest.raises(IntegrityError, match="device page 3 is copied out with 3 of 4"):
        worker.copy_out(5, [3], [0])


def test_a_held_copy_out_keeps_what_it_was_given_and_delivers_late(host: HostPool) -> None:
    worker = make(host=host, holds_copies=True)
    run(worker, PROMPT, 0, [1, 2, 3])
    worker.copy_out(5, [1], [0])
    run(worker, [9] * 4, 0, [1])  # in stream order behind the copy: allowed
    assert worker.held_copies() == [5]
    assert worker.finished_copies() == []
    with pytest.raises(IntegrityError, match="host page 0 holds wrong bytes"):
        worker.host_content(0)  # published before it was there
    worker.copy_in(6, [7], [0])  # queued behind the copy that fills the page
    worker.finish_copy(5)
    worker.finish_copy(6)
    assert worker.finished_copies() == [5, 6]
    worker.copy_in(7, [7], [0])
    assert run(worker, PROMPT, 4, [7, 8, 9]) == worker.reference(PROMPT, 1)[0]


def test_the_reference_page_is_what_a_copy_brings(host: HostPool) -> None:
    worker = make(host=host)
    run(worker, PROMPT, 0, [1, 2, 3])
    worker.copy_out(5, [2], [0])
    assert bytes(host.page(0)) == worker.reference_page(PROMPT[:8])


def test_fm37_a_host_page_given_away_during_a_copy_is_noticed(host: HostPool) -> None:
    worker = make(host=host, holds_copies=True)
    run(worker, PROMPT, 0, [1, 2, 3])
    worker.copy_out(5, [1, 2], [0, 1])
    worker.finish_copy(5)
    worker.copy_in(6, [7], [0])
    worker.copy_in(7, [8], [0])  # two loads of one page may run at once
    with pytest.raises(IntegrityError, match="host page 0 of copy 8 still belongs to copy 6"):
        worker.copy_out(8, [2], [0])
    host.page(0)[:] = host.page(1)  # a storage read into a page that was freed too early
    with pytest.raises(IntegrityError, match="host page 0 was given away while copy 6 was reading it"):
        worker.finish_copy(6)


def test_a_copy_starts_once_and_in_pairs() -> None:
    worker = make(holds_copies=True)
    run(worker, PROMPT, 0, [1, 2, 3])
    worker.copy_out(5, [1], [0])
    with pytest.raises(IntegrityError, match="copy 5 was started twice"):
        worker.copy_out(5, [2], [1])
    with pytest.raises(IntegrityError, match="pairs 2 device with 1 host"):
        worker.copy_out(6, [1, 2], [1])


def test_repr_counts() -> None:
    worker = make(holds_copies=True)
    run(worker, PROMPT, 0, [1, 2, 3])
    worker.copy_out(5, [1], [0])
    assert repr(worker) == "<SyntheticWorker rank 0/1 computed_tokens=11 held_copies=1>"


def test_it_has_every_method_of_a_worker_with_the_same_parameters() -> None:
    for name, member in vars(Worker).items():
        if name.startswith("_"):
            continue
        if inspect.isfunction(member):
            assert inspect.signature(vars(SyntheticWorker)[name]).parameters == inspect.signature(member).parameters
        else:
            assert name in vars(SyntheticWorker) or name in vars(SyntheticWorker())


@pytest.mark.parametrize("pooled", [False, True])
def test_played_storage_moves_what_host_pages_hold(host: HostPool, pooled: bool) -> None:
    worker = make(host=host if pooled else None)
    run(worker, PROMPT, 0, [1, 2, 3])
    worker.copy_out(1, [1, 2], [0, 1])
    stored = [worker.host_content(page) for page in (0, 1)]
    other = make(host=None)
    for page, content in zip((3, 2), stored, strict=True):
        other.put_host_content(page, content)
    other.copy_in(1, [5, 6], [3, 2])
    assert run(other, PROMPT, 8, [5, 6, 7]) == run(worker, PROMPT, 8, [1, 2, 4])
    other.copy_in(2, [5, 6], [2, 3])
    with pytest.raises(IntegrityError, match="positions of another sequence"):
        run(other, PROMPT, 8, [5, 6, 7])
