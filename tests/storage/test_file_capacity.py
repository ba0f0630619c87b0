"""A file store within its limit: what it counts, what it deletes and in which order, and what it leaves alone."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache.storage.file_pages import QUARANTINE
from tests.storage import pages
from tests.storage.conftest import Start
from tests.storage.store_world import NOW_S, OTHER, PAGE, age, numbers, put, stored_bytes


class TestLimit:
    def _disk(self, monkeypatch: pytest.MonkeyPatch, root: Path, disk_bytes: int) -> None:
        """A disk that holds the store and nothing else."""

        def statvfs(path: object) -> os.statvfs_result:
            return os.statvfs_result((1, 1, disk_bytes, 0, disk_bytes - stored_bytes(root), 0, 0, 0, 0, 255))

        monkeypatch.setattr(os, "statvfs", statvfs)

    def test_default_is_a_share_of_what_is_free_and_the_same_at_the_next_attach(
        self, start: Start, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        self._disk(monkeypatch, root, 1000 * PAGE)
        put(root, 1)
        caplog.set_level(logging.INFO)
        for _ in range(2):
            house = start(max_bytes=None)
            house.tick()
            assert house.share.limits.max_bytes == 800 * PAGE
            assert "80% of the 4.2 MiB that are free or its own" in house.evictor.why
            put(root, 2 + len(numbers(root)))
            house.close()
        said = [record.getMessage() for record in caplog.records if "limit" in record.getMessage()]
        assert len(said) == 2
        assert "1 pages of this model, 0 of others, 0 files that are none of its pages" in said[0]
        assert "limit 3.3 MiB (80% of the 4.2 MiB" in said[0]

    def test_an_explicit_limit_is_said_too(self, start: Start, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        put(root, 1, namespace=OTHER)
        (root / "notes").write_text("x")
        start(max_bytes=100 * PAGE).tick()
        (said,) = [record.getMessage() for record in caplog.records]
        assert "0 pages of this model, 1 of others, 1 files that are none of its pages" in said
        assert "limit 425.0 KiB (max_size)" in said

    def test_the_smallest_limit_of_the_living_holds(self, start: Start, root: Path) -> None:
        for number in range(20):
            put(root, number, age_s=number)
        large, small = start(max_bytes=100 * PAGE), start(max_bytes=10 * PAGE, rank=1)
        large.tick()
        assert numbers(root) == [0, 1, 2, 3, 4]
        small.tick()
        assert small.share.view.used_bytes == 5 * PAGE
        assert "of at most 42.5 KiB, and" in small.share.why_full()
        assert "of at most 42.5 KiB (max_size of another server on this folder" in large.share.why_full()
        small.close()
        large.tick()
        assert "of at most 425.0 KiB, and" in large.share.why_full()
        for number in range(50):
            large.write(number)
        large.tick()
        assert len(numbers(root)) == 50

    def test_a_disk_that_others_fill_shrinks_the_store(
        self, start: Start, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(20):
            put(root, number, age_s=number)
        house = start()
        house.share.keep_free(10 * PAGE)
        self._disk(monkeypatch, root, 30 * PAGE)
        house.tick()
        assert len(numbers(root)) == 10


class TestOrder:
    def test_the_longest_unused_go_until_the_low_watermark(self, start: Start, root: Path) -> None:
        for number in range(20):
            put(root, number, age_s=100 * number)
        house = start(max_bytes=20 * PAGE)
        house.tick()
        assert numbers(root) == list(range(10))
        assert house.evictor.evicted_pages == 10
        house.tick()
        assert numbers(root) == list(range(10))

    def test_pages_of_models_that_nobody_uses_go_first(self, start: Start, root: Path) -> None:
        for number in range(10):
            put(root, number, age_s=1000)
            put(root, 100 + number, age_s=10, namespace=OTHER)
        house = start(max_bytes=20 * PAGE)
        house.tick()
        assert numbers(root) == list(range(10))
        assert not (root / OTHER).exists()

    def test_a_living_process_protects_its_model(self, start: Start, root: Path) -> None:
        for number in range(10):
            put(root, number, age_s=1000)
            put(root, 100 + number, age_s=10, namespace=OTHER)
        house, neighbour = start(max_bytes=20 * PAGE), start(namespace=OTHER, rank=1)
        house.tick()
        assert numbers(root) == list(range(100, 110))
        neighbour.share.use_namespace("88" * 32)
        neighbour.tick()
        for number in range(10):
            house.write(number, age_s=1000)
        house.tick()
        assert numbers(root) == list(range(10))

    def test_all_head_ranges_of_a_page_go_together(self, start: Start, root: Path) -> None:
        for number in range(10):
            put(root, number, age_s=100 * number)
            put(root, number, age_s=100 * number + 50, heads=(2, 4))
        house = start(max_bytes=20 * PAGE)
        house.tick()
        assert numbers(root) == sorted(2 * list(range(5)))
        assert house.evictor.evicted_pages == 5

    def test_a_page_used_by_somebody_since_the_count_stays_with_its_parents(self, start: Start, root: Path) -> None:
        house = start(max_bytes=20 * PAGE)
        put(root, 1, age_s=5000)
        child = put(root, 2, parent=1, depth=1, age_s=5000)
        for number in range(3, 18):
            put(root, number, age_s=1000)
        house.tick()
        age(child, 0)
        for number in range(18, 25):
            house.write(number, age_s=500)
        house.tick()
        left = numbers(root)
        assert len(left) == 10
        assert left[:2] == [1, 2]

    def test_torn_renamed_and_old_pages_go_before_pages_in_use(self, start: Start, root: Path) -> None:
        for number in range(10):
            put(root, number, age_s=1000 + number)
        wrong = [put(root, number) for number in range(100, 110)]
        os.truncate(wrong[0], 0)
        os.truncate(wrong[1], 5)
        os.truncate(wrong[2], 300)
        for path in wrong[3:]:
            raw = bytearray(path.read_bytes())
            raw[8] = 1  # format version
            path.write_bytes(raw)
        for path in wrong:
            age(path, 0)
        house = start(max_bytes=18 * PAGE)
        house.tick()
        assert numbers(root) == list(range(9))

    def test_a_file_that_was_replaced_since_the_count_is_looked_at_anew(self, start: Start, root: Path) -> None:
        house = start(max_bytes=20 * PAGE)
        paths = [put(root, number, age_s=1000 - number) for number in range(18)]
        house.tick()
        paths[0].write_bytes(b"not ours, and of another size")
        age(paths[0], 1000)
        for number in range(18, 21):
            house.write(number)
        house.tick()
        assert paths[0].exists()
        assert len(numbers(root)) == 10
        assert house.share.view.foreign_files == 0
        house.now_s += 601
        house.tick()
        assert paths[0].exists()
        assert house.share.view.foreign_files == 1
        assert house.share.view.used_bytes == 9 * PAGE

    def test_a_page_that_cannot_be_deleted_keeps_no_other_one(
        self, start: Start, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An immutable file, a bad sector: the oldest page would stop every search at its first step."""
        parent = put(root, 1, age_s=9000)
        stuck = put(root, 2, parent=1, depth=1, age_s=9000)
        for number in range(3, 21):
            put(root, number, age_s=number)
        unlink = os.unlink

        def refuse(path: Any, **kwargs: Any) -> None:
            if str(path) == str(stuck):
                raise PermissionError(1, "Operation not permitted", str(path))
            unlink(path, **kwargs)

        monkeypatch.setattr(os, "unlink", refuse)
        house = start(max_bytes=20 * PAGE)
        with pytest.raises(PermissionError):
            house.tick()
        assert parent.exists() and stuck.exists()
        assert len(numbers(root)) == 10
        assert house.share.view.used_bytes == 10 * PAGE
        assert house.share.view.own_files == 10

    @pytest.mark.parametrize("seed", range(4))
    def test_random_trees_stay_prefix_closed(self, start: Start, root: Path, seed: int) -> None:
        chance, parents, depths = random.Random(seed), {}, {}
        for number in range(120):
            parent = chance.choice([None, *depths]) if depths else None
            parents[number] = parent
            depths[number] = 0 if parent is None else depths[parent] + 1
            put(root, number, parent, depths[number], age_s=chance.randrange(600))
        for limit in (100, 60, 30, 10):
            house = start(max_bytes=limit * PAGE, high=0.8, low=0.6)
            house.tick()
            left = set(numbers(root))
            assert len(left) == limit * 6 // 10
            assert all(parents[number] in left for number in left if parents[number] is not None)
            house.close()


