"""Sizes, limits, and the order in which pages go: arithmetic, without a store."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hicache.errors import UserError
from sglang_hicache.storage import registry
from sglang_hicache.storage.capacity import (
    Catalogue,
    Limits,
    Page,
    default_max_bytes,
    default_min_free_bytes,
    parse_size,
    size_text,
)
from sglang_hicache.storage.page_format import ROOT_PARENT, PageName
from sglang_hicache.storage.settings import FileSettings, MemorySettings

MODEL, OTHER = "5a" * 32, "77" * 32
GIB = 1 << 30


class TestSizes:
    @pytest.mark.parametrize(
        ("value", "size_bytes"),
        [
            (0, 0),
            (12345, 12345),
            ("12345", 12345),
            ("100B", 100),
            ("200GB", 200 * 10**9),
            ("1.5TiB", 3 << 39),
            (" 10 mib ", 10 << 20),
            ("2G", 2 << 30),
            ("0.5k", 512),
            ("1PB", 10**15),
        ],
    )
    def test_numbers_and_texts_are_bytes(self, value: int | str, size_bytes: int) -> None:
        assert parse_size(value) == size_bytes

    @pytest.mark.parametrize(
        "value",
        [
            "",
            "GB",
            "-1",
            -1,
            "1e9",
            "10 GBs",
            "1iB",
            "1,5GB",
            "lots",
            True,
            "9999999PiB",
            1 << 63,
            "9" * 400,
            "9" * 300 + "P",
        ],
    )
    def test_anything_else_is_refused_with_what_is_allowed(self, value: int | str) -> None:
        with pytest.raises(ValueError, match='is no size; it takes bytes as a whole number, or a text such as "200GB"'):
            parse_size(value)

    def test_sizes_for_people(self) -> None:
        assert [size_text(size) for size in (0, 1023, 1536, 3 << 39)] == ["0 bytes", "1023 bytes", "1.5 KiB", "1.5 TiB"]

    def test_the_default_limit_is_the_same_at_every_attach(self) -> None:
        limit = default_max_bytes(0, 100 * GIB)
        assert limit == 80 * GIB
        assert default_max_bytes(limit, 100 * GIB - limit) == limit

    def test_what_stays_free_fits_the_disk(self) -> None:
        assert default_min_free_bytes(1000 * GIB) == GIB
        assert default_min_free_bytes(1000) == 10


class TestLimits:
    def test_room_ends_at_the_limit_and_at_what_stays_free(self) -> None:
        limits = Limits(max_bytes=100, min_free_bytes=20)
        assert limits.room(60, 1000) == 40
        assert limits.room(60, 25) == 5
        assert limits.room(60, 10) == 0
        assert limits.room(140, 1000) == 0
        assert Limits(max_bytes=0, min_free_bytes=20).room(60, 1000) == 980

    def test_pages_go_from_the_high_to_the_low_watermark(self) -> None:
        limits = Limits(max_bytes=100, high=0.9, low=0.5)
        assert limits.excess(90, 1000) == 0
        assert limits.excess(91, 1000) == 41

    def test_a_disk_that_others_fill_shrinks_the_store(self) -> None:
        limits = Limits(max_bytes=100, min_free_bytes=20, high=0.9, low=0.5)
        assert limits.excess(80, 10) == 80 - 35

    def test_a_store_of_few_pages_keeps_room_for_the_next_one(self) -> None:
        """Ten pages of ten bytes fill it to 90 % at most; the eleventh would be refused for ever."""
        limits = Limits(max_bytes=100, high=0.95, low=0.85, page_bytes=30)
        assert limits.excess(70, 1000) == 0
        assert limits.excess(71, 1000) == 1
        assert limits.room(70, 1000) >= 30

    def test_an_empty_store_has_nothing_to_give(self) -> None:
        assert Limits(max_bytes=10, page_bytes=30).excess(0, 0) == 0

    @given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 10**5))
    def test_after_an_eviction_there_is_room_for_a_page_or_nothing_is_left(
        self, max_bytes: int, used: int, free: int, page_bytes: int
    ) -> None:
        limits = Limits(max_bytes=max_bytes, min_free_bytes=1000, page_bytes=page_bytes)
        excess = limits.excess(used, free)
        assert 0 <= excess <= used
        left = used - excess
        assert limits.excess(left, free + excess) == 0
        assert limits.room(left, free + excess) >= page_bytes or left == 0


def _key(number: int) -> bytes:
    return bytes([number % 256]) + number.to_bytes(31, "big")


def _add(
    catalogue: Catalogue, number: int, parent: int | None, depth: int, last_used: int, namespace: str = MODEL
) -> None:
    parent_key = ROOT_PARENT if parent is None else _key(parent)
    catalogue.add(PageName(namespace, _key(number), 0, 2), parent_key, depth, 10, last_used)


def _order(catalogue: Catalogue, in_use: tuple[str, ...] = (MODEL,), unused_since: int | None = None) -> list[int]:
    """Take everything out, in order."""
    order = []
    for page, _ in catalogue.victims(in_use, unused_since):
        order.append(int.from_bytes(page.key[1:], "big"))
        catalogue.remove(page)
    return order


class TestOrder:
    def test_the_longest_unused_goes_first(self) -> None:
        catalogue = Catalogue()
        for number, last_used in ((1, 30), (2, 10), (3, 20)):
            _add(catalogue, number, None, 0, last_used)
        assert _order(catalogue) == [2, 3, 1]
        assert (len(catalogue), catalogue.used_bytes) == (0, 0)

    def test_children_go_first_and_a_used_child_keeps_its_parents(self) -> None:
        catalogue = Catalogue()
        _add(catalogue, 1, None, 0, 10)
        _add(catalogue, 2, 1, 1, 10)
        _add(catalogue, 3, 2, 2, 50)
        _add(catalogue, 4, None, 0, 40)
        assert _order(catalogue) == [4, 3, 2, 1]

    def test_pages_past_their_time_go_first_and_say_so(self) -> None:
        catalogue = Catalogue()
        _add(catalogue, 1, None, 0, 20)
        _add(catalogue, 2, None, 0, 40)
        _add(catalogue, 3, None, 0, 50, OTHER)
        assert [is_expired for _, is_expired in catalogue.victims((MODEL,), 30)] == [True, False, False]
        assert _order(catalogue, (MODEL,), 30) == [1, 3, 2]

    def test_a_parent_outlives_its_time_with_its_child(self) -> None:
        catalogue = Catalogue()
        _add(catalogue, 1, None, 0, 10)
        _add(catalogue, 2, 1, 1, 90)
        assert not any(is_expired for _, is_expired in catalogue.victims((MODEL,), 50))

    def test_namespaces_that_nobody_uses_go_before_used_ones(self) -> None:
        catalogue = Catalogue()
        _add(catalogue, 1, None, 0, 10)
        _add(catalogue, 2, None, 0, 90, OTHER)
        assert _order(catalogue) == [2, 1]

    def test_what_is_no_page_goes_before_pages_in_use(self) -> None:
        catalogue = Catalogue()
        _add(catalogue, 1, None, 0, 10)
        catalogue.add(PageName(MODEL, _key(2), 0, 2), b"", -1, 10, 90)
        assert _order(catalogue) == [2, 1]

    def test_a_page_that_was_touched_meanwhile_stays_and_so_do_its_parents(self) -> None:
        catalogue = Catalogue()
        _add(catalogue, 1, None, 0, 10)
        _add(catalogue, 2, 1, 1, 10)
        _add(catalogue, 3, None, 0, 20)
        order = []
        for page, _ in catalogue.victims((MODEL,), None):
            order.append(page.key)
            if page.key == _key(2):
                catalogue.touch(MODEL, page.key, 99)
            else:
                catalogue.remove(page)
        assert order == [_key(2), _key(3)]
        assert len(catalogue) == 2

    def test_all_head_ranges_of_a_page_are_one(self) -> None:
        catalogue = Catalogue()
        for start in (0, 2):
            catalogue.add(PageName(MODEL, _key(1), start, start + 2), ROOT_PARENT, 0, 10, 10 + start)
        ((page, _),) = catalogue.victims((MODEL,), None)
        assert (page.size_bytes, len(page.names), page.last_used) == (20, 2, 12)
        assert catalogue.objects[MODEL] == 2

    def test_a_page_written_anew_counts_once(self) -> None:
        catalogue = Catalogue()
        catalogue.add(PageName(MODEL, _key(1), 0, 2), b"", -1, 7, 10)
        _add(catalogue, 1, None, 0, 20)
        page = catalogue.find(MODEL, _key(1))
        assert page is not None
        assert (page.depth, catalogue.used_bytes, catalogue.objects[MODEL]) == (0, 10, 1)

    def test_headers_that_form_a_circle_can_all_go(self) -> None:
        catalogue = Catalogue()
        _add(catalogue, 1, 2, 5, 10)
        _add(catalogue, 2, 1, 5, 10)
        assert sorted(_order(catalogue)) == [1, 2]

    def test_a_walk_over_many_pages_stops_for_breath(self) -> None:
        catalogue, breaths = Catalogue(), []
        for number in range(2000):
            _add(catalogue, number, None, 0, number)
        next(catalogue.victims((MODEL,), None, lambda: breaths.append(1)))
        assert len(breaths) > 5

    @given(st.integers(0, 2**32), st.integers(1, 60), st.integers(0, 60))
    def test_the_store_is_prefix_closed_after_every_single_victim(self, seed: int, count: int, taken: int) -> None:
        """Random trees of two models, used at random times, some of them touched while the walk goes on."""
        chance, catalogue = random.Random(seed), Catalogue()
        parents: dict[tuple[str, bytes], tuple[str, bytes]] = {}
        depths = {}
        for number in range(count):
            namespace = chance.choice((MODEL, OTHER))
            candidates = [place for place in depths if place[0] == namespace]
            place = (namespace, _key(number))
            if candidates and chance.random() < 0.8:
                parents[place] = chance.choice(candidates)
            depths[place] = depths[parents[place]] + 1 if place in parents else 0
        for place in sorted(depths, key=lambda place: chance.random()):
            name = PageName(*place, 0, 2)
            parent = parents[place][1] if place in parents else ROOT_PARENT
            catalogue.add(name, parent, depths[place], 10, chance.randrange(5))
        left = set(depths)
        for page, _ in catalogue.victims((MODEL,), chance.choice((None, 2, 9))):
            if chance.random() < 0.2:
                catalogue.touch(page.namespace, page.key, 99)
                continue
            catalogue.remove(page)
            left.remove((page.namespace, page.key))
            assert all(parents[place] in left for place in left if place in parents), page
            if len(left) <= count - taken:
                break
        assert len(catalogue) == len(left)
        assert catalogue.used_bytes == 10 * len(left)

    def test_a_page_shows_itself(self) -> None:
        assert repr(Page(MODEL, _key(1), b"", 3)) == "<Page 01000000 depth=3 last_used=0>"


class TestSettings:
    @pytest.mark.parametrize("backend", ["file", "memory"])
    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ('{"max_size": "plenty"}', "'plenty' is no size; it takes bytes"),
            ('{"max_size": -5}', "-5 is no size"),
            ('{"max_size": 1.5}', "Expected `int | str | null`, got `float`"),
            ('{"high_watermark": 0}', "high_watermark=0.0 is not allowed; it takes a share of max_size"),
            ('{"low_watermark": 1.1}', "low_watermark=1.1 is not allowed"),
            ('{"eviction_ratio": 85}', "eviction_ratio=85.0 is not allowed"),
            ('{"high_watermark": 0.8}', "high_watermark=0.8 is not above low_watermark=0.85"),
            ('{"low_watermark": 0.5, "eviction_ratio": 0.5}', "two names for one thing"),
            ('{"ttl_s": -1}', "ttl_s=-1 is not allowed; it takes seconds from 0"),
        ],
    )
    def test_what_makes_no_sense_is_refused_with_what_is_allowed(self, backend: str, text: str, complaint: str) -> None:
        with pytest.raises(UserError, match=complaint):
            registry.validate_extra_config(backend, text)

    def test_what_clients_send_keeps_working(self) -> None:
        text = '{"max_size": "200GB", "min_free_space": "0", "eviction_ratio": 0.9, "enable_metadata_cache": true,'
        _, settings = registry.validate_extra_config("file", text + '"metadata_ttl": -1}')
        assert settings == FileSettings(
            max_size="200GB", min_free_space="0", eviction_ratio=0.9, enable_metadata_cache=True, metadata_ttl=-1.0
        )
        assert (settings.max_bytes(), settings.min_free_bytes()) == (200 * 10**9, 0)
        assert settings.watermarks() == (0.95, 0.9)

    @pytest.mark.parametrize(
        ("given_ones", "watermarks"),
        [
            ({}, (0.95, 0.85)),
            ({"high_watermark": 0.5, "low_watermark": 0.25}, (0.5, 0.25)),
            ({"eviction_ratio": 1.0}, (0.995, 0.99)),
            ({"eviction_ratio": 0.96}, (0.98, 0.96)),
        ],
    )
    def test_watermarks(self, given_ones: dict[str, float], watermarks: tuple[float, float]) -> None:
        assert MemorySettings(**given_ones).watermarks() == pytest.approx(watermarks)

    def test_no_size_means_the_default_and_0_means_no_limit(self) -> None:
        assert FileSettings(ttl_s=60).max_bytes() is None
        assert FileSettings(max_size=0).max_bytes() == 0
        assert FileSettings().min_free_bytes() is None

    @pytest.mark.parametrize("text", ['{"file_storage_path": "/a\\u0000b"}', '{"min_free_space": "some"}'])
    def test_impossible_paths_and_sizes_are_refused(self, text: str) -> None:
        with pytest.raises(UserError, match="holds a character that no path may have|is no size"):
            registry.validate_extra_config("file", text)
