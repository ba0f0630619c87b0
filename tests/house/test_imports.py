"""The import law and the fence around pure files: the contracts of pyproject.toml hold, and each can fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.house.source import PRODUCT_FOLDERS, ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONTRACTS = {contract["id"]: contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"]}

#: For each contract a file and an import that it must refuse there.
BREACHES = {
    "floor": ("sglang_hicache/errors.py", "import sglang_hicache.workers.batch"),
    "workers": ("workers/batch.py", "from sglang_hicache.scheduler import request"),
    "tokenizer": ("tokenizer/__init__.py", "import sglang_hicache.workers.batch"),
    "scheduler": ("scheduler/__init__.py", "import sglang_hicache.tokenizer"),
    # Indirectly: errors is imported by nearly everything.
    "pure": ("sglang_hicache/errors.py", "import time"),
    "torch": ("sglang_hicache/errors.py", "def f():\n    import torch"),
    "zmq": ("sglang_hicache/wire.py", "import zmq"),
}
#: Entry points: nobody imports them, they may need every room.
ENTRY_POINTS = {"launch_server"}


def _lint(folder: Path, *contracts: str) -> subprocess.CompletedProcess[str]:
    call = f"lint_imports(limit_to_contracts={contracts!r}, no_cache=True, no_logo=True)"
    code = f"import sys; from importlinter.cli import lint_imports; sys.exit({call})"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source, links included, that a test may spoil."""
    folder = tmp_path_factory.mktemp("tree")
    for name in PRODUCT_FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "builtin_model")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_contracts_hold() -> None:
    result = _lint(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("contract", CONTRACTS)
def test_contract_refuses(copy: Path, contract: str) -> None:
    path, line = BREACHES[contract]
    original = (copy / path).read_text(encoding="utf-8")
    (copy / path).write_text(f"{original}\n{line}\n", encoding="utf-8")
    try:
        result = _lint(copy, contract)
    finally:
        (copy / path).write_text(original, encoding="utf-8")
    assert result.returncode == 1, result.stdout
    assert CONTRACTS[contract]["name"] in result.stdout


def test_the_whole_floor_is_fenced() -> None:
    floor = {
        path.stem
        for path in (ROOT / "sglang_hicache").iterdir()
        if not path.is_symlink() and (path.suffix == ".py" or (path / "__init__.py").exists())
    }
    named = {name.removeprefix("sglang_hicache.") for name in CONTRACTS["floor"]["source_modules"]}
    assert floor - {"__init__"} - ENTRY_POINTS == named


def test_rooms_are_links_below_the_import_root() -> None:
    for room in ("scheduler", "tokenizer", "workers"):
        link = ROOT / "sglang_hicache" / room
        assert link.is_symlink() and link.readlink() == Path("..") / room