class TestTimeToLive:
    def test_pages_past_their_time_go_although_there_is_room(self, start: Start, root: Path) -> None:
        house = start(ttl_s=1000)
        for number, age_s in enumerate((0, 900, 1050, 1070, 5000)):
            put(root, number, age_s=age_s)
        house.tick()
        assert numbers(root) == [0, 1, 2]
        assert (house.evictor.expired_pages, house.evictor.evicted_pages) == (2, 0)
        house.now_s += 200
        house.tick()
        assert numbers(root) == [0]

    def test_a_large_store_is_searched_less_often(self, start: Start, root: Path) -> None:
        house = start(ttl_s=1000)
        house.tick()
        put(root, 1, age_s=5000)
        house.evictor.search_s = 3.0
        house.now_s += 299
        house.tick()
        assert numbers(root) == [1]
        house.now_s += 2
        house.tick()
        assert numbers(root) == []

    def test_the_shortest_time_of_the_living_holds(self, start: Start, root: Path) -> None:
        put(root, 1, age_s=5000)
        house, neighbour = start(ttl_s=0), start(ttl_s=100, rank=1)
        house.tick()
        assert numbers(root) == []
        neighbour.close()

    def test_without_one_nothing_is_ever_too_old(self, start: Start, root: Path) -> None:
        put(root, 1, age_s=NOW_S - 1)
        start().tick()
        assert numbers(root) == [1]


