"""The leak check of tests/conftest.py sees what it is there for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from tests import conftest


def _before() -> tuple[set[threading.Thread], dict[int, str], set[int]]:
    return set(threading.enumerate()), conftest._descriptors(), conftest._children()


def test_an_open_descriptor_is_seen() -> None:
    before = _before()
    reader, writer = os.pipe()
    seen = conftest._leaks(*before)
    os.close(reader)
    os.close(writer)
    assert len(seen) == 2 and all("pipe" in leak for leak in seen)
    assert not conftest._leaks(*before)


def test_a_running_thread_is_seen() -> None:
    before = _before()
    go_on = threading.Event()
    thread = threading.Thread(target=go_on.wait, name="forgotten")
    thread.start()
    seen = conftest._leaks(*before)
    go_on.set()
    thread.join()
    assert seen == ["thread forgotten"]


def test_a_child_process_is_seen() -> None:
    before = _before()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    seen = conftest._leaks(*before)
    child.communicate(b"\n")
    assert f"child process {child.pid}" in seen


def test_what_stays_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "GRACE_S", 0.0)
    before = _before()
    reader, writer = os.pipe()
    assert len(conftest._lasting_leaks(*before)) == 2
    os.close(reader)
    os.close(writer)
    assert not conftest._lasting_leaks(*before)
