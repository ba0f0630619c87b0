"""A writer that dies, wherever it dies, leaves a whole page or none.

The writers here are forked processes that are really killed; the folder they leave is read by this one.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache.storage.checked import BatchResult
from sglang_hicache.storage.page_format import HEADER_BYTES
from tests.storage import pages
from tests.storage.conftest import Open

_SIZE = 120

#: The children that are forked here beside the thread of an open store use nothing that this thread might hold.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def _in_child(work: Callable[[], None]) -> int:
    """Fork, do the work there, and say how the child ended."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(7)
    return child


def _ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _write(backend: Any, seed: int, size: int = _SIZE) -> BatchResult:
    return pages.store(backend, size=size).write_blocking([pages.key(1)], [pages.content(seed, size)], b"", 0)


def _read(backend: Any, size: int = _SIZE) -> tuple[BatchResult, memoryview]:
    (target,) = pages.empty(1, size)
    return pages.store(backend, size=size).read_blocking([pages.key(1)], [target]), target


def test_fm38_writer_killed_at_every_byte_of_a_page(open_backend: Open, root: Path) -> None:
    reader = open_backend("file", {"file_storage_path": str(root)})
    pwritev = os.pwritev
    for offset in range(HEADER_BYTES + _SIZE + 1):

        def die_there(descriptor: int, buffers: list[Any], at: int, offset: int = offset) -> int:
            pwritev(descriptor, [b"".join(buffers)[:offset]], at)
            os.kill(os.getpid(), signal.SIGKILL)
            return 0

        def work(die: Callable[..., int] = die_there) -> None:
            backend = pages.backend("file", {"file_storage_path": str(root)})
            backend.open_blocking()
            os.pwritev = die
            _write(backend, 1)

        assert _ended(_in_child(work)) == -signal.SIGKILL
        assert _read(reader)[0] == BatchResult(0, reason="miss")
    assert pages.page_files(root) == []
    assert _write(reader, 1).pages == 1
    assert _read(reader)[0] == BatchResult(1)


@pytest.mark.parametrize("call", ["rename", "close"])
def test_fm38_writer_killed_around_the_rename(
    open_backend: Open, root: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    reader = open_backend("file", {"file_storage_path": str(root)})
    real = vars(os)[call]

    def work() -> None:
        backend = pages.backend("file", {"file_storage_path": str(root)})
        backend.open_blocking()
        _write(backend, 5)
        pages.page_files(root)[0].unlink()

        def after(*args: Any) -> None:
            real(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(os, call, after)
        _write(backend, 1)

    assert _ended(_in_child(work)) == -signal.SIGKILL
    result, target = _read(reader)
    assert result == (BatchResult(1) if call == "rename" else BatchResult(0, reason="miss"))
    assert target == (pages.content(1, _SIZE) if call == "rename" else bytes(_SIZE))


def test_fm38_page_cut_at_every_byte_is_a_miss_and_removes_itself(open_backend: Open, root: Path) -> None:
    """What a power cut may leave under the final name when nothing was synced."""
    backend = open_backend("file", {"file_storage_path": str(root)})
    for length in range(HEADER_BYTES + _SIZE):
        assert _write(backend, 1).pages == 1
        (path,) = pages.page_files(root)
        os.truncate(path, length)
        assert _read(backend)[0].corrupt == 1
        assert not path.exists()


def test_fm38_page_with_a_hole_of_zeros_is_a_miss(open_backend: Open, root: Path) -> None:
    """The size reached the disk, some blocks did not."""
    backend = open_backend("file", {"file_storage_path": str(root)})
    for start in (0, HEADER_BYTES, HEADER_BYTES + 64):
        assert _write(backend, 1).pages == 1
        (path,) = pages.page_files(root)
        stored = bytearray(path.read_bytes())
        stored[start : start + 32] = bytes(32)
        path.write_bytes(stored)
        assert _read(backend)[0].corrupt == 1


def test_fm38_two_processes_write_one_page_while_a_third_reads(open_backend: Open, root: Path) -> None:
    """Each writer has bytes of its own, so a mixture of both would show."""
    size, enough_hits = 600_000, 3
    seen, tell = os.pipe()  # readable for the writers once the reader has met enough pages
    backend = open_backend("file", {"file_storage_path": str(root)})

    def work(seed: int) -> None:
        own = pages.backend("file", {"file_storage_path": str(root)}, rank=seed)
        own.open_blocking()
        while not select.select([seen], [], [], 0)[0]:
            _write(own, seed, size)
            own.delete_blocking([pages.layout(size=size).name(pages.key(1))])
        own.close_blocking()
        os._exit(0)

    writers = [_in_child(lambda: work(1)), _in_child(lambda: work(2))]
    allowed = (pages.content(1, size), pages.content(2, size))
    hits = 0
    while writers:
        result, target = _read(backend, size)
        assert result.corrupt == 0
        if result.pages:
            hits += 1
            assert target in allowed
            if hits == enough_hits:
                os.write(tell, b"x")
        for child in list(writers):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                assert os.waitstatus_to_exitcode(status) == 0
                writers.remove(child)
    assert hits >= enough_hits
    os.close(seen)
    os.close(tell)


def test_sweeping_takes_what_killed_writers_left(open_backend: Open, root: Path) -> None:
    def work() -> None:
        backend = pages.backend("file", {"file_storage_path": str(root)})
        backend.open_blocking()
        os.rename = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        _write(backend, 1)

    assert _ended(_in_child(work)) == -signal.SIGKILL
    assert len(list(root.glob("tmp/*/0"))) == 1
    open_backend("file", {"file_storage_path": str(root)})
    assert list(root.glob("tmp/*/0")) == []
