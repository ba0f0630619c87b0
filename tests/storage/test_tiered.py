"""Tiers: the near one is quick, the far one keeps, and only the trouble of the last one is seen outside."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.backend import PageOutcome, PageResult
from sglang_hicache.storage.checked import BatchResult
from sglang_hicache.storage.composite_helper import Helper
from sglang_hicache.storage.faulty import Gate
from sglang_hicache.storage.faulty_settings import Fault
from sglang_hicache.storage.page_format import IncomingPage
from tests.storage import pages
from tests.storage.composite_world import Composite
from tests.storage.conftest import Open

Make = Callable[..., Composite]


class TestReading:
    def test_a_page_goes_to_all_tiers_and_comes_from_the_nearest(self, composite: Make) -> None:
        tiers = composite("tiered", count=3)
        assert tiers.write(4) == BatchResult(4)
        assert [tiers.held(number) for number in range(3)] == [[1, 2, 3, 4]] * 3
        assert tiers.read(4) == BatchResult(4)
        assert [tiers.backend.stats().get(f"tier{number}_read_pages", 0) for number in (1, 2, 3)] == [4, 0, 0]

    def test_a_lookup_counts_over_all_tiers_up_to_the_first_gap_of_all(self, composite: Make) -> None:
        tiers = composite("tiered")
        tiers.write(8)
        tiers.drop(0, 3, 4, 8)
        tiers.drop(1, 1, 2, 6, 8)
        assert tiers.look_up(8) == 7
        assert tiers.look_up(2, first=8) == 0
        assert tiers.look_up(0) == 0

    def test_a_lookup_asks_no_tier_without_end(self, composite: Make) -> None:
        """Every other page in every other tier: the hint becomes short, reads find what there is."""
        tiers = composite("tiered")
        tiers.write(20)
        tiers.drop(0, *range(2, 21, 2))
        tiers.drop(1, *range(1, 21, 2))
        assert tiers.look_up(20) == 6
        assert tiers.read(20) == BatchResult(20)

    def test_pages_from_farther_away_are_put_into_the_nearer_tiers(self, composite: Make) -> None:
        tiers = composite("tiered", count=3)
        tiers.write(6)
        tiers.drop(0, 2, 3, 5)
        tiers.drop(1, 3)
        assert tiers.read(6) == BatchResult(6)
        tiers.idle()
        assert tiers.held(0) == tiers.held(1) == [1, 2, 3, 4, 5, 6]
        assert all(tiers.is_whole(0, page) for page in range(1, 7))
        assert tiers.backend.stats()["copied_pages"] == 4
        tiers.read(6)
        assert tiers.backend.stats()["tier1_read_pages"] == 3 + 6

    def test_without_promotion_nothing_is_copied(self, composite: Make) -> None:
        tiers = composite("tiered", promote=False)
        tiers.write(3)
        tiers.drop(0, 2)
        assert tiers.read(3) == BatchResult(3)
        tiers.idle()
        assert tiers.held(0) == [1, 3]

    def test_a_page_that_no_tier_has_ends_the_read(self, composite: Make) -> None:
        tiers = composite("tiered")
        tiers.write(4)
        for number in range(2):
            tiers.drop(number, 3)
        assert tiers.read(4) == BatchResult(2, reason="miss")

    def test_a_tier_that_fails_while_reading_is_passed_over(self, composite: Make) -> None:
        tiers = composite("tiered")
        tiers.write(4)
        tiers.sabotage(0, "read", first=1, count=1)
        assert tiers.read(4) == BatchResult(4)
        assert tiers.backend.stats()["tier1_failed_calls"] == 1

    def test_a_tier_that_is_left_alone_by_now_is_not_asked_for_every_other_page(self, composite: Make) -> None:
        """Each call may take as long as its time-out."""
        tiers = composite("tiered", count=3)
        tiers.write(20)
        tiers.drop(1, *range(1, 21, 2))
        tiers.drop(2, *range(2, 21, 2))
        tiers.sabotage(0, "read")
        TestStoresThatStop._stops(tiers, 1)
        TestStoresThatStop._stops(tiers, 2)
        assert tiers.read(20) == BatchResult(20)
        assert tiers.backend.stats()["tier1_failed_calls"] == 3

    def test_what_nobody_could_say_is_an_error_and_no_miss(self, composite: Make) -> None:
        """Otherwise an outage of the far tier would look like a cold cache."""
        tiers = composite("tiered")
        tiers.write(2)
        tiers.drop(0, 2)
        tiers.sabotage(1, "read")
        assert tiers.read(2) == BatchResult(1, reason="io: tier 2 (faulty): sabotaged read")


class TestStoresThatStop:
    """A store may end a read at the first page that it lacks; what it then says of the pages behind is nothing."""

    @staticmethod
    def _stops(tiers: Composite, number: int, hashes: bool = False) -> None:
        """From now on; `hashes`: it reads side by side, so that pages behind the gap were filled."""
        inside = tiers.inside[number]
        read_blocking = inside.read_blocking

        def read_and_stop(asked: list[IncomingPage]) -> list[PageOutcome]:
            outcomes = read_blocking(asked)
            if hashes:
                for page in asked:
                    page.arrived(len(page.payload))
            return outcomes[: outcomes.index(PageResult.MISS) + 1] if PageResult.MISS in outcomes else outcomes

        inside.read_blocking = read_and_stop

    def test_all_pages_behind_the_gap_are_put_there(self, composite: Make) -> None:
        """With the first alone, files in front of a far store would take in one page for each read."""
        tiers = composite("tiered", count=3)
        tiers.write(8)
        tiers.drop(0, *range(2, 9))
        tiers.drop(1, 5)
        for number in range(3):
            self._stops(tiers, number)
        assert tiers.read(8) == BatchResult(8)
        tiers.idle()
        assert tiers.held(0) == tiers.held(1) == [1, 2, 3, 4, 5, 6, 7, 8]
        assert tiers.backend.stats()["copied_pages"] == 7 + 1

    def test_what_it_has_behind_the_gap_is_no_copy(self, composite: Make) -> None:
        tiers = composite("tiered")
        tiers.write(4)
        tiers.drop(0, 2)
        self._stops(tiers, 0)
        assert tiers.read(4) == BatchResult(4)
        tiers.idle()
        assert tiers.held(0) == [1, 2, 3, 4] and tiers.backend.stats()["copied_pages"] == 1

    def test_what_it_has_hashed_behind_the_gap_is_forgotten(self, composite: Make) -> None:
        """1. The near tier lacks a page, and has a damaged one behind it.  2. It is not asked for that one again.
        3. Bytes of the damaged page in the hash would make the whole one of the far tier look damaged, and cost it."""
        tiers = composite("tiered")
        tiers.write(6)
        tiers.drop(0, 2)
        tiers.damage(0, 4)
        self._stops(tiers, 0, hashes=True)
        assert tiers.read(6) == BatchResult(6)
        tiers.idle()
        assert tiers.is_whole(1, 4)


class TestDamage:
    @pytest.mark.parametrize("size", [None, 1000])
    def test_a_damaged_near_page_is_read_from_farther_away_at_once_and_healed(
        self, composite: Make, size: int | None
    ) -> None:
        tiers = composite("tiered")
        tiers.write(4)
        tiers.damage(0, 2, size)
        assert tiers.read(4) == BatchResult(4), "whoever asks sees no damage"
        tiers.idle()
        assert tiers.is_whole(0, 2)
        stats = tiers.backend.stats()
        assert (stats["healed_pages"], stats["tier1_damaged_pages"], stats["tier1_set_aside_pages"]) == (1, 1, 1)

    def test_a_damaged_far_page_is_found_when_the_near_one_is_gone(self, composite: Make) -> None:
        tiers = composite("tiered")
        tiers.write(2)
        tiers.damage(1, 2)
        assert tiers.read(2) == BatchResult(2)
        tiers.drop(0, 2)
        assert tiers.read(2) == BatchResult(1, corrupt=1, reason="corrupt: checksum")
        assert tiers.held(1) == [1]
        assert tiers.write(2) == BatchResult(2)
        assert tiers.is_whole(0, 2) and tiers.is_whole(1, 2)

    def test_a_page_that_is_damaged_everywhere_is_set_aside_everywhere(self, composite: Make) -> None:
        tiers = composite("tiered")
        tiers.write(4)
        for number in range(2):
            tiers.damage(number, 2)
        assert tiers.read(4) == BatchResult(1, corrupt=1, reason="corrupt: checksum")
        tiers.idle()
        assert tiers.held(0) == tiers.held(1) == [1, 3, 4]

    def test_damage_that_was_read_is_never_copied(self, composite: Make) -> None:
        tiers = composite("tiered", count=3)
        tiers.write(2)
        tiers.drop(0, 2)
        tiers.damage(1, 2)
        assert tiers.read(2) == BatchResult(2)
        tiers.idle()
        assert all(tiers.is_whole(number, 2) for number in range(3))

    def test_all_damaged_pages_of_a_batch_are_told_at_once(self, composite: Make) -> None:
        tiers = composite("tiered")
        tiers.write(6)
        for page in (2, 4, 6):
            tiers.damage(0, page)
            tiers.damage(1, page)
        assert tiers.read(6).corrupt == 3

    def test_a_tier_that_stops_at_damage_is_asked_for_what_is_behind_it(self, composite: Make) -> None:
        tiers = composite("tiered")
        tiers.write(6)
        read_blocking = tiers.inside[1].read_blocking

        def read_and_stop(asked: list[IncomingPage]) -> list[PageOutcome]:
            outcomes = read_blocking(asked)
            wrong = PageResult.WRONG_SIZE
            return outcomes[: outcomes.index(wrong) + 1] if wrong in outcomes else outcomes

        tiers.inside[1].read_blocking = read_and_stop
        tiers.drop(0, *range(1, 7))
        for page in (2, 5):
            tiers.damage(1, page, size=1000)
        assert tiers.read(6) == BatchResult(1, corrupt=2, reason="corrupt: wrong size")
        tiers.idle()
        assert tiers.held(0) == tiers.held(1) == [1, 3, 4, 6]

    def test_a_tier_that_may_have_a_whole_page_is_waited_for(self, composite: Make) -> None:
        """Damaged here, unknown there: called corrupt it would be set aside, and that would be the end of it."""
        tiers = composite("tiered")
        tiers.write(1)
        tiers.damage(0, 1)
        tiers.sabotage(1, "read", first=0, count=1)
        assert tiers.read(1) == BatchResult(1), "the second try gets it"


class TestWriting:
    def test_a_near_tier_without_room_fails_no_write(self, composite: Make) -> None:
        tiers = composite("tiered", rooms={0: 2})
        assert tiers.write(6) == BatchResult(6)
        assert len(tiers.held(0)) <= 2 and tiers.held(1) == [1, 2, 3, 4, 5, 6]
        assert tiers.read(6) == BatchResult(6)
        tiers.sabotage(0, "write", kind="no_space")
        assert tiers.write(4, first=7) == BatchResult(4)
        assert tiers.backend.stats()["tier1_away"] == 0, "a full store is well"

    @pytest.mark.parametrize(("required", "written"), [("last", 2), ("any", 4)])
    def test_written_is_what_the_required_tier_took(self, composite: Make, required: str, written: int) -> None:
        tiers = composite("tiered", required=required)
        tiers.sabotage(1, "write", first=2)
        result = tiers.write(4)
        assert result.pages == written
        assert ("sabotaged write" in result.reason) is (required == "last")

    def test_one_failure_is_tried_again_and_costs_no_tier_the_rest_of_the_batch(self, composite: Make) -> None:
        tiers = composite("tiered")
        tiers.sabotage(0, "write", first=1, count=1)
        assert tiers.write(4) == BatchResult(4)
        assert tiers.held(0) == [1, 2, 3, 4]

    def test_a_page_that_is_there_counts_as_there_and_missing_copies_are_made(self, composite: Make) -> None:
        tiers = composite("tiered")
        tiers.write(2)
        tiers.drop(1, 1)
        tiers.write(2)
        assert tiers.held(1) == [1, 2]
        assert tiers.store.counters.get("present_pages") == 2

    def test_deleted_pages_and_cleared_pages_count_once(self, composite: Make) -> None:
        tiers = composite("tiered", count=3)
        tiers.write(5)
        names = [pages.layout().name(key) for key in pages.keys(5)]
        assert tiers.backend.delete_blocking(names[:1]) == 1
        assert tiers.backend.delete_blocking(names[:2]) == 1
        assert tiers.backend.clear_blocking(pages.NAMESPACE) == 3
        assert [tiers.held(number) for number in range(3)] == [[]] * 3

    def test_a_clear_that_left_something_somewhere_says_so(self, composite: Make) -> None:
        tiers = composite("tiered")
        tiers.write(2)
        tiers.sabotage(0, "clear")
        with pytest.raises(StorageError, match="not cleared everywhere: tier 1 .*sabotaged clear"):
            tiers.store.clear_blocking()
        assert tiers.held(1) == []

    @pytest.mark.parametrize(("required", "kinds", "durable"), [
        ("last", ("memory", "file"), True), ("last", ("file", "memory"), False),
        ("any", ("memory", "file"), False), ("any", ("file", "file"), True),
    ])  # fmt: skip
    def test_durable_is_what_the_required_tier_is(
        self, required: str, kinds: tuple[str, str], durable: bool, tmp_path: Path
    ) -> None:
        inside = [
            {"backend": kind, "extra_config": {"file_storage_path": str(tmp_path / str(i))} if kind == "file" else {}}
            for i, kind in enumerate(kinds)
        ]
        backend = pages.backend("tiered", {"tiers": inside, "required": required})
        assert backend.capabilities.durable is durable
        backend.close_blocking()


class TestCopying:
    def test_a_copy_that_was_on_its_way_brings_back_nothing_that_was_deleted(self, composite: Make, gate: Gate) -> None:
        """1. A page is read and goes to the near tier.  2. It waits there.  3. The pages are cleared."""
        tiers = composite("tiered")
        tiers.write(2)
        tiers.drop(0, 1, 2)
        tiers.sabotage(0, "write", kind="hold", gate=str(gate.folder), count=1)
        assert tiers.read(2) == BatchResult(2)
        gate.wait_inside_blocking()
        clearing = threading.Thread(target=tiers.store.clear_blocking)
        clearing.start()
        pages.wait_until(lambda: tiers.backend._deletions == 1, "nobody clears")
        gate.go()
        clearing.join()
        tiers.idle()
        assert tiers.held(0) == tiers.held(1) == []

    def test_copies_that_do_not_fit_in_memory_are_dropped_and_counted(self, composite: Make, gate: Gate) -> None:
        tiers = composite("tiered")
        tiers.backend._helper._queue_bytes = 3 * pages.PAGE_BYTES
        tiers.write(6)
        tiers.drop(0, *range(1, 7))
        tiers.sabotage(0, "write", kind="hold", gate=str(gate.folder), count=1)
        assert tiers.read(1) == BatchResult(1)
        gate.wait_inside_blocking()
        assert tiers.read(5, first=2) == BatchResult(5)
        gate.go()
        tiers.idle()
        assert tiers.held(0) == [1, 2]
        assert tiers.backend.stats()["dropped_copies"] == 4

    def test_a_read_does_not_wait_for_its_copies(self, composite: Make, gate: Gate) -> None:
        tiers = composite("tiered")
        tiers.write(1)
        tiers.drop(0, 1)
        tiers.sabotage(0, "write", kind="hold", gate=str(gate.folder), count=1)
        target = pages.empty(1)[0]
        page = IncomingPage(pages.layout(), pages.key(1), target)
        assert tiers.backend.read_blocking([page]) == [PageResult.HIT]
        target[:] = bytes(pages.PAGE_BYTES)  # host memory is somebody else's now
        gate.wait_inside_blocking()
        gate.go()
        tiers.idle()
        assert tiers.is_whole(0, 1)

    def test_a_store_that_is_left_alone_keeps_no_copy_from_the_others(self, composite: Make, gate: Gate) -> None:
        mirror = composite("mirror", count=3)
        mirror.write(2)
        for number in range(2):
            mirror.drop(number, 1, 2)
        mirror.sabotage(1, "write", kind="hold", gate=str(gate.folder), count=1)
        assert mirror.read(2) == BatchResult(2)
        gate.wait_inside_blocking()
        mirror.sabotage(0, "exists")
        for _ in range(3):
            mirror.look_up(2)
        gate.go()
        mirror.idle()
        assert mirror.held(1) == [1, 2]

    def test_a_helper_that_met_a_defect_goes_on_with_the_next_job(self, caplog: pytest.LogCaptureFixture) -> None:
        seen: list[str] = []
        helper = Helper("helper")
        helper.offer(1, lambda: seen.append(str(1 // 0)))
        helper.offer(1, lambda: seen.append("done"))
        assert helper.wait_idle_blocking(pages.PATIENCE_S)
        helper.close_blocking()
        assert not helper.offer(1, lambda: None)
        assert seen == ["done"] and "ZeroDivisionError" in caplog.text

    def test_a_job_without_memory_is_taken_behind_one_that_is_larger_than_the_line(self) -> None:
        """A store that did not open is made anew in such a job, which is offered once."""
        go_on, seen = threading.Event(), list[str]()
        helper = Helper("helper", queue_bytes=10)
        try:
            assert helper.offer(100, lambda: seen.append(str(go_on.wait(pages.PATIENCE_S))))
            assert not helper.offer(1, lambda: None)
            assert helper.offer(0, lambda: seen.append("opened"))
            go_on.set()
            assert helper.wait_idle_blocking(pages.PATIENCE_S) and seen == ["True", "opened"]
        finally:
            go_on.set()
            helper.close_blocking()


class TestLanes:
    @pytest.mark.parametrize("name", ["tiered", "mirror"])
    def test_both_lanes_and_the_helper_at_once(self, composite: Make, name: str) -> None:
        """One lane reads, the other writes, deletes and clears, one store fails now and then; read() compares."""
        stores = composite(name, rooms={0: 8}, retry_initial_s=0.001, retry_max_s=0.001)
        for call in ("read", "write", "exists"):
            stores.inside[0]._faults[call] = Fault(kind="error", share=0.1)
        chance = random.Random(1)

        def write() -> None:
            names = [pages.layout().name(key) for key in pages.keys(12)]
            for _ in range(150):
                stores.clock.now_s += 1
                with suppress(StorageError):
                    match chance.randrange(4):
                        case 0:
                            stores.backend.delete_blocking([chance.choice(names)])
                        case 1:
                            stores.store.clear_blocking()
                        case _:
                            stores.write(12)

        with ThreadPoolExecutor(1) as lane:
            writing = lane.submit(write)
            while not writing.done():
                with suppress(StorageError):
                    stores.look_up(12)
                    stores.read(12)
            writing.result()
        stores.sabotage(0)
        stores.clock.now_s += 1
        stores.idle()
        stores.store.clear_blocking()
        assert stores.held(0) == stores.held(1) == []


class TestLife:
    @pytest.mark.parametrize(("dead", "required", "opens"), [
        (0, "last", True), (1, "last", False), (0, "any", True), (1, "any", True)
    ])  # fmt: skip
    def test_what_must_open(self, dead: int, required: str, opens: bool) -> None:
        tiers = Composite("tiered", required=required)
        tiers.sabotage(dead, "open")
        try:
            if opens:
                tiers.backend.open_blocking()
                assert tiers.backend.stats()[f"tier{dead + 1}_away"] == 1
            else:
                with pytest.raises(StorageError, match=r"tier 2 \(faulty\): sabotaged open"):
                    tiers.backend.open_blocking()
        finally:
            tiers.backend.close_blocking()

    def test_every_store_is_closed_although_one_cannot_be(self) -> None:
        tiers = Composite("tiered", count=3)
        tiers.backend.open_blocking()
        tiers.write(2)
        tiers.sabotage(1, "close")
        with pytest.raises(StorageError, match="sabotaged close"):
            tiers.backend.close_blocking()
        assert tiers.held(0) == tiers.held(2) == [], "memory is empty once it is closed"
        tiers.inside[1]._inner.close_blocking()

    def test_sizes_are_those_of_the_last_tier_and_counts_are_summed(self, composite: Make) -> None:
        tiers = composite("tiered", rooms={0: 2, 1: 50})
        tiers.write(6)
        stats = tiers.backend.stats()
        assert (stats["used_pages"], stats["tier1_used_pages"], stats["tier2_used_pages"]) == (6, 2, 6)
        assert stats["max_bytes"] == stats["tier2_max_bytes"] == 50 * (pages.PAGE_BYTES + 256)
        assert stats["no_space_pages"] == 1
        info = tiers.backend.info()
        assert info["tier1"] == info["tier2"] == "faulty: opened"

    def test_new_weights_are_told_to_all(self, composite: Make) -> None:
        tiers = composite("tiered")
        tiers.backend.use_namespace("77" * 32)
        assert [inner._inner._in_use for inner in tiers.inside] == [{"77" * 32}] * 2

    def test_a_touch_reaches_all_and_fails_only_if_all_do(self, composite: Make) -> None:
        tiers = composite("tiered")
        name = pages.layout().name(pages.key(1))
        tiers.sabotage(0, "touch")
        tiers.backend.touch_blocking([name])
        tiers.sabotage(1, "touch")
        with pytest.raises(StorageError):
            tiers.backend.touch_blocking([name])

    def test_pages_outlive_the_process_in_the_far_tier(self, open_backend: Open, root: Path) -> None:
        config = {"tiers": [
            {"backend": "memory"}, {"backend": "file", "extra_config": {"file_storage_path": str(root)}},
        ]}  # fmt: skip
        first = open_backend("tiered", config)
        contents = [pages.content(number) for number in range(3)]
        assert pages.store(first).write_blocking(pages.keys(3), contents, b"", 0).pages == 3
        second = open_backend("tiered", config)
        targets = pages.empty(3)
        assert pages.store(second).read_blocking(pages.keys(3), targets) == BatchResult(3)
        assert targets == contents
