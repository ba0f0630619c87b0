"""A file store, what may lie in its folder, and the offline tool on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sglang_hicache import store
from sglang_hicache.cache.page import namespace_seed
from sglang_hicache.storage.checked import CheckedStore
from tests.storage import pages

OTHER = "77" * 32
SEED = namespace_seed("customer-7", "pepper")


def write(backend: Any, count: int, first: int = 1, tenant: bytes = b"", **layout: Any) -> None:
    """A chain of pages from the root."""
    contents = [pages.content(first + index) for index in range(count)]
    chain = CheckedStore(backend, pages.layout(**layout))
    assert chain.write_blocking(pages.keys(count, first), contents, b"", 0, tenant).pages == count


def run(root: Path, command: str, *flags: str) -> int:
    return store.main([command, "--path", str(root), *flags])


def hostile(root: Path) -> list[Path]:
    """What may lie in a folder that is not ours alone; none of it is ours, some has a page's name."""
    shelf = root / pages.NAMESPACE / "00"
    names = [pages.key(number).hex() for number in range(900, 906)]
    made = [
        root / "notes.txt",
        root / ("x" * 255),
        root / "tmp-of-somebody",
        root / pages.NAMESPACE / "readme",
        shelf / "photo.page",
        shelf / f"{names[0]}.0-2.page",
        shelf / f"{'ff' * 32}.0-2.page",
        shelf / f"{names[0]}.0-2.page.bak",
        shelf / ("y" * 255),
    ]
    for path in made:
        path.write_text("somebody else's bytes")
    links = [shelf / f"{names[1]}.0-2.page", root / ("ab" * 32), root / pages.NAMESPACE / "cd"]
    links[0].symlink_to(pages.page_files(root)[0])
    for link in links[1:]:
        link.symlink_to(root.parent / "elsewhere")
    pipe, folder = shelf / f"{names[2]}.0-2.page", shelf / f"{names[3]}.0-2.page"
    os.mkfifo(pipe)
    folder.mkdir()
    end = shelf / f"{names[4]}.0-2.page"
    os.mknod(end, 0o600 | 0o140000)
    return [*made, *links, pipe, folder, end]
