"""Several processes on one folder: one limit, one evictor, and another one when it dies.

The processes here are forked and talk through pipes; this one only looks at the folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.storage import pages
from tests.storage.store_world import PAGE, numbers, stored_bytes

#: The children use nothing that a thread of this process might hold.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

LIMIT_PAGES = 200
WRITTEN_PAGES = 300


class Crew:
    """Forked processes, each with the file store open, that report one line of JSON each."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._readers: dict[int, int] = {}
        #: Children go on when they can read a byte here.
        self.go, self._say_go = os.pipe()

    def start(self, work: Callable[[Any], None], rank: int, **config: Any) -> int:
        """Fork; `work` gets the open backend, and its numbers at the end are reported."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                backend = pages.backend("file", {"file_storage_path": str(self._root), **config}, rank)
                backend.open_blocking()
                work(backend)
                backend.close_blocking()
                os.write(writer, json.dumps(backend.stats()).encode())
            finally:
                os._exit(0)
        os.close(writer)
        self._readers[child] = reader
        return child

    def release(self, count: int) -> None:
        """Let so many go on."""
        os.write(self._say_go, b"g" * count)

    def kill(self, child: int) -> None:
        """The process is gone, at once."""
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(self._readers.pop(child))

    def reports(self, meanwhile: Callable[[], None] = lambda: None) -> list[dict[str, int]]:
        """Wait for the end of all."""
        raw = []
        while self._readers:
            meanwhile()
            for child in list(self._readers):
                if os.waitpid(child, os.WNOHANG)[0]:
                    with os.fdopen(self._readers.pop(child), "rb") as lines:
                        raw.append(lines.read())
        return [json.loads(line) for line in raw]

    def close(self) -> None:
        """End what still lives."""
        for child in list(self._readers):
            self.kill(child)
        os.close(self.go)
        os.close(self._say_go)


@pytest.fixture
def crew(root: Path) -> Iterator[Crew]:
    made = Crew(root)
    yield made
    made.close()


def _write_all(backend: Any, rank: int) -> None:
    """Write pages that nobody else writes, and wait for room where there is none."""
    store = pages.store(backend)
    for number in range(1, WRITTEN_PAGES + 1):
        keys, content = [pages.key(10_000 * (rank + 1) + number)], [pages.content(rank)]
        pages.wait_until(lambda k=keys, c=content: store.write_blocking(k, c, b"", 0).pages == 1, "there is room")


def _is_locked(root: Path) -> bool:
    """Does some process evict?"""
    try:
        lock = os.open(root / "evictor.lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


@pytest.mark.parametrize("count", [2, 4])
def test_fm53_processes_on_one_folder_keep_one_limit(crew: Crew, root: Path, count: int) -> None:
    """They overshoot by a hundredth each at most, and what they say they deleted is what is missing."""
    for rank in range(count):
        crew.start(lambda backend, rank=rank: _write_all(backend, rank), rank, max_size=LIMIT_PAGES * PAGE)
    highest = [0]

    def watch() -> None:
        highest[0] = max(highest[0], stored_bytes(root))

    reports = crew.reports(watch)
    assert len(reports) == count
    overshoot = count * (LIMIT_PAGES // 100 + 1)
    # Before the first count nobody knows of the others but by their leases; pages that vanish while the folders are
    # walked make a sum larger than it ever was.
    assert highest[0] <= (LIMIT_PAGES + overshoot) * PAGE * 1.1
    assert len(numbers(root)) == count * WRITTEN_PAGES - sum(report["evicted_pages"] for report in reports)
    assert stored_bytes(root) <= (LIMIT_PAGES + overshoot) * PAGE


def test_fm53_another_process_evicts_when_the_one_that_did_is_killed(crew: Crew, root: Path) -> None:
    def wait_then_write(backend: Any, rank: int) -> None:
        os.read(crew.go, 1)
        _write_all(backend, rank)

    first = crew.start(lambda backend: wait_then_write(backend, 0), 0, max_size=LIMIT_PAGES * PAGE)
    pages.wait_until(lambda: _is_locked(root), "the first one evicts")
    pages.wait_until((root / "usage.json").exists, "and has counted")
    crew.start(lambda backend: wait_then_write(backend, 1), 1, max_size=LIMIT_PAGES * PAGE)
    crew.kill(first)
    crew.release(1)
    (report,) = crew.reports()
    assert report["evicted_pages"] == WRITTEN_PAGES - len(numbers(root)) > 0
    assert stored_bytes(root) <= LIMIT_PAGES * PAGE
    assert list((root / "tmp").iterdir()) == []


def test_what_a_killed_process_wrote_still_counts(crew: Crew, root: Path) -> None:
    def write_and_stay(backend: Any) -> None:
        store = pages.store(backend)
        assert store.write_blocking(pages.keys(50), [pages.content(1)] * 50, b"", 0).pages == 50
        os.read(crew.go, 1)

    def watch(backend: Any) -> None:
        os.read(crew.go, 1)
        pages.wait_until(lambda: backend.stats()["used_bytes"] == 50 * PAGE, "it counts what the dead wrote")

    crew.start(watch, 1)
    pages.wait_until(lambda: _is_locked(root), "it evicts")
    writer = crew.start(write_and_stay, 0)
    pages.wait_until(lambda: len(numbers(root)) == 50, "all are written")
    crew.kill(writer)
    crew.release(1)
    (report,) = crew.reports()
    assert report["used_pages"] == 50
