"""Dry runs of stores made of stores: each store inside is tried as it would be alone, and leaves as little behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.storage.conftest import Open
from tests.storage.store_folder import write
from tests.storage.test_dry_run import STEPS, dry_run, tree

_MEMORY = {"backend": "memory"}


def _file(path: Path) -> dict[str, Any]:
    return {"backend": "file", "extra_config": {"file_storage_path": str(path)}}


def _faulty(call: str, kind: str = "error", **fault: Any) -> dict[str, Any]:
    return {"backend": "faulty", "extra_config": {"inner": "memory", "faults": {call: {"kind": kind, **fault}}}}


@pytest.mark.parametrize(("name", "key"), [("tiered", "tiers"), ("mirror", "copies")])
def test_a_store_that_is_there_is_as_it_was_and_one_that_was_not_is_not(
    name: str, key: str, open_backend: Open, root: Path, tmp_path: Path
) -> None:
    backend = open_backend("file", {"file_storage_path": str(root)})
    write(backend, 5)
    backend.close_blocking()
    before = tree(root)
    report = dry_run(name, {key: [_file(tmp_path / "new"), _file(root)]})
    assert [step.name for step in report.steps] == STEPS and report.failed_step == ""
    assert report.info[f"{key[:-1] if name == 'tiered' else 'copy'}2_path"] == str(root)
    assert tree(root) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize(("call", "step"), [("open", "connect"), ("write", "write"), ("delete", "delete")])
def test_the_tier_that_fails_is_named_where_it_is_needed(call: str, step: str) -> None:
    report = dry_run("tiered", {"tiers": [_MEMORY, _faulty(call)]})
    assert (report.failed_step, report.code) == (step, "other")
    assert f"sabotaged {call}" in report.reason and "tier 2 (faulty)" in report.reason


@pytest.mark.parametrize("call", ["open", "write", "read", "exists"])
def test_what_a_mirror_can_do_without_is_told_and_no_failure(call: str) -> None:
    report = dry_run("mirror", {"copies": [_faulty(call), _MEMORY]})
    assert report.failed_step == "", report
    assert report.info["copy2"] == "memory: opened"
    if call == "open":
        assert report.info["copy1"].startswith("faulty: copy 1 (faulty) is left alone for 1.0 s: sabotaged open")


def test_a_store_that_keeps_nothing_is_found_by_nobody_but_the_dry_run() -> None:
    report = dry_run("tiered", {"tiers": [_faulty("write", "disappear"), _faulty("write", "disappear")]})
    assert (report.failed_step, report.code) == ("exists", "contract")


def test_tiers_without_room_are_told_as_such(root: Path) -> None:
    report = dry_run("tiered", {"tiers": [_MEMORY, _faulty("write", "no_space")]})
    assert (report.failed_step, report.code) == ("write", "no_space")
