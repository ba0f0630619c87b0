"""A folder that was somebody else's before it became a store, or that somebody prepared: nothing of theirs goes, and
nothing of theirs is believed."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from sglang_hicache import wire
from sglang_hicache.errors import StorageError
from sglang_hicache.storage.backend import StorageBackend
from sglang_hicache.storage.checked import Shared
from sglang_hicache.storage.file_quarantine import MOST_FILES
from sglang_hicache.workers.storage_process import OpenStore
from tests.storage import pages
from tests.storage.conftest import Open
from tests.storage.store_folder import run, write


def _folder(path: Path, mode: int = 0o700) -> Path:
    path.mkdir(parents=True)
    path.chmod(mode)
    return path


def test_a_folder_with_a_lock_file_in_tmp_is_not_ours(open_backend: Open, root: Path) -> None:
    """`~/tmp/project/lock` exists on many machines, and a store may be attached over HTTP."""
    project = _folder(root / "tmp" / "project")
    (project / "lock").touch()
    (project / "thesis.txt").write_text("years of work")
    open_backend("file", {"file_storage_path": str(root)})
    assert run(root, "purge", "--namespace", "00" * 4) == 2
    assert (project / "thesis.txt").read_text() == "years of work"


def test_files_of_others_in_quarantine_stay_and_do_not_count(open_backend: Open, root: Path) -> None:
    """A mail filter keeps such a folder, too."""
    theirs = [root / "quarantine" / f"mail-{number}" for number in range(MOST_FILES + 9)]
    _folder(root / "quarantine")
    for path in theirs:
        path.write_bytes(bytes(1000))
    (root / "quarantine" / "folder").mkdir()
    backend = open_backend("file", {"file_storage_path": str(root), "max_size": "1M"})
    write(backend, 3)
    for path in pages.page_files(root):
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        assert backend.set_aside_blocking(pages.layout().name(bytes.fromhex(path.name[:64])))
    assert all(path.exists() for path in theirs)
    # At most 1 % of the store is kept for whoever looks into the damage: two pages of 4 KiB.
    assert len([path for path in (root / "quarantine").iterdir() if path.suffix == ".page"]) == 2


@pytest.mark.parametrize("name", ["tmp", "quarantine", pages.NAMESPACE, "ab" * 32])
def test_a_folder_inside_that_others_can_write_is_refused(open_backend: Open, root: Path, name: str) -> None:
    """Made while everybody could write the root: `chmod go-w` on the root alone does not make its pages ours."""
    _folder(root)
    _folder(root / name, 0o777)
    with pytest.raises(StorageError, match=f"{name} can be written by others .*chmod -R go-w"):
        open_backend("file", {"file_storage_path": str(root)})
    assert run(root, "verify") == 2


@pytest.mark.parametrize("name", ["tmp", "quarantine"])
def test_a_link_in_the_place_of_an_own_folder_is_refused(
    open_backend: Open, root: Path, name: str, tmp_path: Path
) -> None:
    _folder(root)
    (root / name).symlink_to(_folder(tmp_path / "theirs"))
    with pytest.raises(StorageError, match=f"{name} is no folder"):
        open_backend("file", {"file_storage_path": str(root)})


@pytest.mark.parametrize("name", ["usage.json", "evictor.lock"])
def test_what_is_no_file_in_the_place_of_an_own_file_is_refused(open_backend: Open, root: Path, name: str) -> None:
    """A pipe would hold both lanes for ever."""
    _folder(root)
    os.mkfifo(root / name, 0o600)
    with pytest.raises(StorageError, match=f"{name} is no regular file"):
        open_backend("file", {"file_storage_path": str(root)})


def test_a_pipe_in_the_place_of_a_lock_holds_nobody(
    open_backend: Open, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = open_backend("file", {"file_storage_path": str(root)})
    write(backend, 1)
    pipe, link = _folder(root.parent / "7-00000000000000aa"), _folder(root.parent / "7-00000000000000bb")
    os.mkfifo(pipe / "lock", 0o600)
    (link / "lock").symlink_to("/dev/zero")
    for made in (pipe, link):
        made.rename(root / "tmp" / made.name)  # whole from the start: the backend sweeps at any moment
    assert run(root, "du") == 0
    assert "open in 1 storage process" in capsys.readouterr().out
    open_backend("file", {"file_storage_path": str(root)})


def test_a_page_that_another_user_owns_is_not_there(
    backend: StorageBackend, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted while everybody could write there.  It is a miss, and gives way to ours."""
    write(backend, 2)
    planted, real = pages.page_files(root)[1], os.stat
    theirs = [planted.stat().st_ino]

    def owned(path: str, **options: bool) -> os.stat_result:
        found = real(path, **options)
        if found.st_ino not in theirs:
            return found
        return os.stat_result([*found[:4], found.st_uid + 1, *found[5:]])

    monkeypatch.setattr(os, "stat", owned)
    store = pages.store(backend)
    assert store.lookup_blocking(pages.keys(2)) == 1
    write(backend, 2)
    assert stat.S_ISREG(real(planted).st_mode) and real(planted).st_ino not in theirs
    assert store.lookup_blocking(pages.keys(2)) == 2


def test_a_disk_without_end_is_a_disk(open_backend: Open, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As file systems over object stores say of themselves: more bytes than 64 bits count."""

    def claimed(path: object) -> SimpleNamespace:
        return SimpleNamespace(f_blocks=1 << 56, f_bavail=1 << 56, f_frsize=4096)

    monkeypatch.setattr(os, "statvfs", claimed)
    backend = open_backend("file", {"file_storage_path": str(root)})
    pages.wait_until(lambda: backend.stats()["max_bytes"] > 0, "the limit is known")
    write(backend, 2)
    stats = OpenStore(backend, Shared()).stats()
    told = wire.BackendStats(epoch=1, stats=stats)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=wire.FromStorage) == told
