"""A mirror lives with one dead store: nobody outside sees it, and it comes back when it can."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.checked import BatchResult
from sglang_hicache.storage.composite_member import FAILURES_IN_A_ROW
from sglang_hicache.storage.faulty import FaultyBackend
from sglang_hicache.storage.faulty_settings import Fault
from tests.storage import pages
from tests.storage.composite_world import Composite

Make = Callable[..., Composite]
_ALL_CALLS = ("exists", "read", "write", "touch", "delete", "set_aside", "clear")


def _kill(mirror: Composite, number: int) -> None:
    mirror.sabotage(number, *_ALL_CALLS)


def _away(mirror: Composite) -> list[int]:
    stats = mirror.backend.stats()
    return [stats[f"copy{number}_away"] for number in range(1, len(mirror.inside) + 1)]


class TestOneDies:
    @pytest.mark.parametrize("dead", [0, 1, 2])
    def test_nobody_outside_sees_that_one_is_dead(self, composite: Make, dead: int) -> None:
        mirror = composite("mirror", count=3)
        assert mirror.write(4) == BatchResult(4)
        assert [mirror.held(number) for number in range(3)] == [[1, 2, 3, 4]] * 3
        _kill(mirror, dead)
        for _ in range(3):
            assert mirror.read(4) == BatchResult(4)
            assert mirror.look_up(5) == 4
        assert mirror.write(4, first=5) == BatchResult(4)
        assert mirror.read(8) == BatchResult(8)
        mirror.store.touch_blocking(pages.keys(8))
        mirror.store.self_test_blocking(0)
        assert mirror.store.counters.get("retried_calls") == 0

    def test_one_that_fails_is_left_alone_and_tried_again_after_a_while(
        self, composite: Make, caplog: pytest.LogCaptureFixture
    ) -> None:
        mirror = composite("mirror", retry_initial_s=1.0, retry_max_s=3.0)
        mirror.write(2)
        _kill(mirror, 0)
        with caplog.at_level(logging.WARNING):
            for _ in range(FAILURES_IN_A_ROW + 5):
                mirror.look_up(2)
        struck = mirror.inside[0].stats()["faults_exists"]
        assert struck == FAILURES_IN_A_ROW and _away(mirror) == [1, 0]
        assert [record.getMessage() for record in caplog.records] == [
            "copy 1 (faulty) is left alone for 1 s: sabotaged exists"
        ]
        for wait_s in (1.0, 2.0, 3.0, 3.0):
            mirror.clock.now_s += wait_s - 0.1
            mirror.look_up(2)
            assert mirror.inside[0].stats()["faults_exists"] == struck, "asked too early"
            mirror.clock.now_s += 0.1
            mirror.look_up(2)
            mirror.look_up(2)
            struck += 1
            assert mirror.inside[0].stats()["faults_exists"] == struck, "asked once per wait"
        mirror.sabotage(0)
        mirror.clock.now_s += 3.0
        assert mirror.look_up(2) == 2 and _away(mirror) == [0, 0]
        assert caplog.records[-1].getMessage() == "copy 1 (faulty) answers again"
        assert mirror.backend.info()["copy1"] == "faulty: opened"

    def test_a_refusal_is_not_tried_three_times(self, composite: Make) -> None:
        mirror = composite("mirror")

        def refuse(names: object) -> int:
            raise StorageError("wrong password", "refused", "wrong_password")

        mirror.inside[0].exists_blocking = refuse
        mirror.look_up(1)
        assert _away(mirror) == [1, 0]
        assert mirror.backend.info()["copy1"] == "faulty: copy 1 (faulty) is left alone for 1.0 s: wrong password"

    def test_what_it_missed_comes_when_a_page_is_read_or_written_again(self, composite: Make) -> None:
        mirror = composite("mirror")
        _kill(mirror, 0)
        mirror.write(6)
        assert (mirror.held(0), mirror.held(1)) == ([], [1, 2, 3, 4, 5, 6])
        mirror.sabotage(0)
        mirror.clock.now_s += 60
        assert mirror.look_up(6) == 6
        assert mirror.read(2) == BatchResult(2)
        mirror.idle()
        assert mirror.held(0) == [1, 2]
        mirror.write(4)
        assert mirror.held(0) == [1, 2, 3, 4]

    def test_without_repair_a_read_writes_nothing(self, composite: Make) -> None:
        mirror = composite("mirror", repair=False)
        mirror.write(2)
        mirror.drop(0, 1)
        assert mirror.read(2) == BatchResult(2)
        mirror.idle()
        assert mirror.held(0) == [2]

    def test_pages_that_two_lack_in_turn_are_found_in_both(self, composite: Make) -> None:
        mirror = composite("mirror")
        mirror.write(8)
        mirror.drop(0, 3, 4)
        mirror.drop(1, 1, 6)
        assert mirror.look_up(8) == 8
        assert mirror.read(8) == BatchResult(8)

    def test_a_damaged_page_costs_nothing_while_another_copy_is_whole(self, composite: Make) -> None:
        mirror = composite("mirror")
        mirror.write(3)
        mirror.damage(0, 2)
        assert mirror.read(3) == BatchResult(3)
        mirror.idle()
        assert mirror.is_whole(0, 2)

    def test_all_dead_is_the_error_of_the_first(self, composite: Make) -> None:
        mirror = composite("mirror")
        mirror.write(2)
        _kill(mirror, 0)
        _kill(mirror, 1)
        for _ in range(FAILURES_IN_A_ROW + 2):
            with pytest.raises(StorageError, match="sabotaged exists"):
                mirror.look_up(2)
        assert mirror.read(2).reason.startswith("io: copy 1 (faulty) is left alone")
        assert mirror.write(2, first=3).reason.startswith("io: copy 1 (faulty) is left alone")
        for call in (mirror.store.clear_blocking, lambda: mirror.backend.delete_blocking([])):
            with pytest.raises(StorageError, match="copy 1|sabotaged"):
                call()


class TestMinWrites:
    @pytest.mark.parametrize(("min_writes", "written"), [(1, 4), (2, 4), (3, 0)])
    def test_written_is_what_enough_stores_took(self, composite: Make, min_writes: int, written: int) -> None:
        mirror = composite("mirror", count=3, min_writes=min_writes)
        mirror.sabotage(2, "write")
        assert mirror.write(4).pages == written

    def test_a_batch_ends_at_the_page_that_too_few_took(self, composite: Make) -> None:
        mirror = composite("mirror", min_writes=2)
        mirror.sabotage(1, "write", kind="no_space", first=2)
        assert mirror.write(4) == BatchResult(2, reason="no_space: copy 2 (faulty): sabotaged write")

    @pytest.mark.parametrize(("min_writes", "kinds", "durable"), [
        (1, ("memory", "file"), False), (2, ("memory", "file"), True), (1, ("file", "file"), True),
        (2, ("memory", "memory"), False),
    ])  # fmt: skip
    def test_durable_if_one_of_any_that_took_it_is(
        self, min_writes: int, kinds: tuple[str, str], durable: bool, tmp_path: Path
    ) -> None:
        inside = [
            {"backend": kind, "extra_config": {"file_storage_path": str(tmp_path / str(i))} if kind == "file" else {}}
            for i, kind in enumerate(kinds)
        ]
        backend = pages.backend("mirror", {"copies": inside, "min_writes": min_writes})
        assert backend.capabilities.durable is durable
        backend.close_blocking()


class TestOpening:
    @pytest.mark.parametrize("dead", [0, 1])
    def test_it_opens_without_one_and_takes_it_in_when_it_is_there(
        self, dead: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        mirror = Composite("mirror")
        mirror.sabotage(dead, "open")
        try:
            with caplog.at_level(logging.WARNING):
                mirror.backend.open_blocking()
            assert f"opened without copy {dead + 1} (faulty): sabotaged open" in caplog.messages
            assert mirror.write(2) == BatchResult(2)
            mirror.backend.use_namespace("77" * 32)
            assert mirror.remade == [], "tried again at once"
            mirror.clock.now_s += 1.0
            assert mirror.look_up(2) == 2
            mirror.idle()
            assert mirror.remade == [dead]
            assert _away(mirror) == [0, 0]
            assert mirror.inside[dead]._inner._in_use == {"77" * 32}
            mirror.write(2)
            assert mirror.held(dead) == [1, 2]
        finally:
            mirror.backend.close_blocking()

    def test_one_that_stays_dead_is_tried_less_and_less_often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        mirror = Composite("mirror", retry_max_s=4.0)
        make = mirror._make

        def make_dead(number: int) -> FaultyBackend:
            made = make(number)
            made.open_blocking = mirror.inside[1].open_blocking
            return made

        monkeypatch.setattr(mirror, "_make", make_dead)
        mirror.sabotage(1, "open")
        try:
            mirror.backend.open_blocking()
            for tries, wait_s in enumerate((1.0, 2.0, 4.0, 4.0), start=1):
                mirror.clock.now_s += wait_s - 0.1
                mirror.look_up(1)
                mirror.idle()
                assert len(mirror.remade) == tries - 1
                mirror.clock.now_s += 0.1
                mirror.look_up(1)
                mirror.idle()
                mirror.look_up(1)
                assert len(mirror.remade) == tries
        finally:
            mirror.backend.close_blocking()

    def test_one_without_room_to_open_is_not_tried_by_every_call(self) -> None:
        mirror = Composite("mirror")
        mirror.sabotage(1, "open", kind="no_space")
        try:
            mirror.backend.open_blocking()
            mirror.look_up(1)
            mirror.idle()
            assert mirror.remade == []
            assert "is left alone for 1.0 s: sabotaged open" in mirror.backend.info()["copy2"]
        finally:
            mirror.backend.close_blocking()

    def test_one_that_meets_a_defect_while_it_opens_is_closed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Made anew time and again, it would leave a connection behind each time."""
        mirror = Composite("mirror")
        make = mirror._make
        closed: list[int] = []

        def make_defective(number: int) -> FaultyBackend:
            made = make(number)
            made.sabotage({"open": Fault(kind="exception")})
            made.close_blocking = lambda: closed.append(number)
            return made

        monkeypatch.setattr(mirror, "_make", make_defective)
        mirror.sabotage(1, "open")
        try:
            mirror.backend.open_blocking()
            for tries in (1, 2):
                mirror.clock.now_s += 10
                mirror.look_up(1)
                mirror.idle()
                mirror.look_up(1)
                assert mirror.remade == closed == [1] * tries, "closed, and not tried again at once"
        finally:
            mirror.backend.close_blocking()
        assert closed == [1, 1]

    def test_the_latest_of_new_weights_is_the_last_that_it_hears(self) -> None:
        """1. The helper tells of the first ones.  2. The main thread tells of the next ones before that."""
        mirror = Composite("mirror")
        member, told = mirror.backend._members[0], ["11" * 32]
        memory = mirror.inside[0]._inner

        def tell(namespace: str) -> None:
            if len(told) == 1:
                told.append("22" * 32)
                member.use_namespace(told[-1])
            memory.use_namespace(namespace)

        mirror.inside[0].use_namespace = tell
        member.reopen_blocking(lambda: mirror.inside[0], lambda: told[-1])
        assert memory._in_use == {"22" * 32}
        mirror.backend.close_blocking()

    @pytest.mark.parametrize(("min_writes", "dead"), [(1, (0, 1)), (2, (1,))])
    def test_too_few_that_open_are_an_error(self, min_writes: int, dead: tuple[int, ...]) -> None:
        mirror = Composite("mirror", min_writes=min_writes)
        for number in dead:
            mirror.sabotage(number, "open")
        try:
            with pytest.raises(StorageError, match=rf"copy {dead[0] + 1} \(faulty\): sabotaged open"):
                mirror.backend.open_blocking()
        finally:
            mirror.backend.close_blocking()