class TestNotOurs:
    def test_other_files_are_counted_and_never_touched(self, start: Start, root: Path, tmp_path: Path) -> None:
        own = put(root, 1, age_s=10**6)
        page = f"{pages.key(200).hex()}.0-2.page"
        (tmp_path / "elsewhere").write_bytes(own.read_bytes())
        foreign = {
            root / "notes.txt": b"x",
            root / "zz" / "00" / page: own.read_bytes(),
            root / pages.NAMESPACE / "readme": b"x",
            root / pages.NAMESPACE / "00" / page: b"somebody else's bytes",
            root / pages.NAMESPACE / "00" / f"{page}.bak": own.read_bytes(),
            root / OTHER / "00" / page: b"HICPAGF\n" + bytes(1000),
        }
        for path, content in foreign.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            os.utime(path, (1, 1))
        link = own.with_name(f"{pages.key(201).hex()}.0-2.page")
        link.symlink_to(tmp_path / "elsewhere")
        house = start(max_bytes=PAGE, ttl_s=1)
        house.tick()
        assert not own.exists()
        assert all(path.read_bytes() == content for path, content in foreign.items())
        assert link.is_symlink() and (tmp_path / "elsewhere").exists()
        assert house.share.view.foreign_files == len(foreign) + 1
        assert house.share.view.used_bytes == 0

    def test_quarantine_counts_as_used(self, start: Start, root: Path) -> None:
        house = start()
        (root / QUARANTINE).mkdir()
        (root / QUARANTINE / f"{'0' * 20}-{'5a' * 8}-{'00' * 32}.0-2.page").write_bytes(bytes(100))
        (root / QUARANTINE / "somebody's").write_bytes(bytes(1000))
        put(root, 1)
        house.tick()
        assert house.share.view.used_bytes == PAGE + 100
        assert house.share.view.foreign_files == 0
