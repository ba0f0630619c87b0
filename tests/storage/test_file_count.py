"""What a file store knows of its pages: sums that several processes share, and what disturbs the counting."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from sglang_hicache.storage import file_evictor, file_index
from sglang_hicache.storage.file_index import FileIndex
from sglang_hicache.storage.file_pages import QUARANTINE, USAGE
from tests.storage.conftest import Start
from tests.storage.store_world import OTHER, PAGE, numbers, put, stored_bytes


class TestCount:
    def test_nothing_counts_twice_and_nothing_is_forgotten(self, start: Start, root: Path) -> None:
        first, second = start(), start(rank=1)
        put(root, 1)
        first.tick()
        for number in range(2, 7):
            first.write(number)
            second.write(10 + number)
        for house in (first, second):
            house.share.look_blocking()
            assert house.share.view.used_bytes == 11 * PAGE == stored_bytes(root)
            assert house.share.view.own_files == 11
        second.close()
        first.tick()
        assert first.share.view.used_bytes == 11 * PAGE
        first.write(8)
        first.tick()
        first.close()
        third = start()
        third.share.look_blocking()
        assert third.share.view.used_bytes == 12 * PAGE, "before it has counted"
        third.tick()
        assert third.share.view.used_bytes == 12 * PAGE

    @pytest.mark.parametrize("is_told", [True, False])
    def test_a_page_deleted_during_the_count_is_not_less_than_none(
        self, start: Start, root: Path, monkeypatch: pytest.MonkeyPatch, is_told: bool
    ) -> None:
        """1. An attach tests the store with a page and tells so. 2. The first count begins. 3. The test is over: the
        page is deleted before its folder is listed. 4. The status said that the store holds -1 pages."""
        house = start()
        paths = [house.write(1)]

        def delete() -> None:
            while paths:
                paths.pop().unlink()
                house.share.changed(-PAGE, -1)
                if is_told:
                    house.share.tell()

        monkeypatch.setattr(house.evictor, "_breathe", delete)
        house.tick()
        assert house.share.view.used_bytes == 0 and house.share.view.own_files == 0
        house.now_s += 2
        house.tick()
        house.write(2)
        house.tick()
        assert house.share.view.used_bytes == PAGE and house.share.view.own_files == 1

    def test_a_removed_folder_and_removed_files_are_noticed(self, start: Start, root: Path) -> None:
        house = start()
        paths = [put(root, number) for number in range(5)]
        put(root, 9, namespace=OTHER)
        house.tick()
        paths[0].unlink()
        shutil.rmtree(root / OTHER)
        house.now_s += 601
        house.tick()
        assert house.share.view.used_bytes == 4 * PAGE
        assert house.share.view.other_files == 0

    @pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"bytes": "x"}'])
    def test_a_torn_sum_is_counted_anew(self, start: Start, root: Path, content: bytes) -> None:
        put(root, 1)
        start().close()
        (root / USAGE).write_bytes(content)
        house = start()
        house.share.look_blocking()
        assert house.share.claim(PAGE)
        house.tick()
        assert house.share.view.used_bytes == PAGE

    def test_what_cannot_be_read_is_not_ours_and_stops_nothing(
        self, start: Start, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(root, 1)
        monkeypatch.setattr(os, "pread", lambda *args: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        house = start(ttl_s=1)
        house.tick()
        assert numbers(root) == [1]
        assert house.share.view.foreign_files == 1

    def test_a_search_that_finds_nothing_is_not_repeated_at_once(
        self, start: Start, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        house = start(max_bytes=10 * PAGE)
        (root / QUARANTINE).mkdir()
        (root / QUARANTINE / f"{'0' * 20}-{'5a' * 8}-{'00' * 32}.0-2.page").write_bytes(bytes(20 * PAGE))
        house.tick()
        assert house.share.view.used_bytes == 20 * PAGE
        monkeypatch.setattr(house.evictor, "_evict", lambda unused_since: pytest.fail("searched again"))
        monkeypatch.setattr(file_evictor.time, "monotonic", lambda: 0.0)
        house.tick()

    def test_a_count_can_be_ended_in_the_middle_of_a_folder(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for number in range(1, 9):
            put(root, number)
        index, breaths = FileIndex(root), iter(range(3))
        monkeypatch.setattr(file_index, "_STRIDE", 2)
        with pytest.raises(StopIteration):
            index.refresh_blocking(lambda: next(breaths) and None)
        assert 0 < len(index.catalogue) < 8

    def test_what_stops_it_is_said_once_until_it_works_again(
        self, start: Start, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        house = start()

        def broken(*args: object) -> None:
            raise OSError(5, "Input/output error")

        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(house.evictor, "tick_blocking", broken)
                for _ in range(3):
                    house.evictor._tick_or_say_why_not()
            house.evictor._tick_or_say_why_not()
        said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert said == [f"file store {root}: cannot keep it within its limit: [Errno 5] Input/output error"] * 2

    def test_a_clock_that_is_set_back_stops_nothing(self, start: Start, root: Path) -> None:
        house = start(ttl_s=1000)
        house.tick()
        house.now_s -= 10**6
        put(root, 1, age_s=10**6 + 2000)
        house.tick()
        assert numbers(root) == []
