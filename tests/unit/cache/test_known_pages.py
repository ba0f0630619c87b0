"""What is remembered of a store: bounded, never without what was added lately, hardly ever with what was not."""

from __future__ import annotations

import hashlib

import pytest

from sglang_hicache.cache import known_pages
from sglang_hicache.cache.known_pages import KnownPages


def keys(count: int, first: int = 0) -> list[bytes]:
    return [hashlib.sha256(str(number).encode()).digest() for number in range(first, first + count)]


def test_what_was_added_is_known_and_what_was_not_is_not() -> None:
    pages = KnownPages()
    assert not pages and keys(1)[0] not in pages
    pages.add(keys(1000))
    assert pages and all(key in pages for key in keys(1000))
    assert not any(key in pages for key in keys(1000, first=1000))
    pages.forget()
    assert not pages and keys(1)[0] not in pages


def test_it_is_bounded_and_the_latest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_pages, "_BITS", 1 << 14)
    monkeypatch.setattr(known_pages, "_MOST", 1 << 10)
    pages = KnownPages()
    pages.add(keys(10_000))
    assert all(key in pages for key in keys(1024, first=10_000 - 1024))
    assert sum(key in pages for key in keys(5000)) < 50, "the oldest are forgotten"
    assert sum(len(bits) for bits in pages._filters) == 2 * (1 << 14) // 8
    strangers = sum(key in pages for key in keys(20_000, first=10_000))
    assert strangers / 20_000 < 0.01, "the same load of each filter as with its real size: below 0.5 %, and some luck"


def test_adding_again_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_pages, "_MOST", 100)
    pages = KnownPages()
    pages.add(keys(50))
    for _ in range(10):
        pages.add(keys(50, first=50))
    assert all(key in pages for key in keys(50)), "only new ones count"
