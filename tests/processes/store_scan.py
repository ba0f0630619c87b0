"""Looks through a file store from outside, the way an operator's tool would: every file whole, or temporary."""

from __future__ import annotations

import re
from pathlib import Path

from sglang_hicache.storage.page_format import HEADER_BYTES, is_whole, parse_header

_PAGE_FILE = re.compile(r"([0-9a-f]{64})/([0-9a-f]{2})/([0-9a-f]{64})\.(\d+)-(\d+)\.page")


class Scan:
    """One store, scanned again and again; a page that was found whole is not read a second time."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, tuple[int, int]] = {}

    def names(self) -> int:
        """How many pages there are, without a look into them."""
        return sum(1 for _ in self._root.glob("*/*/*.page"))

    def pages(self) -> int:
        """Every file below a namespace must be a whole page under its own name; how many there are."""
        found = 0
        for path in self._root.glob("[0-9a-f]*/**/*"):
            name = str(path.relative_to(self._root))
            if len(name.split("/")[0]) != 64 or path.is_dir():
                continue
            found += 1
            stat = path.stat()
            if self._known.get(name) != (stat.st_ino, stat.st_mtime_ns):
                self._check(path, name)
                self._known[name] = (stat.st_ino, stat.st_mtime_ns)
        return found

    def _check(self, path: Path, name: str) -> None:
        match = _PAGE_FILE.fullmatch(name)
        assert match, f"{name} is no name of a page"
        namespace, fan_out, key, head_start, head_end = match.groups()
        raw = path.read_bytes()
        header = parse_header(raw)
        assert header is not None, f"{name} has no header of a page"
        assert (header.namespace, header.key.hex()) == (namespace, key) and key.startswith(fan_out), name
        assert (header.head_start, header.head_end) == (int(head_start), int(head_end)), name
        assert header.payload_bytes == len(raw) - HEADER_BYTES, f"{name} is not whole"
        assert is_whole(raw[:HEADER_BYTES], [raw[HEADER_BYTES:]]), f"{name} has a wrong checksum"

    def temporary_folders(self) -> int:
        """Folders of writers, living or dead."""
        return sum(1 for path in (self._root / "tmp").iterdir() if path.is_dir())

    def set_aside(self) -> int:
        """Bad pages that a reader has found."""
        return sum(path.is_file() for path in (self._root / "quarantine").rglob("*"))
