"""When there is no room: writes stop, everything else goes on, and it heals by itself."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache.errors import StorageError
from sglang_hicache.storage import file_quarantine
from sglang_hicache.storage.checked import BatchResult
from sglang_hicache.storage.file_folder import TemporaryFolder
from sglang_hicache.storage.file_pages import QUARANTINE
from tests.storage import pages
from tests.storage.conftest import Open
from tests.storage.store_world import OTHER, PAGE, numbers, stored_bytes

#: Threads that housekeep run in the tests below; what they do takes a moment.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def _write(backend: Any, first: int, count: int = 1, **layout: Any) -> BatchResult:
    contents = [pages.content(number, layout.get("size", pages.PAGE_BYTES)) for number in range(count)]
    return pages.store(backend, **layout).write_blocking(pages.keys(count, first), contents, b"", 0)


def _open(open_backend: Open, root: Path, **config: Any) -> Any:
    return open_backend("file", {"file_storage_path": str(root), **config})


def _fill(backend: Any, root: Path) -> int:
    """Write until pages have gone; how many were written."""
    for number in range(1, 1000):
        pages.wait_until(lambda number=number: _write(backend, number).pages == 1, "there is room again")
        if backend.stats()["evicted_pages"]:
            return number
    raise AssertionError("nothing ever goes")


def test_fm53_a_full_store_lets_old_pages_go_and_takes_new_ones(open_backend: Open, root: Path) -> None:
    backend = _open(open_backend, root, max_size=40 * PAGE)
    written = _fill(backend, root)
    assert 30 <= written <= 60
    assert stored_bytes(root) <= 40 * PAGE
    pages.wait_until(lambda: backend.stats()["used_bytes"] == stored_bytes(root), "the books are right")
    stats = backend.stats()
    assert stats["max_bytes"] == 40 * PAGE
    assert stats["used_pages"] == len(numbers(root)) == written - stats["evicted_pages"]
    assert backend.info()["why"] == "max_size"


def test_fm53_a_full_disk_stops_writes_and_nothing_else(
    open_backend: Open, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = _open(open_backend, root)
    assert _write(backend, 1, 3).pages == 3
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", lambda *args, code=code: (_ for _ in ()).throw(OSError(code, "full")))
            result = _write(backend, 9)
            assert (result.pages, result.reason.split(":")[0]) == (0, "no_space")
            store = pages.store(backend)
            assert store.lookup_blocking(pages.keys(3)) == 3
            assert store.read_blocking(pages.keys(3), pages.empty(3)) == BatchResult(3)
    assert backend.stats()["no_space_pages"] == 3
    assert _write(backend, 9).pages == 1


def test_fm53_what_must_stay_free_is_looked_at_before_a_write(
    open_backend: Open, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = _open(open_backend, root, min_free_space=100 * PAGE)
    free_pages = [1000]
    disk = lambda path: os.statvfs_result((1, PAGE, 1000, 0, free_pages[0], 0, 0, 0, 0, 255))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", disk)
        free_pages[0] = 99
        numbers_left = iter(range(50, 10**6))
        refused = "no_space: no room for page"
        pages.wait_until(lambda: _write(backend, next(numbers_left)).reason.startswith(refused), "it is refused")
        patch.setattr(os, "pwritev", lambda *args: pytest.fail("a write has started"))
        assert _write(backend, 10).reason.startswith(refused)
    pages.wait_until(lambda: _write(backend, 10).pages == 1, "it heals by itself")


def test_fm53_a_limit_of_the_process_on_the_size_of_a_file_is_no_space(root: Path) -> None:
    """A real limit of the kernel, in a process of its own."""
    reports, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            backend = pages.backend("file", {"file_storage_path": str(root)})
            backend.open_blocking()
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            for limit, size in ((2000, 4096), (256, 4096), (hard, 4096)):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
                result = _write(backend, 1, size=size)
                os.write(tell, f"{result.pages} {result.reason.split(':')[0]}\n".encode())
            backend.close_blocking()
        finally:
            os._exit(0)
    os.close(tell)
    os.waitpid(child, 0)
    with os.fdopen(reports) as lines:
        assert lines.read() == "0 no_space\n0 no_space\n1 \n"
    assert numbers(root) == [1]


def test_an_attach_to_a_full_store_passes_its_test(open_backend: Open, root: Path) -> None:
    """Otherwise nobody would be there to make room."""
    _fill(_open(open_backend, root, max_size=40 * PAGE), root)
    backend = _open(open_backend, root, max_size=2 * PAGE)
    pages.store(backend).self_test_blocking(0)
    pages.wait_until(lambda: stored_bytes(root) <= 2 * PAGE, "the smaller limit holds")
    pages.wait_until(lambda: _write(backend, 5000).pages == 1, "and there is room in it")


def test_fm53_an_attach_to_a_disk_full_to_the_last_block_serves_reads(
    open_backend: Open, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(_open(open_backend, root), 1, 3)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TemporaryFolder, "create", full)
        backend = _open(open_backend, root)
        store = pages.store(backend)
        store.self_test_blocking(0)
        assert store.read_blocking(pages.keys(3), pages.empty(3)) == BatchResult(3)
        assert _write(backend, 10).reason.startswith("no_space: ")
    assert _write(backend, 10).pages == 1


class TestFolderDeleted:
    @pytest.mark.parametrize("what", ["", "tmp", pages.NAMESPACE, "evictor.lock", "usage.json"])
    def test_it_heals_with_the_next_write(self, open_backend: Open, root: Path, what: str) -> None:
        backend = _open(open_backend, root)
        assert _write(backend, 1, 3).pages == 3
        pages.wait_until(lambda: (root / "usage.json").exists(), "it has counted")
        if (root / what).is_dir():
            pages.wait_until(lambda: shutil.rmtree(root / what, ignore_errors=True) or not (root / what).exists(), what)
        else:
            (root / what).unlink()
        assert _write(backend, 10, 3).pages == 3
        assert pages.store(backend).read_blocking(pages.keys(3, 10), pages.empty(3)) == BatchResult(3)
        assert pages.store(backend).lookup_blocking(pages.keys(3)) in (0, 3)
        if what in ("", "tmp", "evictor.lock"):
            pages.wait_until((root / "evictor.lock").exists, "somebody evicts again")

    def test_while_it_cannot_be_made_every_write_says_why(
        self, open_backend: Open, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = _open(open_backend, root)
        shutil.rmtree(root)
        root.write_text("in the way")
        assert "storage folder" in _write(backend, 1).reason or "Not a directory" in _write(backend, 1).reason
        root.unlink()
        assert _write(backend, 1).pages == 1


class TestRefusals:
    def test_a_file_system_that_cannot_be_written(
        self, open_backend: Open, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def read_only(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        root.mkdir(mode=0o700)
        monkeypatch.setattr(os, "mkdir", read_only)
        with pytest.raises(StorageError, match=f"cannot use {root} as storage folder: .*Read-only") as caught:
            _open(open_backend, root)
        assert caught.value.reason == "refused"

    def test_a_limit_that_holds_not_one_page(self, root: Path) -> None:
        with pytest.raises(StorageError, match=f"max_size=4096 is less than one page of {PAGE} bytes"):
            pages.backend("file", {"file_storage_path": str(root), "max_size": 4096})

    def test_a_disk_that_would_have_to_stay_empty(self, open_backend: Open, root: Path) -> None:
        """Every page would go, now and for ever."""
        with pytest.raises(StorageError, match="min_free_space=1024.0 TiB is all of the disk, which has"):
            _open(open_backend, root, min_free_space="1PiB")

    def test_a_home_that_nobody_has(self) -> None:
        with pytest.raises(StorageError, match="name it in full"):
            pages.backend("file", {"file_storage_path": "~nobody-of-this-name/kv"})

    def test_a_bad_default_in_the_environment(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SGLANG_HICACHE_FILE_BACKEND_MAX_SIZE", "lots")
        with pytest.raises(StorageError, match="FILE_BACKEND_MAX_SIZE in the environment: 'lots' is no size"):
            pages.backend("file", {"file_storage_path": str(root)})


def test_defaults_come_from_the_environment_and_lose_against_the_extra_config(
    open_backend: Open, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("MAX_SIZE", "10MiB"), ("MIN_FREE_SPACE", "0"), ("EVICTION_RATIO", "0.5")):
        monkeypatch.setenv(f"SGLANG_HICACHE_FILE_BACKEND_{name}", value)
    assert _open(open_backend, root).stats()["max_bytes"] == 10 << 20
    chosen = _open(open_backend, root, max_size="20MiB", low_watermark=0.6)
    assert chosen.stats()["max_bytes"] == 20 << 20


class TestQuarantine:
    def _damage(self, backend: Any, root: Path, number: int) -> None:
        _write(backend, number)
        for path in pages.page_files(root):
            raw = bytearray(path.read_bytes())
            raw[-1] ^= 1
            path.write_bytes(raw)
        read = pages.store(backend).read_blocking([pages.key(number)], pages.empty(1))
        assert (read.pages, read.corrupt) == (0, 1)

    def test_a_bad_page_is_moved_where_no_look_up_goes(self, open_backend: Open, root: Path) -> None:
        backend = _open(open_backend, root)
        self._damage(backend, root, 1)
        assert pages.page_files(root) == []
        (kept,) = (root / QUARANTINE).iterdir()
        assert kept.name.endswith(f"-{pages.NAMESPACE[:16]}-{pages.key(1).hex()}.0-2.page")
        assert kept.stat().st_size == PAGE
        assert pages.store(backend).lookup_blocking([pages.key(1)]) == 0
        assert _write(backend, 1).pages == 1
        assert not backend.set_aside_blocking(pages.layout().name(pages.key(77)))

    def test_the_oldest_go_first(self, open_backend: Open, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(file_quarantine, "MOST_FILES", 3)
        backend = _open(open_backend, root)
        for number in range(1, 6):
            self._damage(backend, root, number)
        kept = sorted(path.name for path in (root / QUARANTINE).iterdir())
        assert [pages.key(number).hex() in name for number, name in zip((3, 4, 5), kept)] == [True] * 3
        pages.wait_until(lambda: backend.stats()["used_bytes"] == 3 * PAGE, "what is kept counts")

    def test_it_takes_a_hundredth_of_the_store_at_most(self, open_backend: Open, root: Path) -> None:
        backend = _open(open_backend, root, max_size=250 * PAGE)
        for number in range(1, 6):
            self._damage(backend, root, number)
        assert len(list((root / QUARANTINE).iterdir())) == 2


def test_clear_and_delete_free_what_they_remove(open_backend: Open, root: Path) -> None:
    backend = _open(open_backend, root, max_size=100 * PAGE)
    _write(backend, 1, 10)
    _write(backend, 100, 5, namespace=OTHER)
    pages.wait_until(lambda: backend.stats()["used_bytes"] == 15 * PAGE, "counted")
    assert backend.clear_blocking(OTHER) == 5
    assert backend.delete_blocking([pages.layout().name(key) for key in pages.keys(3)]) == 3
    pages.wait_until(lambda: backend.stats()["used_bytes"] == 7 * PAGE == stored_bytes(root), "freed")


def test_a_write_keeps_what_it_hangs_on(open_backend: Open, root: Path) -> None:
    """The parent of a new page, and a page that is written again, are in use."""
    backend = _open(open_backend, root)
    _write(backend, 1, 2)
    parent, again = pages.page_files(root)
    for path in (parent, again):
        os.utime(path, (1000, 1000))
    pages.store(backend).write_blocking([pages.key(50)], [pages.content(1)], pages.key(1), 1)
    assert parent.stat().st_mtime > 10**9
    assert again.stat().st_mtime == 1000
    _write(backend, 2)
    assert again.stat().st_mtime > 10**9
