"""What a backend answers, however wrong, becomes numbers that hold."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.checked import BatchResult, CheckedStore
from tests.storage import pages
from tests.storage.conftest import Open


def _faulty(open_backend: Open, call: str, kind: str, **fault: Any) -> CheckedStore:
    return pages.store(open_backend("faulty", {"inner": "memory", "faults": {call: {"kind": kind, **fault}}}))


def _write(store: CheckedStore, count: int, first: int = 1) -> BatchResult:
    contents = [pages.content(first + index) for index in range(count)]
    parent = pages.key(first - 1) if first > 1 else b""
    return store.write_blocking(pages.keys(count, first), contents, parent, first - 1)


def test_pages_come_back_with_their_bytes(open_backend: Open) -> None:
    store = pages.store(open_backend("memory"))
    assert _write(store, 3) == BatchResult(3)
    targets = pages.empty(3)
    assert store.lookup_blocking(pages.keys(5)) == 3
    assert store.read_blocking(pages.keys(3), targets) == BatchResult(3)
    assert targets == [pages.content(number) for number in (1, 2, 3)]


def test_read_ends_at_the_first_page_that_is_missing(open_backend: Open) -> None:
    store = pages.store(open_backend("memory"))
    _write(store, 2)
    _write(store, 1, first=4)
    assert store.read_blocking(pages.keys(4), pages.empty(4)) == BatchResult(2, reason="miss")


def test_page_that_does_not_follow_the_one_before_it_is_refused(open_backend: Open) -> None:
    store = pages.store(open_backend("memory"))
    _write(store, 1)
    store.write_blocking([pages.key(2)], [pages.content(2)], pages.key(9), 1)
    assert store.read_blocking(pages.keys(2), pages.empty(2)).corrupt == 1


def test_page_that_does_not_follow_the_batch_before_it_is_refused(open_backend: Open) -> None:
    store = pages.store(open_backend("memory"))
    _write(store, 1, first=2)
    assert store.read_blocking([pages.key(2)], pages.empty(1), previous=pages.key(1)).pages == 1
    assert store.read_blocking([pages.key(2)], pages.empty(1), previous=pages.key(5)).corrupt == 1


@pytest.mark.parametrize("kind", ["flip", "short"])
def test_fm10_damaged_page_is_counted_and_removes_itself(open_backend: Open, kind: str) -> None:
    store = _faulty(open_backend, "read", kind, first=1, count=1)
    _write(store, 3)
    result = store.read_blocking(pages.keys(3), pages.empty(3))
    assert (result.pages, result.corrupt) == (1, 1)
    assert result.reason.startswith("corrupt: ")
    assert store.lookup_blocking(pages.keys(3)) == 1
    assert _write(store, 1, first=2) == BatchResult(1)
    assert store.read_blocking(pages.keys(3), pages.empty(3)) == BatchResult(3)


@pytest.mark.parametrize("kind", ["flip", "short"])
def test_fm10_all_damaged_pages_of_a_batch_remove_themselves_at_once(open_backend: Open, kind: str) -> None:
    store = _faulty(open_backend, "read", kind, first=1, count=3)
    _write(store, 6)
    targets = pages.empty(6)
    result = store.read_blocking(pages.keys(6), targets)
    assert (result.pages, result.corrupt) == (1, 3)
    assert targets[0] == pages.content(1)
    assert [store.lookup_blocking([pages.key(number)]) for number in range(1, 7)] == [1, 0, 0, 0, 1, 1]
    assert _write(store, 3, first=2) == BatchResult(3)
    assert store.read_blocking(pages.keys(6), pages.empty(6)) == BatchResult(6)


def test_fm10_page_behind_a_damaged_one_must_still_follow_it(open_backend: Open) -> None:
    store = _faulty(open_backend, "read", "flip", first=0, count=1)
    _write(store, 2)
    store.write_blocking([pages.key(3)], [pages.content(3)], pages.key(9), 2)
    result = store.read_blocking(pages.keys(3), pages.empty(3))
    assert (result.pages, result.corrupt) == (0, 2)
    assert [store.lookup_blocking([pages.key(number)]) for number in (1, 2, 3)] == [0, 1, 0]


def test_fm10_backend_may_stop_at_a_page_of_wrong_size(open_backend: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = open_backend("faulty", {"inner": "memory", "faults": {"read": {"kind": "short", "first": 1, "count": 1}}})
    store = pages.store(backend)
    _write(store, 3)
    read = backend.read_blocking
    monkeypatch.setattr(backend, "read_blocking", lambda batch: read(batch)[:2])
    result = store.read_blocking(pages.keys(3), pages.empty(3))
    assert (result.pages, result.corrupt, result.reason) == (1, 1, "corrupt: wrong size")


def test_miss_behind_a_damaged_page_is_no_damage(open_backend: Open) -> None:
    store = _faulty(open_backend, "read", "flip", first=0, count=1)
    _write(store, 2)
    assert store.read_blocking(pages.keys(4), pages.empty(4)) == BatchResult(0, 1, "corrupt: checksum")


def test_fm39_damage_on_the_way_in_is_found_on_the_way_out(open_backend: Open) -> None:
    store = _faulty(open_backend, "write", "flip", first=1, count=1)
    assert _write(store, 3) == BatchResult(3)
    result = store.read_blocking(pages.keys(3), pages.empty(3))
    assert (result.pages, result.corrupt) == (1, 1)


def test_stale_answer_of_exists_ends_in_a_miss(open_backend: Open) -> None:
    store = _faulty(open_backend, "exists", "stale")
    _write(store, 1)
    assert store.lookup_blocking(pages.keys(4)) == 4
    assert store.read_blocking(pages.keys(4), pages.empty(4)) == BatchResult(1, reason="miss")


@pytest.mark.parametrize("kind", ["none", "wrong_type", "short_list"])
@pytest.mark.parametrize("call", ["read", "write"])
def test_fm11_answer_that_is_no_list_of_outcomes_fails_the_call(open_backend: Open, call: str, kind: str) -> None:
    store = _faulty(open_backend, call, kind, first=1)
    _write(store, 2)
    with pytest.raises(StorageError) as caught:
        store.read_blocking(pages.keys(2), pages.empty(2))
        store.read_blocking(pages.keys(2), pages.empty(2))
        _write(store, 2, first=8)
    assert caught.value.reason == "contract"


@pytest.mark.parametrize("answer", [None, "2", True, -1, 3, 1.0, [1, 2]])
def test_fm11_answer_that_is_no_count_fails_the_call(
    open_backend: Open, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    backend = open_backend("memory")
    monkeypatch.setattr(backend, "exists_blocking", lambda names: answer)
    with pytest.raises(StorageError, match="exists answered") as caught:
        pages.store(backend).lookup_blocking(pages.keys(2))
    assert caught.value.reason == "contract"


@pytest.mark.parametrize("answer", [[None], ["hit"], [True], [object(), object()], (), {}, [b"x"]])
def test_fm11_outcome_that_is_none_of_ours_fails_the_call(
    open_backend: Open, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    backend = open_backend("memory")
    monkeypatch.setattr(backend, "read_blocking", lambda pages: answer)
    with pytest.raises(StorageError) as caught:
        pages.store(backend).read_blocking([pages.key(1)], pages.empty(1))
    assert caught.value.reason == "contract"


def test_single_faults_of_pages_are_tried_again(open_backend: Open) -> None:
    store = _faulty(open_backend, "write", "error", first=2, count=2)
    assert _write(store, 4) == BatchResult(4)
    assert store.lookup_blocking(pages.keys(4)) == 4


def test_fault_that_stays_ends_the_batch_with_its_reason(open_backend: Open) -> None:
    store = _faulty(open_backend, "write", "error", first=2)
    assert _write(store, 4) == BatchResult(2, reason="io: sabotaged write")
    assert store.lookup_blocking(pages.keys(4)) == 2


def test_full_store_is_not_tried_again(open_backend: Open) -> None:
    backend = open_backend("faulty", {"inner": "memory", "faults": {"write": {"kind": "no_space"}}})
    assert _write(pages.store(backend), 1) == BatchResult(0, reason="no_space: sabotaged write")
    assert backend.stats()["faults_write"] == 1


def test_fault_of_a_whole_call_is_tried_again(open_backend: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = open_backend("memory")
    store = pages.store(backend)
    _write(store, 2)
    read, faults = backend.read_blocking, [StorageError("reset"), StorageError("reset")]

    def sometimes(batch: Any) -> Any:
        if faults:
            raise faults.pop()
        return read(batch)

    monkeypatch.setattr(backend, "read_blocking", sometimes)
    assert store.read_blocking(pages.keys(2), pages.empty(2)) == BatchResult(2)


def test_fm50_one_in_ten_failed_writes_leaves_99_of_100_pages_durable(open_backend: Open) -> None:
    store = _faulty(open_backend, "write", "error", share=0.1)
    written = sum(_write(store, 1, first=number).pages for number in range(1, 1001))
    found = sum(store.lookup_blocking([pages.key(number)]) for number in range(1, 1001))
    assert written == found >= 990


def test_fm31_model_with_the_same_name_finds_nothing_in_the_same_store(open_backend: Open) -> None:
    backend = open_backend("memory")
    assert _write(pages.store(backend), 3).pages == 3
    for other in ({"namespace": "77" * 32}, {"heads": (0, 4)}, {"heads": (2, 4)}):
        stranger = pages.store(backend, **other)
        assert stranger.lookup_blocking(pages.keys(3)) == 0
        assert stranger.read_blocking(pages.keys(3), pages.empty(3)) == BatchResult(0, reason="miss")
    assert pages.store(backend).lookup_blocking(pages.keys(3)) == 3


@pytest.mark.parametrize(
    ("call", "kind", "complaint"),
    [
        ("write", "error", "could not write"),
        ("write", "flip", "could not read back"),
        ("read", "disappear", "could not read back"),
        ("exists", "stale", "found a page that was never written"),
        ("delete", "error", "sabotaged delete"),
    ],
)
def test_fm43_self_test_refuses_a_store_that_keeps_nothing(
    open_backend: Open, call: str, kind: str, complaint: str
) -> None:
    store = _faulty(open_backend, call, kind)
    with pytest.raises(StorageError, match=complaint):
        store.self_test_blocking(rank=1)


def test_fm43_self_test_refuses_a_store_whose_writes_are_never_found(
    open_backend: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = open_backend("memory")
    monkeypatch.setattr(backend, "exists_blocking", lambda names: 0)
    with pytest.raises(StorageError, match="does not find the page it has just written"):
        pages.store(backend).self_test_blocking(rank=0)


def test_self_test_leaves_nothing_behind(open_backend: Open) -> None:
    backend = open_backend("memory")
    pages.store(backend).self_test_blocking(rank=0)
    assert backend.stats() == {"objects": 0}
