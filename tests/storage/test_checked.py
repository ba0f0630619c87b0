"""What a backend answers, however wrong, becomes numbers that hold."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.backend import PageOutcome, PageResult, StorageBackend
from sglang_hicache.storage.checked import ATTEMPTS, BatchResult, CheckedStore, Shared
from sglang_hicache.storage.negative import NegativeCache
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


def test_a_disk_that_damages_every_page_does_not_flood_the_log(
    open_backend: Open, caplog: pytest.LogCaptureFixture
) -> None:
    store = _faulty(open_backend, "read", "flip")
    _write(store, 120)
    for number in range(1, 121):
        store.read_blocking([pages.key(number)], pages.empty(1))
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 9 + 9 + 1 and said[-1].endswith("is corrupt (checksum); it is set aside (100 so far)")
    assert store.counters.get("corrupt_pages") == 120


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


def test_a_store_without_room_passes_the_test(open_backend: Open, caplog: pytest.LogCaptureFixture) -> None:
    """A disk that others have filled: what lies in the store can be read all the same."""
    backend = open_backend("faulty", {"inner": "memory", "faults": {"write": {"kind": "no_space"}}})
    pages.store(backend).self_test_blocking(rank=0)
    assert "attached without room to write: no_space: " in caplog.text


def test_a_self_test_that_fails_leaves_nothing_behind(open_backend: Open) -> None:
    """Each attach to a store that cannot be read left a page that nobody could ever ask for."""
    backend = open_backend("faulty", {"inner": "memory", "faults": {"read": {"kind": "error"}}})
    with pytest.raises(StorageError, match="read back"):
        pages.store(backend).self_test_blocking(rank=0)
    assert backend.stats()["used_pages"] == 0


def test_self_test_leaves_nothing_behind(open_backend: Open) -> None:
    backend = open_backend("memory")
    pages.store(backend).self_test_blocking(rank=0)
    assert backend.stats()["used_pages"] == 0


class TestKeysThatCannotBeRead:
    """A store names a page and does not give it: once per while, and not for ever."""

    TTL_S = 60.0

    def _open(
        self, open_backend: Open, faults: dict[str, Any], ttl_s: float = TTL_S
    ) -> tuple[StorageBackend, CheckedStore, list[float]]:
        backend = open_backend("faulty", {"inner": "memory", "faults": faults})
        now_s = [1000.0]
        shared = Shared(negative=NegativeCache(lambda: now_s[0], ttl_s))
        return backend, CheckedStore(backend, pages.layout(), shared), now_s

    def _ask(self, store: CheckedStore, count: int) -> int:
        """What a request does: look up, read what was found."""
        found = store.lookup_blocking(pages.keys(count))
        return store.read_blocking(pages.keys(found), pages.empty(found)).pages if found else 0

    @pytest.mark.parametrize("fails", [PageResult.MISS, StorageError("timed out")], ids=["stale", "times-out"])
    def test_fm48_a_stale_key_costs_one_read_per_while_and_not_one_per_request(
        self, open_backend: Open, monkeypatch: pytest.MonkeyPatch, fails: PageOutcome
    ) -> None:
        backend, store, now_s = self._open(open_backend, {})
        _write(store, 5)
        bad, read, batches = pages.key(3), backend.read_blocking, []

        def failing(batch: Any) -> Any:
            batches.append(1)
            good = list(itertools.takewhile(lambda page: page.name.key != bad, batch))
            return [*read(good), fails]

        monkeypatch.setattr(backend, "read_blocking", failing)
        for _ in range(3):
            batches.clear()
            assert self._ask(store, 5) == 2
            first = len(batches)
            assert first == (1 if fails is PageResult.MISS else ATTEMPTS), "a fault is tried again on the spot"
            monkeypatch.setattr(backend, "read_blocking", read)
            assert [self._ask(store, 5) for _ in range(50)] == [2] * 50
            monkeypatch.setattr(backend, "read_blocking", failing)
            now_s[0] += self.TTL_S
        assert store.counters.get("negative_hits") == 3 * 50

    def test_fm48_look_ups_in_front_of_a_stale_key_go_on(self, open_backend: Open) -> None:
        _, store, _ = self._open(open_backend, {"exists": {"kind": "stale"}})
        _write(store, 2)
        assert self._ask(store, 5) == 2
        assert store.lookup_blocking(pages.keys(2)) == 2
        assert store.lookup_blocking(pages.keys(9, first=3)) == 0
        assert store.lookup_blocking(pages.keys(9, first=4)) == 9

    def test_a_store_that_never_tells_the_truth_shows_no_page_behind_a_hole_twice(self, open_backend: Open) -> None:
        _, store, _ = self._open(open_backend, {"exists": {"kind": "stale"}})
        _write(store, 2)
        _write(store, 3, first=4)
        assert self._ask(store, 6) == 2
        assert store.lookup_blocking(pages.keys(6)) == 2

    @pytest.mark.parametrize("ttl_s", [TTL_S, 0.0])
    def test_a_hole_heals_when_its_page_is_computed_again(self, open_backend: Open, ttl_s: float) -> None:
        _, store, _ = self._open(open_backend, {"exists": {"kind": "stale"}}, ttl_s)
        _write(store, 2)
        _write(store, 3, first=4)
        assert self._ask(store, 6) == 2
        # The rest of the prompt was computed; all of it is offered, and three of the four pages are there.
        assert _write(store, 4, first=3) == BatchResult(4)
        assert self._ask(store, 6) == 6
        assert store.counters.get("written_pages") == 6
        assert store.counters.get("present_pages") == 3

    def test_a_page_that_cannot_be_read_is_replaced_when_it_is_written(self, open_backend: Open) -> None:
        backend, store, now_s = self._open(open_backend, {"read": {"kind": "error", "first": 1, "count": ATTEMPTS}})
        _write(store, 3)
        assert self._ask(store, 3) == 1
        now_s[0] += 2 * self.TTL_S
        assert _write(store, 2, first=2) == BatchResult(2)
        assert store.counters.get("replaced_pages") == 1
        assert self._ask(store, 3) == 3

    @pytest.mark.parametrize(("call", "first"), [("delete", 0), ("write", 5)])
    def test_a_replacement_that_fails_is_a_failed_write(self, open_backend: Open, call: str, first: int) -> None:
        faults = {"read": {"kind": "error", "first": 1, "count": 2 * ATTEMPTS}, call: {"kind": "error", "first": first}}
        _, store, _ = self._open(open_backend, faults)
        _write(store, 3)
        assert self._ask(store, 3) == 1
        assert _write(store, 2, first=2) == BatchResult(0, reason=f"io: sabotaged {call}")

    def test_a_bad_page_that_cannot_be_set_aside_is_left_alone_and_replaced(self, open_backend: Open) -> None:
        faults = {"read": {"kind": "flip", "first": 1, "count": 1}, "set_aside": {"kind": "error", "count": 1}}
        _, store, _ = self._open(open_backend, faults)
        _write(store, 3)
        assert self._ask(store, 3) == 1
        assert store.lookup_blocking(pages.keys(3)) == 1
        assert (store.counters.get("corrupt_pages"), store.counters.get("set_aside_pages")) == (1, 0)
        assert _write(store, 2, first=2) == BatchResult(2)
        assert self._ask(store, 3) == 3

    def test_one_lane_knows_what_the_other_found(self, open_backend: Open) -> None:
        backend = open_backend("faulty", {"inner": "memory", "faults": {"exists": {"kind": "stale"}}})
        shared = Shared()
        reader, writer = (CheckedStore(backend, pages.layout(), shared) for _ in range(2))
        assert self._ask(reader, 1) == 0
        assert reader.lookup_blocking(pages.keys(1)) == 0
        _write(writer, 1)
        assert self._ask(reader, 1) == 1


def test_counters_say_what_went_either_way(open_backend: Open) -> None:
    store = _faulty(open_backend, "write", "error", first=3, count=1)
    _write(store, 4)
    _write(store, 1)
    store.lookup_blocking(pages.keys(9))
    store.read_blocking(pages.keys(4), pages.empty(4))
    assert store.counters.snapshot() == {
        "lookup_pages": 4,
        "present_pages": 1,
        "read_bytes": 4 * pages.PAGE_BYTES,
        "read_pages": 4,
        "recovered_calls": 1,
        "retried_calls": 1,
        "written_bytes": 4 * pages.PAGE_BYTES,
        "written_pages": 4,
    }


def test_counters_of_what_stays_wrong(open_backend: Open) -> None:
    store = _faulty(open_backend, "read", "error")
    _write(store, 1)
    store.read_blocking(pages.keys(1), pages.empty(1))
    counters = store.counters
    assert (counters.get("retried_calls"), counters.get("recovered_calls")) == (ATTEMPTS - 1, 0)
    broken = _faulty(open_backend, "read", "none")
    with pytest.raises(StorageError):
        broken.read_blocking(pages.keys(1), pages.empty(1))
    assert broken.counters.get("contract_faults") == 1


def test_self_test_is_not_counted(open_backend: Open) -> None:
    store = pages.store(open_backend("memory"))
    store.self_test_blocking(0)
    assert store.counters.snapshot() == {}
