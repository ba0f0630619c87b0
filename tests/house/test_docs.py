"""A page may name only what exists."""

from __future__ import annotations

import fnmatch
import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.source import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TOP_LEVEL = ("sglang_hicache/", "scheduler/", "tokenizer/", "workers/", "tests/", "scripts/", "docs/", ".ci/")
ENDINGS = (".py", ".md", ".toml", ".txt")


def expand(text: str) -> Iterator[str]:
    """`a/{b,c}.py` as `a/b.py` and `a/c.py`."""
    pieces = re.split(r"\{([^}]*)\}", text)
    choices = [piece.split(",") if index % 2 else [piece] for index, piece in enumerate(pieces)]
    return ("".join(choice) for choice in itertools.product(*choices))


def named_paths(text: str) -> Iterator[str]:
    """Paths in backticks, and targets of relative links."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for quoted in re.findall(r"`([^`\n]+)`", prose):
        word = quoted.split()[0]
        if re.fullmatch(r"[\w./{},*-]+", word) and (word.startswith(TOP_LEVEL) or word.endswith(ENDINGS)):
            yield from expand(word)
    for target in re.findall(r"\]\(([^)#\s]+)", prose):
        if "://" not in target:
            yield target


@functools.cache
def bare_names() -> frozenset[str]:
    """Names of all files of the tree, and of nothing beside it: an environment has tens of thousands."""
    return frozenset(path.name for folder in TOP_LEVEL for path in (ROOT / folder).rglob("*"))


def missing(page: Path, text: str) -> list[str]:
    """What a page names and the tree does not hold: from the root, from the page's folder, or by bare file name."""

    def exists(name: str) -> bool:
        if "/" not in name and fnmatch.filter(bare_names(), name):
            return True
        return any(any(folder.glob(name.rstrip("/"))) for folder in (ROOT, page.parent))

    return [name for name in named_paths(text) if not exists(name)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_paths_exist(page: Path) -> None:
    assert not missing(page, page.read_text(encoding="utf-8"))


def test_a_wrong_path_is_found() -> None:
    text = "See `workers/{batch,nothing}.py`, `scripts/test --long`, `wire.py`, `no_such.py`, [page](docs/none.md)."
    assert missing(ROOT / "README.md", text) == ["workers/nothing.py", "no_such.py", "docs/none.md"]
