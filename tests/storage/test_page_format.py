"""A page is what its header says, or it is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hicache.storage.page_format import (
    HEADER_BYTES,
    MAGIC,
    ROOT_PARENT,
    WRITE_CHUNK_BYTES,
    IncomingPage,
    OutgoingPage,
    PageHeader,
    PageLayout,
    Part,
    Verdict,
    is_whole,
    parse_header,
)
from tests.storage import pages


def _stored(size: int = 64, **kwargs: object) -> bytes:
    layout = pages.layout(size=size, **kwargs)
    page = OutgoingPage(layout, pages.key(7), pages.content(1, size), pages.key(6), 3)
    return page.header() + page.payload


def _judge(stored: bytes, layout: PageLayout | None = None, key: bytes = b"") -> tuple[Verdict, IncomingPage]:
    layout = layout or pages.layout(size=len(stored) - HEADER_BYTES)
    page = IncomingPage(layout, key or pages.key(7), memoryview(bytearray(stored[HEADER_BYTES:])))
    page.header[:] = stored[:HEADER_BYTES]
    return page.judge(), page


def test_page_survives_the_trip_with_its_place_in_the_chain() -> None:
    verdict, page = _judge(_stored())
    assert verdict is Verdict.GOOD
    assert (page.parent, page.depth) == (pages.key(6), 3)


def test_root_page_has_no_parent() -> None:
    page = OutgoingPage(pages.layout(size=8), pages.key(7), pages.content(1, 8), b"", 0)
    verdict, read = _judge(page.header() + page.payload)
    assert (verdict, read.parent) == (Verdict.GOOD, ROOT_PARENT)


def test_format_is_what_earlier_versions_wrote() -> None:
    """Stored pages outlive a version of this program: this fails when the format changes without a new version."""
    stored = _stored()
    assert stored.startswith(MAGIC + b"\x02\x00\x01\x00\x00\x01\x00\x00")
    assert stored[16:48].hex() == pages.NAMESPACE
    assert stored[136:152] == b"kv".ljust(8, b"\0") + (64).to_bytes(8, "little")
    assert stored[200:240] == bytes(40)
    assert stored[240:256].hex() == "5bed77cc5ff66e79906adda5699e0ee4"


def test_fm39_no_bit_of_a_page_can_change_unnoticed() -> None:
    stored = _stored()
    for bit in range(8 * len(stored)):
        damaged = bytearray(stored)
        damaged[bit // 8] ^= 1 << bit % 8
        verdict, _ = _judge(bytes(damaged))
        assert verdict not in (Verdict.GOOD, Verdict.OTHER_KEY), f"bit {bit} is not covered"


def test_fm33_page_says_whose_it_is() -> None:
    """The key separates tenants; the header lets an operator find, without any key, what one of them has stored."""
    seed = bytes(range(1, 33))
    page = OutgoingPage(pages.layout(size=64), pages.key(7), pages.content(1, 64), pages.key(6), 3, seed)
    stored = page.header() + page.payload
    assert stored[200:212] == seed[:12]
    header = parse_header(stored)
    assert header is not None
    assert header.tenant == seed[:12]
    nobodys = parse_header(_stored())
    assert nobodys is not None
    assert nobodys.tenant == bytes(12)
    assert _judge(stored)[0] is Verdict.GOOD


def test_header_can_be_read_without_knowing_what_to_expect() -> None:
    stored = _stored()
    assert parse_header(stored) == PageHeader(
        pages.NAMESPACE, pages.key(7), pages.key(6), 3, 0, 2, 0, 64, bytes(12), stored[240:256]
    )


@pytest.mark.parametrize("start", [b"", b"HICPAGE\n", b"\x89PNG\r\n\x1a\n" + bytes(300), bytes(HEADER_BYTES)])
def test_other_objects_have_no_header(start: bytes) -> None:
    assert parse_header(start) is None


@pytest.mark.parametrize(("offset", "value"), [(0, 0), (8, 1), (8, 3), (12, 1)])
def test_headers_of_other_formats_are_none(offset: int, value: int) -> None:
    stored = bytearray(_stored())
    stored[offset] = value
    assert parse_header(bytes(stored)) is None


def test_damage_is_found_without_layout_and_key() -> None:
    stored = _stored()
    header, payload = stored[:HEADER_BYTES], stored[HEADER_BYTES:]
    assert is_whole(header, [payload[:10], payload[10:]])
    assert not is_whole(header, [payload[:10]])
    assert not is_whole(header[:200] + b"\x01" + header[201:], [payload])


def test_parts_must_fit_their_table() -> None:
    with pytest.raises(ValueError, match="more than 8 bytes"):
        PageLayout(pages.NAMESPACE, 0, 2, (Part("ninechars", 64),))
    with pytest.raises(ValueError, match="0 parts"):
        PageLayout(pages.NAMESPACE, 0, 2, ())


@given(st.data())
def test_pieces_may_arrive_in_any_steps(data: st.DataObject) -> None:
    size = 300
    stored = _stored(size)
    page = IncomingPage(pages.layout(size=size), pages.key(7), memoryview(bytearray(stored[HEADER_BYTES:])))
    page.header[:] = stored[:HEADER_BYTES]
    for end in data.draw(st.lists(st.integers(0, size), max_size=5)):
        page.arrived(end)
    assert page.judge() is Verdict.GOOD


@pytest.mark.parametrize(
    "size", [1, WRITE_CHUNK_BYTES - 1, WRITE_CHUNK_BYTES, WRITE_CHUNK_BYTES + 1, 2 * WRITE_CHUNK_BYTES + 5]
)
def test_chunks_are_the_payload_and_do_not_change_the_header(size: int) -> None:
    whole = OutgoingPage(pages.layout(size=size), pages.key(7), pages.content(1, size), b"", 0)
    pieces = OutgoingPage(pages.layout(size=size), pages.key(7), pages.content(1, size), b"", 0)
    chunks = list(pieces.chunks())
    assert b"".join(chunk for _, chunk in chunks) == whole.payload
    assert [start for start, _ in chunks] == list(range(0, size, WRITE_CHUNK_BYTES))
    assert pieces.header() == whole.header()


def test_page_that_is_read_again_is_hashed_again() -> None:
    stored = _stored()
    page = IncomingPage(pages.layout(size=64), pages.key(7), memoryview(bytearray(64)))
    page.arrived(64)
    page.restart()
    page.header[:], page.payload[:] = stored[:HEADER_BYTES], stored[HEADER_BYTES:]
    assert page.judge() is Verdict.GOOD


@pytest.mark.parametrize(
    ("layout", "key", "verdict"),
    [
        (pages.layout(size=64), pages.key(8), Verdict.OTHER_PAGE),
        (pages.layout("77" * 32, size=64), b"", Verdict.OTHER_PAGE),
        (pages.layout(heads=(0, 4), size=64), b"", Verdict.OTHER_PAGE),
        (pages.layout(heads=(1, 2), size=64), b"", Verdict.OTHER_PAGE),
        (PageLayout(pages.NAMESPACE, 0, 2, (Part("kv", 32), Part("mamba", 32))), b"", Verdict.FOREIGN),
        (PageLayout(pages.NAMESPACE, 0, 2, (Part("mamba", 64),)), b"", Verdict.FOREIGN),
    ],
)
def test_fm31_page_of_somebody_else_is_refused(layout: PageLayout, key: bytes, verdict: Verdict) -> None:
    assert _judge(_stored(), layout, key)[0] is verdict


def test_other_versions_are_foreign() -> None:
    stored = bytearray(_stored())
    stored[8] = 1
    assert _judge(bytes(stored))[0] is Verdict.FOREIGN


def test_payload_must_have_the_size_of_the_layout() -> None:
    with pytest.raises(ValueError, match="63 bytes"):
        OutgoingPage(pages.layout(size=64), pages.key(7), pages.content(1, 63), b"", 0)
