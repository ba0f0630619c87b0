"""The scripts are what people and continuous integration share: they start anywhere and stop at the first error."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.house.source import ROOT

_NAMES = ("install", "install-servers", "lint", "test", "serve")
SCRIPTS = [ROOT / "scripts" / name for name in _NAMES] + [ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_is_strict_and_executable(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", script], check=True, timeout=60)


def test_ci_runs_what_people_run() -> None:
    commands = [
        line
        for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith(("#", "set "))
    ]
    assert len(commands) == 1 and "scripts/test" in commands[0]


@pytest.fixture
def copy_with_a_space(tmp_path: Path) -> Path:
    """The scripts in a folder whose path has a space, with an environment that counts as installed."""
    root = tmp_path / "a tree"
    (root / "scripts").mkdir(parents=True)
    (root / ".venv" / "bin").mkdir(parents=True)
    for name in ("install", "install-servers", "lint", "test", "pins.txt"):
        (root / "scripts" / name).write_bytes((ROOT / "scripts" / name).read_bytes())
        (root / "scripts" / name).chmod(0o755)
    python = root / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\nprintf '%s|' \"$@\"; echo\n")
    python.chmod(0o755)
    text = subprocess.run(
        ["bash", "-c", 'printf "%s" "$(pwd) $(cat scripts/pins.txt scripts/install | sha256sum)"'],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    (root / ".venv" / ".installed").write_text(text.stdout)
    return root


def test_install_again_changes_nothing(copy_with_a_space: Path) -> None:
    """Not even Python starts: the one in the copy would print its arguments."""
    command = [copy_with_a_space / "scripts" / "install"]
    done = subprocess.run(command, check=True, cwd="/", capture_output=True, text=True)
    assert done.stdout == "" and done.stderr == ""


def _last_line(root: Path, *arguments: str) -> str:
    command = [root / "scripts" / "test", *arguments]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()[
        -1
    ]


def test_test_script_hands_its_arguments_to_pytest(copy_with_a_space: Path) -> None:
    always = "-m|pytest|-n|2|--dist|loadfile|--no-loadscope-reorder|"
    assert _last_line(copy_with_a_space) == always
    assert _last_line(copy_with_a_space, "-k", "a b", "-n", "0") == f"{always}-k|a b|-n|0|"
    assert _last_line(copy_with_a_space, "--long", "-x") == f"{always}-m||-x|"
