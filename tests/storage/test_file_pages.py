"""Which files under a root are pages of ours, without opening a store."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sglang_hicache.storage import file_pages
from sglang_hicache.storage.page_format import HEADER_BYTES, PageName, parse_header
from tests.storage import pages
from tests.storage.conftest import Open


@pytest.fixture
def filled(open_backend: Open, root: Path) -> Path:
    """A root with two namespaces."""
    backend = open_backend("file", {"file_storage_path": str(root)})
    for namespace in (pages.NAMESPACE, "77" * 32):
        store = pages.store(backend, namespace=namespace)
        store.write_blocking(pages.keys(3), [pages.content(n) for n in range(3)], b"", 0)
    return root


def test_walk_names_every_page(filled: Path) -> None:
    found = list(file_pages.walk_blocking(filled))
    assert [page.name for page in found] == [
        PageName(namespace, key, 0, 2) for namespace in (pages.NAMESPACE, "77" * 32) for key in pages.keys(3)
    ]
    assert {page.size_bytes for page in found} == {HEADER_BYTES + pages.PAGE_BYTES}
    assert all(page.path == file_pages.page_path(filled, page.name) for page in found)
    assert [Path(page.path).stat().st_mtime for page in found] == [page.mtime_s for page in found]
    assert {page.name.namespace for page in file_pages.walk_blocking(filled, "77" * 32)} == {"77" * 32}


def test_walk_passes_over_what_has_no_page_path(filled: Path) -> None:
    before = list(file_pages.walk_blocking(filled))
    own = filled / pages.NAMESPACE
    page = f"{'ab' * 32}.0-2.page"
    for path in (
        filled / page,
        filled / "notes" / "ab" / page,
        own / page,
        own / "zz" / page,
        own / "00" / page,
        own / "00" / f"{pages.key(9).hex()}.00-2.page",
        own / "00" / f"{pages.key(9).hex()}.0-2.page.bak",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(Path(before[0].path).read_bytes())
    (own / "00" / f"{pages.key(10).hex()}.0-2.page").symlink_to(before[0].path)
    (filled / ("88" * 32)).symlink_to(own)
    assert list(file_pages.walk_blocking(filled)) == before


def test_header_of_ours_is_read_and_of_others_is_not(filled: Path, tmp_path: Path) -> None:
    found = next(file_pages.walk_blocking(filled))
    raw = file_pages.read_header(found.path)
    header = parse_header(raw or b"")
    assert header is not None
    assert (header.namespace, header.key, header.depth) == (found.name.namespace, found.name.key, 0)
    os.truncate(found.path, 5)
    assert file_pages.read_header(found.path) == raw[:5]
    (tmp_path / "theirs").write_bytes(b"somebody else's bytes")
    (tmp_path / "link").symlink_to(found.path)
    os.mkfifo(tmp_path / "pipe")
    for other in ("theirs", "link", "pipe", "gone"):
        assert file_pages.read_header(str(tmp_path / other)) is None
