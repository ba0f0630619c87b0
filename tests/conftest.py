"""What every test shares: it leaves nothing behind.

A thread, a descriptor or a child process that outlives its test fails that test, not the one that happens to
stumble over it an hour later.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import zmq

# Repeatable: a failure that chance found belongs into the repository as an example, not into one person's run.
hypothesis.settings.register_profile("house", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("house")

#: A thread or process that was told to end gets this long to be gone; only a failing test ever waits it out.
GRACE_S = 20.0


def _descriptors() -> dict[int, str]:
    """Open descriptors and what they lead to, but for files that the interpreter keeps open on its own."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return found


def _children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the thread has just ended
            found.update(map(int, (task / "children").read_text(encoding="ascii").split()))
    return found


def _leaks(threads: set[threading.Thread], descriptors: dict[int, str], children: set[int]) -> list[str]:
    new_threads = [thread for thread in threading.enumerate() if thread not in threads and thread.is_alive()]
    new_descriptors = {number: to for number, to in _descriptors().items() if descriptors.get(number) != to}
    return [
        *(f"thread {thread.name}" for thread in new_threads),
        *(f"descriptor {number} -> {to}" for number, to in new_descriptors.items()),
        *(f"child process {pid}" for pid in sorted(_children() - children)),
    ]


def _lasting_leaks(threads: set[threading.Thread], descriptors: dict[int, str], children: set[int]) -> list[str]:
    """What is still there after a while: ZMQ closes descriptors on its own thread, ended children need a moment."""
    if not (found := _leaks(threads, descriptors, children)):
        return found
    gc.collect()  # closes what an abandoned object holds; too slow to do after every test
    deadline, never = time.monotonic() + GRACE_S, threading.Event()
    while (found := _leaks(threads, descriptors, children)) and time.monotonic() < deadline:
        never.wait(0.01)
    return found


@pytest.fixture(scope="session", autouse=True)
def process_wide_descriptors() -> None:
    """ZMQ has one context per process, whose threads and descriptors the first socket would otherwise answer for."""
    zmq.Context.instance().socket(zmq.PAIR).close()


@pytest.fixture(scope="session", autouse=True)
def what_is_imported_stays() -> None:
    """A search for garbage need not walk through all of torch, which hundreds of leak checks would pay for."""
    gc.freeze()


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pytest's own, by a shorter name: servers have sockets in it, whose paths may have 107 bytes, and two files of
    tests at a time make it longer."""
    name = re.sub(r"\W", "_", request.node.name.removeprefix("test_"))
    return tmp_path_factory.mktemp(name[:12])


@pytest.fixture(autouse=True)
def leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compares threads, descriptors and children before and after; `@pytest.mark.leaks(reason)` opts out."""
    before = set(threading.enumerate()), _descriptors(), _children()
    yield
    if not request.node.get_closest_marker("leaks"):
        assert not _lasting_leaks(*before)
