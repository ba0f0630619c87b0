"""A dry run: what it finds out and says, and that nobody could tell afterwards that there was one."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sglang_hicache import wire
from sglang_hicache.observe import learn_secrets
from sglang_hicache.storage import registry
from sglang_hicache.storage.backend import OpenContext, StorageBackend
from sglang_hicache.storage.file_evictor import Evictor
from sglang_hicache.storage.file_folder import TemporaryFolder, sweep
from sglang_hicache.storage.settings import FileSettings
from sglang_hicache.workers.dry_run import BATCH_PAGES, NAMESPACE, SAMPLES, DryRun
from tests.storage import pages
from tests.storage.conftest import Open
from tests.storage.store_folder import write

STEPS = ["connect", "write", "exists", "read", "compare", "delete"]


def order(backend: str, config: dict[str, Any], rank: int = 0, page_bytes: int = pages.PAGE_BYTES) -> wire.OpenBackend:
    return wire.OpenBackend(
        rank=rank, epoch=1, backend=backend, extra_config_json=msgspec.json.encode(config).decode(),
        namespace=pages.NAMESPACE, head_start=0, head_end=2, writes=True, page_bytes=page_bytes, host_pages=0,
        is_dry_run=True,
    )  # fmt: skip


def dry_run(backend: str, config: dict[str, Any], **changes: Any) -> wire.DryRunReport:
    return DryRun(order(backend, config, **changes), lambda report: None).run_blocking()


def faulty(call: str, kind: str, inner: str = "memory", config: dict[str, Any] | None = None, **fault: Any) -> Any:
    return {"inner": inner, "inner_config": config or {}, "faults": {call: {"kind": kind, **fault}}}


def tree(root: Path) -> dict[str, Any]:
    """Everything below a folder, with content and times."""
    found: dict[str, Any] = {}
    for folder, folders, files in os.walk(root):
        for name in folders:
            found[os.path.join(folder, name)] = None
        for name in files:
            path = Path(folder, name)
            found[str(path)] = path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino
    return found


class TestReport:
    @pytest.mark.parametrize("backend", ["memory", "file"])
    def test_a_store_that_works(self, backend: str, root: Path) -> None:
        report = dry_run(backend, {"file_storage_path": str(root)} if backend == "file" else {})
        assert [step.name for step in report.steps] == STEPS
        assert (report.failed_step, report.code, report.reason) == ("", "", "")
        for figure in (report.lookup_s, report.write_page_s, report.read_page_s, report.write_rate, report.read_rate):
            assert figure > 0
        assert report.info.get("path", str(root)) == str(root), "not the folder in which it was tried"

    def test_each_step_is_told_before_it_begins(self) -> None:
        told: list[str] = []
        DryRun(order("memory", {}), lambda report: told.append(report.failed_step)).run_blocking()
        assert told[: len(STEPS)] == STEPS

    @pytest.mark.parametrize(
        ("call", "kind", "step", "code"),
        [
            ("open", "error", "connect", "other"),
            ("open", "exception", "connect", "other"),
            ("write", "no_space", "write", "no_space"),
            ("write", "disappear", "exists", "contract"),
            ("write", "flip", "read", "contract"),
            ("exists", "none", "exists", "contract"),
            ("exists", "stale", "delete", "contract"),
            ("read", "disappear", "read", "contract"),
            ("read", "exception", "read", "other"),
            ("delete", "error", "delete", "other"),
            ("delete", "none", "delete", "contract"),
        ],
    )
    def test_a_store_that_does_not_work(self, call: str, kind: str, step: str, code: str) -> None:
        report = dry_run("faulty", faulty(call, kind))
        assert (report.failed_step, report.code) == (step, code), report
        assert [done.name for done in report.steps] == STEPS[: STEPS.index(step)]
        assert report.reason and "; " in report.reason

    def test_a_failure_while_measuring_is_one_too(self) -> None:
        report = dry_run("faulty", faulty("write", "no_space", first=2))
        assert [done.name for done in report.steps] == STEPS
        assert (report.failed_step, report.code) == ("write", "no_space")

    def test_a_mistake_in_the_config_and_secrets_in_errors(self, root: Path) -> None:
        report = dry_run("file", {"file_storage_path": str(root), "colour": 1})
        assert (report.failed_step, report.code) == ("connect", "bad_config")
        assert "'colour'" in report.reason
        learn_secrets('{"password": "this-is-hunter2"}')
        report = dry_run("file", {"file_storage_path": "/proc/this-is-hunter2"})
        assert report.code == "not_found" and "/proc/***" in report.reason and "hunter2" not in report.reason

    def test_a_folder_that_is_not_safe(self, root: Path) -> None:
        root.mkdir()
        root.chmod(0o777)
        report = dry_run("file", {"file_storage_path": str(root)})
        assert (report.failed_step, report.code) == ("connect", "no_permission")
        assert "chmod go-w" in report.reason
        assert os.listdir(root) == []

    @pytest.mark.parametrize("where", ["/proc/pages", "/proc/a/pages", "a folder", "a page"])
    def test_ranks_that_meet_the_same_obstacle_say_the_same(
        self, where: str, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Names that are drawn by chance are in no reason: eight ranks with the same mistake are one sentence."""
        config = {"file_storage_path": where if where.startswith("/") else str(root)}
        if where == "a folder":
            root.mkdir(mode=0o700)
            (root / "tmp").touch()
        elif where == "a page":
            opened = os.open

            def refuse(path: Any, flags: int, *mode: int, **more: Any) -> int:
                if flags & os.O_EXCL and not str(path).endswith("lock"):
                    raise PermissionError(13, "Permission denied", str(path))
                return opened(path, flags, *mode, **more)

            monkeypatch.setattr(os, "open", refuse)
        reports = [dry_run("file", config, rank=rank) for rank in range(2)]
        assert reports[0].failed_step and reports[0].reason == reports[1].reason, reports
        assert config["file_storage_path"] in reports[0].reason

    def test_a_disk_without_room(self, root: Path, tmp_path: Path) -> None:
        disk = os.statvfs(tmp_path)
        config = {"file_storage_path": str(root), "min_free_space": disk.f_blocks * disk.f_frsize - 1}
        report = dry_run("file", config, page_bytes=65536)
        assert (report.failed_step, report.code) == ("write", "no_space")
        assert "stay free" in report.reason and not root.exists()

    def test_encrypted_pages(self, root: Path, tmp_path: Path) -> None:
        key = tmp_path / "key"
        config = {"file_storage_path": str(root), "encryption": {"key_file": str(key)}}
        assert dry_run("file", config).code == "bad_config"
        key.write_bytes(os.urandom(32))
        key.chmod(0o600)
        assert dry_run("file", config).failed_step == ""

    def test_a_slow_store_is_measured_with_few_pages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A page takes two seconds: five of them and a batch of 32 would outlast the patience of most."""
        written: list[int] = []
        real = registry.create

        def create(*args: Any) -> StorageBackend:
            backend = real(*args)
            write_blocking = backend.write_blocking
            monkeypatch.setattr(
                backend, "write_blocking", lambda batch: (written.append(len(batch)), write_blocking(batch))[1]
            )
            return backend

        monkeypatch.setattr(registry, "create", create)
        clock = itertools.count(0.0, 2.0)
        DryRun(order("memory", {}), lambda report: None, clock=lambda: next(clock)).run_blocking()
        assert written == [1, 1, 1]
        written.clear()
        DryRun(order("memory", {}), lambda report: None, clock=lambda: 0.0).run_blocking()
        assert written == [1] + [1] * SAMPLES + [BATCH_PAGES]


class TestTraces:
    """Of a file store that exists, and of one that does not."""

    def test_a_store_is_as_it_was_to_the_byte(self, open_backend: Open, root: Path) -> None:
        backend = open_backend("file", {"file_storage_path": str(root)})
        write(backend, 5)
        backend.close_blocking()
        (root / "notes.txt").write_text("of somebody")
        before = tree(root)
        assert dry_run("file", {"file_storage_path": str(root), "max_size": "12KiB", "ttl_s": 1}).failed_step == ""
        for call, kind in (("read", "exception"), ("write", "flip"), ("delete", "error"), ("close", "error")):
            dry_run("faulty", faulty(call, kind, "file", {"file_storage_path": str(root)}, first=1))
        assert tree(root) == before

    def test_a_store_in_use_hears_nothing_of_it(self, open_backend: Open, root: Path) -> None:
        """A dry run with a small limit would otherwise be the smallest limit of all who share the folder: it would
        take the pages of those who serve."""
        backend = open_backend("file", {"file_storage_path": str(root), "max_size": "10MiB"})
        backend._evictor.stop_blocking()  # counts on a thread of its own, and only one may count at a time
        evictor = Evictor(backend._share, 10 << 20)
        write(backend, 5)
        config = {"file_storage_path": str(root), "max_size": "12KiB"}
        _, settings = registry.validate_extra_config("file", msgspec.json.encode(config).decode())
        with registry.trial_blocking("file", settings, context()) as trial:
            trial.open_blocking()
            write(trial, 1, first=100)
            evictor.tick_blocking()
            stats = backend.stats()
            trial.close_blocking()
        evictor.tick_blocking()
        evictor.stop_blocking()
        for seen in (stats, backend.stats()):
            assert (seen["used_pages"], seen["other_namespace_pages"], seen["foreign_files"]) == (5, 0, 0)
            assert seen["max_bytes"] == 10 << 20 and seen["evicted_pages"] == 0
        assert backend.exists_blocking([pages.layout().name(key) for key in pages.keys(5)]) == 5

    @pytest.mark.parametrize("call", ["open", "write", "read", "delete"])
    def test_a_folder_that_was_not_there_is_not_there(self, root: Path, call: str) -> None:
        place = root / "deep" / "down"
        assert dry_run("file", {"file_storage_path": str(place)}).failed_step == ""
        dry_run("faulty", faulty(call, "exception", "file", {"file_storage_path": str(place)}))
        assert not root.exists()

    def test_an_empty_folder_stays_empty(self, root: Path) -> None:
        root.mkdir()
        root.chmod(0o700)
        assert dry_run("file", {"file_storage_path": str(root)}).failed_step == ""
        assert os.listdir(root) == []

    @pytest.mark.parametrize("places", [("", ""), ("deep/down", "deep/down"), ("deep/0", "deep/1"), ("a", "a/b")])
    def test_of_several_ranks_the_last_one_takes_the_folder_with_it(self, root: Path, places: tuple[str, str]) -> None:
        first, second = (
            registry.trial_blocking("file", FileSettings(file_storage_path=str(root / place)), context(rank))
            for rank, place in enumerate(places)
        )
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert root.exists()
        second.__exit__(None, None, None)
        assert not root.exists()

    def test_a_folder_that_somebody_has_begun_to_use_stays(self, open_backend: Open, root: Path) -> None:
        with registry.trial_blocking("file", FileSettings(file_storage_path=str(root)), context()):
            backend = open_backend("file", {"file_storage_path": str(root)})
            write(backend, 3)
        assert backend.exists_blocking([pages.layout().name(key) for key in pages.keys(3)]) == 3
        write(backend, 1, first=10)

    def test_what_a_killed_dry_run_leaves_is_swept(
        self, open_backend: Open, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = FileSettings(file_storage_path=str(root))
        with monkeypatch.context() as patch:
            # Of a process that is killed the kernel drops the lock, and nobody removes anything.
            patch.setattr(TemporaryFolder, "close", lambda folder: os.close(folder._lock))
            with registry.trial_blocking("file", settings, context()) as trial:
                trial.open_blocking()
                write(trial, 3)
                trial.close_blocking()
        assert len(list(root.glob("tmp/*/store/*/*/*.page"))) == 3
        sweep(root / "tmp")
        assert not list(root.glob("tmp/*/*"))
        backend = open_backend("file", {"file_storage_path": str(root)})
        write(backend, 1)
        assert dry_run("file", {"file_storage_path": str(root)}).failed_step == ""

    def test_its_pages_are_nobodys(self) -> None:
        assert NAMESPACE != pages.NAMESPACE and len(NAMESPACE) == 64
        backend = pages.backend("memory", {})
        run = DryRun(order("memory", {}), lambda report: None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(registry, "create", lambda *args: backend)
            patch.setattr(backend, "close_blocking", lambda: None)
            assert run.run_blocking().failed_step == ""
        assert backend.stats()["used_pages"] == 0


def context(rank: int = 0) -> OpenContext:
    return OpenContext(rank=rank, namespace=NAMESPACE, page_bytes=pages.PAGE_BYTES)
