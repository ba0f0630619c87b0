"""Pages as files: which folder, whose, and what lies there."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache.errors import StorageError
from sglang_hicache.storage import file, file_folder, file_pages
from sglang_hicache.storage.checked import BatchResult
from sglang_hicache.storage.page_format import CHUNK_BYTES, HEADER_BYTES, WRITE_CHUNK_BYTES
from tests.storage import pages
from tests.storage.conftest import Open


def _write(backend: Any, count: int, first: int = 1, **layout: Any) -> BatchResult:
    size = layout.get("size", pages.PAGE_BYTES)
    contents = [pages.content(first + index, size) for index in range(count)]
    return pages.store(backend, **layout).write_blocking(pages.keys(count, first), contents, b"", 0)


def _read(backend: Any, count: int, **layout: Any) -> BatchResult:
    size = layout.get("size", pages.PAGE_BYTES)
    return pages.store(backend, **layout).read_blocking(pages.keys(count), pages.empty(count, size))


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class TestFolder:
    def test_explicit_path_wins_over_the_environment(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv(file_folder.STORAGE_DIR_ENV, "/environment")
        assert file_folder.storage_folder("/explicit") == Path("/explicit")
        assert file_folder.storage_folder("") == Path("/environment")
        monkeypatch.chdir(tmp_path)
        assert file_folder.storage_folder("relative") == tmp_path / "relative"

    def test_default_is_private_to_the_user(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv(file_folder.STORAGE_DIR_ENV, raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        assert file_folder.storage_folder("") == tmp_path / ".cache/sglang_hicache/storage"
        assert file_folder.storage_folder("~/kv") == tmp_path / "kv"
        monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
        assert file_folder.storage_folder("") == Path("/xdg/sglang_hicache/storage")
        monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
        assert file_folder.storage_folder("") == tmp_path / ".cache/sglang_hicache/storage"

    def test_status_shows_the_path_in_use(self, open_backend: Open, root: Path) -> None:
        backend = open_backend("file", {"file_storage_path": str(root), "fsync": "data", "max_size": "2GiB"})
        info = backend.info()
        assert (info["path"], info["fsync"], info["max_size"]) == (str(root), "data", "2.0 GiB")

    def test_nobody_else_can_read_or_write_anything(self, open_backend: Open, tmp_path: Path) -> None:
        root = tmp_path / "above" / "store"
        before = os.umask(0)
        try:
            assert _write(open_backend("file", {"file_storage_path": str(root)}), 2).pages == 2
        finally:
            os.umask(before)
        found = [root.parent, root, *root.rglob("*")]
        assert len(pages.page_files(root)) == 2
        for path in found:
            assert _mode(path) == (0o700 if path.is_dir() else 0o600), path

    @pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
    def test_folder_that_others_can_write_is_refused(self, root: Path, mode: int) -> None:
        root.mkdir()
        root.chmod(mode)
        backend = pages.backend("file", {"file_storage_path": str(root)})
        with pytest.raises(StorageError, match=f"mode {mode:o}.*chmod go-w") as caught:
            backend.open_blocking()
        assert caught.value.reason == "refused"
        assert list(root.iterdir()) == []
        backend.close_blocking()

    def test_folder_of_another_user_is_refused(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root.mkdir(mode=0o700)
        monkeypatch.setattr(os, "geteuid", lambda: root.stat().st_uid + 1)
        with pytest.raises(StorageError, match="belongs to user"):
            pages.backend("file", {"file_storage_path": str(root)}).open_blocking()

    def test_file_in_place_of_the_folder_is_refused(self, root: Path) -> None:
        root.write_text("x")
        with pytest.raises(StorageError, match="is not a folder"):
            pages.backend("file", {"file_storage_path": str(root)}).open_blocking()

    def test_folder_that_cannot_be_made_is_a_fault(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(StorageError, match="cannot use"):
            pages.backend("file", {"file_storage_path": str(tmp_path / "file" / "store")}).open_blocking()


class TestTemporaryFiles:
    def test_close_leaves_pages_only(self, root: Path) -> None:
        backend = pages.backend("file", {"file_storage_path": str(root)})
        backend.open_blocking()
        _write(backend, 2)
        backend.close_blocking()
        left = {path for path in root.rglob("*") if path.is_file()} - {root / name for name in file_pages.OWN_NAMES}
        assert sorted(left) == pages.page_files(root)
        assert list((root / "tmp").iterdir()) == []

    def test_what_the_dead_left_is_swept_and_what_the_living_use_is_not(self, open_backend: Open, root: Path) -> None:
        living = open_backend("file", {"file_storage_path": str(root)})
        (used,) = (root / "tmp").iterdir()
        dead, made = root / "tmp" / "0-000000000000dead", root.parent / "dead"
        made.mkdir()
        (made / "lock").touch()
        (made / "17").write_bytes(b"half a page")
        made.rename(dead)  # whole from the start: the living one sweeps at any moment
        open_backend("file", {"file_storage_path": str(root)}, rank=1)
        pages.wait_until(lambda: not dead.exists(), "it is swept, by whoever was first")
        assert used.exists()
        assert _write(living, 1).pages == 1

    def test_what_a_killed_sweeper_or_maker_left_can_be_swept(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Killed between any two steps: a lock that nobody holds is left, or nothing but an empty folder."""
        dead, unmade = root / "tmp" / "0-000000000000dead", root / "tmp" / "0-00000000000000ff"
        for folder in (dead, unmade):
            folder.mkdir(parents=True)
        for name in ("0", "lock", "zz"):
            (dead / name).touch()
        removed: list[str] = []
        unlink = os.unlink

        def note(path: Any, **kwargs: Any) -> None:
            removed.append(os.path.basename(path))
            unlink(path, **kwargs)

        monkeypatch.setattr(os, "unlink", note)
        file_folder.sweep(root / "tmp")
        assert sorted(removed) == ["0", "lock", "zz"] and removed[-1] == "lock"
        assert list((root / "tmp").iterdir()) == []

    def test_failed_write_leaves_no_file(self, open_backend: Open, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = open_backend("file", {"file_storage_path": str(root)})

        def full(*args: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwritev", full)
        result = _write(backend, 2)
        assert result.pages == 0
        assert result.reason.startswith("no_space: ")
        assert pages.page_files(root) == []
        assert {path.name for path in root.glob("tmp/*/*")} <= {"lock", "usage"}

    def test_disk_that_takes_only_a_part_is_full(
        self, open_backend: Open, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend, pwritev = open_backend("file", {"file_storage_path": str(root)}), os.pwritev
        monkeypatch.setattr(os, "pwritev", lambda fd, buffers, at: pwritev(fd, [b"".join(buffers)[:100]], at))
        assert _write(backend, 1).reason.startswith("no_space: ")
        assert pages.page_files(root) == []


class TestPages:
    def test_pages_lie_fanned_out_by_namespace_and_key(self, open_backend: Open, root: Path) -> None:
        _write(open_backend("file", {"file_storage_path": str(root)}), 1)
        key = pages.key(1).hex()
        (path,) = pages.page_files(root)
        assert path == root / pages.NAMESPACE / key[:2] / f"{key}.0-2.page"
        assert path.stat().st_size == HEADER_BYTES + pages.PAGE_BYTES

    @pytest.mark.parametrize("policy", ["none", "data", "full"])
    def test_fsync_follows_the_policy(
        self, open_backend: Open, root: Path, monkeypatch: pytest.MonkeyPatch, policy: str
    ) -> None:
        synced: list[str] = []
        monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append("data"))
        monkeypatch.setattr(
            os, "fsync", lambda fd: synced.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        )
        _write(open_backend("file", {"file_storage_path": str(root), "fsync": policy}), 1)
        assert synced == {"none": [], "data": ["data"], "full": ["file", "folder"]}[policy]

    def test_page_that_is_there_is_not_written_again(self, open_backend: Open, root: Path) -> None:
        backend = open_backend("file", {"file_storage_path": str(root)})
        _write(backend, 1)
        before = pages.page_files(root)[0].stat()
        assert _write(backend, 1).pages == 1
        assert pages.page_files(root)[0].stat().st_ino == before.st_ino

    def test_page_of_a_wrong_size_is_written_again(self, open_backend: Open, root: Path) -> None:
        backend = open_backend("file", {"file_storage_path": str(root)})
        _write(backend, 1)
        os.truncate(pages.page_files(root)[0], 100)
        assert _write(backend, 1).pages == 1
        assert _read(backend, 1) == BatchResult(1)

    @pytest.mark.parametrize("size", [pages.PAGE_BYTES, 2 * CHUNK_BYTES, WRITE_CHUNK_BYTES + 1])
    def test_fm10_page_that_is_longer_or_shorter_than_it_should_be_is_a_miss(
        self, open_backend: Open, root: Path, size: int
    ) -> None:
        backend = open_backend("file", {"file_storage_path": str(root)})
        for change in (-1, +1, -size, -size - HEADER_BYTES):
            _write(backend, 2, size=size)
            path = pages.page_files(root)[1]
            os.truncate(path, path.stat().st_size + change)
            result = _read(backend, 2, size=size)
            assert (result.pages, result.corrupt) == (1, 1)
            assert not path.exists()

    def test_link_in_place_of_a_page_is_not_followed(self, open_backend: Open, root: Path) -> None:
        backend = open_backend("file", {"file_storage_path": str(root)})
        _write(backend, 1)
        path = pages.page_files(root)[0]
        path.rename(root / "moved")
        path.symlink_to(root / "moved")
        result = _read(backend, 1)
        assert (result.pages, result.reason.split(":")[0]) == (0, "corrupt")

    def test_unreadable_page_is_a_fault_of_its_op(
        self, open_backend: Open, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = open_backend("file", {"file_storage_path": str(root)})
        _write(backend, 2)

        def broken(*args: Any) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", broken)
        assert _read(backend, 2).reason.startswith("io: cannot read page")

    def test_fm31_file_copied_from_another_model_is_a_miss(self, open_backend: Open, root: Path) -> None:
        backend = open_backend("file", {"file_storage_path": str(root)})
        _write(backend, 1)
        theirs = root / ("77" * 32) / "00" / pages.page_files(root)[0].name
        theirs.parent.mkdir(parents=True)
        theirs.write_bytes(pages.page_files(root)[0].read_bytes())
        result = _read(backend, 1, namespace="77" * 32)
        assert (result.pages, result.corrupt) == (0, 1)
        assert _read(backend, 1) == BatchResult(1)


class TestClear:
    def test_foreign_files_stay(self, open_backend: Open, root: Path) -> None:
        backend = open_backend("file", {"file_storage_path": str(root)})
        _write(backend, 3)
        _write(backend, 2, namespace="77" * 32)
        own = root / pages.NAMESPACE / "00"
        foreign = [
            root / "notes.txt",
            root / pages.NAMESPACE / "readme",
            own / "something.page",
            own / f"{'ab' * 32}.0-2.page",
            own / f"{'ab' * 32}.0-2.page.bak",
            root / pages.NAMESPACE / "zz" / f"{'ab' * 32}.0-2.page",
        ]
        for path in foreign:
            path.parent.mkdir(exist_ok=True)
            path.write_text("somebody else's bytes")
        assert backend.clear_blocking(pages.NAMESPACE) == 3
        assert all(path.exists() for path in foreign)
        assert pages.store(backend, namespace="77" * 32).lookup_blocking(pages.keys(2)) == 2

    def test_torn_pages_go_too(self, open_backend: Open, root: Path) -> None:
        backend = open_backend("file", {"file_storage_path": str(root)})
        _write(backend, 2)
        os.truncate(pages.page_files(root)[0], 0)
        os.truncate(pages.page_files(root)[1], 5)
        assert backend.clear_blocking(pages.NAMESPACE) == 2

    def test_pages_of_other_head_ranges_of_the_model_go_too(self, open_backend: Open, root: Path) -> None:
        backend = open_backend("file", {"file_storage_path": str(root)})
        _write(backend, 1)
        _write(backend, 1, heads=(2, 4))
        assert backend.clear_blocking(pages.NAMESPACE) == 2


class TestTouch:
    def _aged(self, open_backend: Open, root: Path, age_s: float) -> tuple[Any, list[Path]]:
        backend = open_backend("file", {"file_storage_path": str(root)})
        _write(backend, 3)
        then_s = time.time() - age_s
        for path in pages.page_files(root):
            os.utime(path, (then_s, then_s))
        return backend, pages.page_files(root)

    def test_used_pages_become_young_and_parents_never_older_than_children(
        self, open_backend: Open, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend, found = self._aged(open_backend, root, 1000)
        order: list[str] = []
        utime = os.utime
        monkeypatch.setattr(os, "utime", lambda path, *args, **_: (order.append(Path(path).name), utime(path, *args)))
        pages.store(backend).touch_blocking(pages.keys(3))
        assert order == [path.name for path in reversed(found)]
        assert all(time.time() - path.stat().st_mtime < 100 for path in found)

    def test_pages_used_a_moment_ago_are_left_alone(self, open_backend: Open, root: Path) -> None:
        backend, found = self._aged(open_backend, root, file_pages.TOUCH_INTERVAL_S / 2)
        before = [path.stat().st_mtime_ns for path in found]
        pages.store(backend).touch_blocking(pages.keys(3))
        assert [path.stat().st_mtime_ns for path in found] == before

    def test_page_that_is_gone_is_no_fault(self, open_backend: Open, root: Path) -> None:
        backend, found = self._aged(open_backend, root, 1000)
        found[0].unlink()
        pages.store(backend).touch_blocking(pages.keys(3))


class TestSharedReads:
    """A batch is read by several threads; what comes out must not show it."""

    @pytest.fixture(autouse=True)
    def share_small_pages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(file, "LEAST_SHARED_PAGE_BYTES", pages.PAGE_BYTES)

    @pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 64])
    def test_order_is_kept(self, open_backend: Open, root: Path, count: int) -> None:
        backend = open_backend("file", {"file_storage_path": str(root)})
        _write(backend, count)
        targets = pages.empty(count)
        assert pages.store(backend).read_blocking(pages.keys(count), targets) == BatchResult(count)
        assert targets == [pages.content(number) for number in range(1, count + 1)]

    @pytest.mark.parametrize("torn", [(0, 1), (0, 31, 32), (5, 40, 63), tuple(range(64))])
    def test_fm10_all_torn_pages_of_a_batch_go_at_once(
        self, open_backend: Open, root: Path, torn: tuple[int, ...]
    ) -> None:
        backend = open_backend("file", {"file_storage_path": str(root)})
        _write(backend, 64)
        found = pages.page_files(root)
        for number in torn:
            os.truncate(found[number], 100)
        assert _read(backend, 64) == BatchResult(torn[0], len(torn), "corrupt: wrong size")
        assert pages.page_files(root) == [path for number, path in enumerate(found) if number not in torn]

    @pytest.mark.parametrize("gap", [0, 1, 31, 32, 33, 63])
    def test_pages_behind_a_gap_do_not_count(self, open_backend: Open, root: Path, gap: int) -> None:
        backend = open_backend("file", {"file_storage_path": str(root)})
        _write(backend, 64)
        pages.page_files(root)[gap].unlink()
        assert _read(backend, 64) == BatchResult(gap, reason="miss")

    def test_call_ends_only_when_every_reader_is_done(
        self, open_backend: Open, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first page is a miss at once; a helper that is still reading would write into memory given back."""
        backend = open_backend("file", {"file_storage_path": str(root)})
        _write(backend, 64)
        pages.page_files(root)[0].unlink()
        order: list[str] = []
        reading, go_on, preadv = threading.Event(), threading.Event(), os.preadv

        def held(*args: Any) -> int:
            reading.set()
            assert go_on.wait(60)
            order.append("read")
            return preadv(*args)

        monkeypatch.setattr(os, "preadv", held)
        caller = threading.Thread(target=lambda: (_read(backend, 64), order.append("returned")))
        caller.start()
        assert reading.wait(60)
        go_on.set()
        caller.join()
        assert order == ["read"] * 32 + ["returned"]


class TestWhatIsNoPage:
    """Something else has the name of a page: a miss that neither waits nor follows, and makes room where it can."""

    @pytest.mark.parametrize("kind", ["link", "pipe", "socket", "folder", "sparse"])
    def test_it_is_a_miss(self, open_backend: Open, root: Path, tmp_path: Path, kind: str) -> None:
        backend = open_backend("file", {"file_storage_path": str(root)})
        assert _write(backend, 1).pages == 1
        [page] = root.rglob("*.page")
        elsewhere = tmp_path / "elsewhere"
        page.rename(elsewhere)
        if kind == "link":
            page.symlink_to(elsewhere)
        elif kind == "pipe":
            os.mkfifo(page)
        elif kind == "socket":
            os.mknod(page, stat.S_IFSOCK | 0o600)
        elif kind == "folder":
            page.mkdir()
        else:
            with page.open("wb") as file_:
                file_.truncate(1 << 40)
        assert _read(backend, 1).pages == 0
        assert elsewhere.exists()
        if kind != "folder":
            assert not os.path.lexists(page)
            assert _write(backend, 1).pages == 1
            assert _read(backend, 1).pages == 1

    def test_clear_neither_waits_nor_follows(self, open_backend: Open, root: Path, tmp_path: Path) -> None:
        backend = open_backend("file", {"file_storage_path": str(root)})
        assert _write(backend, 3).pages == 3
        first, second, _ = sorted(root.rglob("*.page"))
        elsewhere = tmp_path / "elsewhere"
        first.rename(elsewhere)
        first.symlink_to(elsewhere)
        second.unlink()
        os.mkfifo(second)
        assert backend.clear_blocking(second.parents[1].name) == 1
        assert elsewhere.exists()


def test_a_folder_that_others_could_swap_is_refused(open_backend: Open, tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    (open_to_all / "mine").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(open_to_all / "mine")
    open_to_all.chmod(0o777)
    for path in (open_to_all / "mine", open_to_all / "mine" / "deep" / "er", tmp_path / "link"):
        with pytest.raises(StorageError, match="everybody can write"):
            open_backend("file", {"file_storage_path": str(path)})
    open_to_all.chmod(0o1777)
    open_backend("file", {"file_storage_path": str(open_to_all / "mine")})
