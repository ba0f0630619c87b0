"""docs/runbooks has a page for every code that a failure may begin with, and names only what exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sglang_hicache import server_args, store
from sglang_hicache.cache.storage_ops import UNASKED
from sglang_hicache.ctl import main as ctl
from sglang_hicache.ctl.runbook import runbook
from sglang_hicache.errors import STOP_CODES
from sglang_hicache.storage.diagnosis import CODES
from tests.house.source import ROOT

FOLDER = ROOT / "docs" / "runbooks"
#: Pages of no code.
OTHERS = {"README", "alerts"}
SECTIONS = ["What it means", "What the server does", "What to look at", "What to do"]
PAGES = sorted(FOLDER.glob("*.md"))


def commands(text: str) -> list[list[str]]:
    """Lines of its examples, as a shell divides them."""
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def check_command(words: list[str]) -> None:
    """Ours must take the flags; SystemExit says that they do not."""
    if words[0] == "hicachectl":
        ctl._parser(words[1:]).parse_args(words[1:])
    elif words[:3] == ["python", "-m", "sglang_hicache.store"]:
        store._parser().parse_args(words[3:])


def test_every_code_has_a_page_and_every_page_a_code() -> None:
    assert {page.stem for page in PAGES} - OTHERS == set(CODES)


def test_the_way_from_an_error_to_its_page_ends_at_a_page() -> None:
    for code in CODES:
        assert (ROOT / runbook(f"{code}: whatever it was")).is_file(), code


@pytest.mark.parametrize("code", sorted({*STOP_CODES} - {*UNASKED}))
def test_what_an_attached_store_fails_with_has_a_page(code: str) -> None:
    """1. A disk answers every read with EIO; the store stays attached. 2. The status says "io: ..." and nothing of what
    to do: the commonest failure of all was the one without a page."""
    for text in (f"{code}: cannot read page 7", code):
        assert runbook(text) == f"docs/runbooks/{code}.md"
        assert (ROOT / runbook(text)).is_file()


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in OTHERS], ids=lambda page: page.stem)
def test_a_page_says_what_is_to_be_said(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {page.stem}\n")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    assert len(text.splitlines()) <= 60, "somebody reads this at night"
    # Advice that an operator cannot follow with what we have is none.
    looked_at = text.partition("## What to look at")[2]
    assert any(words[0] in ("hicachectl", "python") for words in commands(looked_at))


def test_the_index_names_each_page_once() -> None:
    rows = re.findall(
        r"^\| \[(\w+)\]\((\w+)\.md\) \|", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert all(name == target for name, target in rows)
    assert sorted(name for name, _ in rows) == sorted(CODES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_flags_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for words in commands(text):
        check_command(words)
    flags = set(server_args._parser()._option_string_actions)
    assert set(re.findall(r"`(--[a-z-]+)`", text)) - flags - {"--url", "--key-file"} == set()


def test_a_command_that_does_not_exist_is_found() -> None:
    for line in ("hicachectl reboot", "hicachectl detach --now", "python -m sglang_hicache.store purge --everything"):
        with pytest.raises(SystemExit):
            check_command(shlex.split(line))
    assert commands("text\n\n```\na b 'c d'\n```\n") == [["a", "b", "c d"]]
