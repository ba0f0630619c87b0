"""docs/failure-modes.md holds every row of this version, each with tests that exist or a reason."""

from __future__ import annotations

import re

from tests.house.source import ROOT

PAGE = (ROOT / "docs" / "failure-modes.md").read_text(encoding="utf-8")
TEST_NAME = re.compile(r"test_fm\d\d\w*")
ROW = re.compile(r"^\| (\d+b?) \| [^|]+ \| ([^|]+) \|$", re.MULTILINE)
#: Rows of the collection that this version is held to.
NUMBERS = (
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 16 17 19 21 22 23 24 28 29 30 31 32 33 37 "
    "38 39 39b 40 41 42 43 44 45 47 48 50 52 53 54 55 56 58 60 61 63"
)


def defined_tests() -> set[str]:
    definition = re.compile(r"def (test_fm\w+)\(")
    files = (ROOT / "tests").rglob("test_*.py")
    return {name for file in files for name in definition.findall(file.read_text(encoding="utf-8"))}


def numbers_of(test_name: str) -> list[str]:
    """`test_fm03_fm39b_pages` speaks of 3 and 39b."""
    return [number.lstrip("0") for number in re.findall(r"(?<=_)fm(\d+b?)(?=_)", test_name)]


def test_every_named_test_exists() -> None:
    assert set(TEST_NAME.findall(PAGE)) - defined_tests() == set()


def test_every_row_is_there_once_with_a_test_of_its_number_or_a_reason() -> None:
    rows = ROW.findall(PAGE)
    assert [number for number, _ in rows] == NUMBERS.split()
    for number, proof in rows:
        named = {n for name in TEST_NAME.findall(proof) for n in numbers_of(name)}
        assert number in named or proof.startswith("Cannot happen: "), f"row {number} proves nothing"


def test_numbers_are_read_from_names() -> None:
    assert numbers_of("test_fm03_fm39b_pages_of_fm1_kind") == ["3", "39b", "1"]
