"""`python -m sglang_hicache.store purge`: it deletes what was said and never anything else."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache.cache.page import namespace_seed
from sglang_hicache.storage import file_survey
from sglang_hicache.storage.page_format import HEADER_BYTES
from tests.house.source import ROOT
from tests.storage import pages
from tests.storage.store_folder import OTHER, SEED, hostile, run, write


class TestPurge:
    def test_it_takes_what_was_said_and_nothing_else(
        self, backend: Any, root: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(backend, 3)
        write(backend, 2, first=100, tenant=SEED)
        write(backend, 4, namespace=OTHER, tenant=SEED)
        strange = hostile(root)
        assert run(root, "purge", "--tenant", SEED[:12].hex(), "--namespace", pages.NAMESPACE[:8], "--yes") == 0
        assert "2 files deleted" in capsys.readouterr().out
        assert run(root, "purge", "--tenant", "none", "--yes") == 0
        assert [path.parts[-3] for path in pages.page_files(root) if path not in strange] == [OTHER] * 4
        assert run(root, "purge", "--namespace", OTHER, "--yes") == 0
        assert run(root, "purge", "--all", "--yes") == 0
        assert "nothing to delete" in capsys.readouterr().out
        assert all(os.path.lexists(path) for path in strange)
        assert len(pages.page_files(elsewhere)) == 3

    def test_a_tenant_is_found_by_its_texts(
        self, backend: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(backend, 2, first=100, tenant=SEED)
        write(backend, 2, first=200, tenant=namespace_seed(None, "pepper"))
        write(backend, 2, first=300, tenant=namespace_seed("customer-7", None))
        salt = tmp_path / "salt"
        salt.write_text("pepper\n")
        for flags in (("--extra-key", "customer-7", "--cache-salt-file", str(salt)), ("--extra-key", "customer-7")):
            before = len(pages.page_files(root))
            assert run(root, "purge", "--yes", *flags) == 0
            assert len(pages.page_files(root)) == before - 2
        command = [sys.executable, "-m", "sglang_hicache.store", "purge", "--path", str(root), "--yes"]
        done = subprocess.run(
            [*command, "--cache-salt-file", "-"], cwd=ROOT, input="pepper", text=True, capture_output=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert pages.page_files(root) == []

    def test_children_go_before_their_parents(
        self, backend: Any, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Interrupted after every single page: what is left can be reached from the root."""
        write(backend, 12)
        write(backend, 7, first=500, tenant=SEED)
        unlink, left = os.unlink, 18

        def interrupted(path: Any, **kwargs: Any) -> None:
            if str(path).endswith(".page"):
                if not allowed:
                    raise KeyboardInterrupt
                allowed.pop()
            unlink(path, **kwargs)

        monkeypatch.setattr(os, "unlink", interrupted)
        while left:
            allowed = [True]
            assert run(root, "purge", "--all", "--yes") == 130
            assert len(pages.page_files(root)) == left
            assert run(root, "verify") == 0
            assert "lack the page before" not in capsys.readouterr().out
            left -= 1

    def test_torn_pages_other_formats_and_what_was_set_aside_go_with_their_namespace(
        self, backend: Any, root: Path
    ) -> None:
        write(backend, 4, tenant=SEED)
        write(backend, 4, namespace=OTHER)
        torn, other_format, bad, _ = sorted((root / pages.NAMESPACE).glob("*/*"))
        for path in (bad, next((root / OTHER).glob("*/*"))):
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        assert run(root, "verify", "--set-aside") == 1
        os.truncate(torn, 3)
        with other_format.open("r+b") as file:
            file.seek(8)
            file.write((1).to_bytes(2, "little"))
        assert run(root, "purge", "--yes", "--namespace", pages.NAMESPACE) == 0
        assert [path.parts[-3] for path in pages.page_files(root)] == [OTHER] * 3
        assert len(list((root / "quarantine").iterdir())) == 1, "the bad page of the other model stays"

    def test_what_was_set_aside_of_a_tenant_goes_too(self, backend: Any, root: Path) -> None:
        write(backend, 2, tenant=SEED)
        for path in pages.page_files(root):
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        assert run(root, "verify", "--set-aside") == 1
        assert run(root, "purge", "--yes", "--tenant", SEED[:12].hex()) == 0
        assert [path for path in root.rglob("*") if path.is_file() and path.stat().st_size > HEADER_BYTES] == []

    def test_what_the_dead_left_goes_and_what_the_living_write_stays(self, backend: Any, root: Path) -> None:
        write(backend, 1)
        (living,) = (root / "tmp").iterdir()
        made = root.parent / "dead"
        made.mkdir()
        (made / "lock").touch()
        (made / "3").write_bytes(b"half a page")
        made.rename(root / "tmp" / "0-000000000000dead")  # whole from the start: the living one sweeps at any moment
        assert run(root, "purge", "--all", "--yes") == 0
        pages.wait_until(lambda: list((root / "tmp").iterdir()) == [living], "it goes, whoever sweeps first")
        write(backend, 1)

    def test_only_who_holds_a_lock_has_the_store_open(self, root: Path) -> None:
        """Without an open store: its evictor takes the lock of the dead, too, for as long as it sweeps."""
        for name in ("living", "dead"):
            (root / "tmp" / name).mkdir(parents=True)
            (root / "tmp" / name / "lock").touch()
        assert file_survey.users_blocking(root) == 0
        with (root / "tmp" / "living" / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert file_survey.users_blocking(root) == 1

    def test_a_page_that_cannot_be_deleted_is_named_and_the_rest_goes(
        self, backend: Any, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(backend, 3)
        gone, held, _ = pages.page_files(root)
        unlink = os.unlink

        def stubborn(path: Any, **kwargs: Any) -> None:
            if str(path) == str(held):
                raise OSError(1, "Operation not permitted", str(path))
            if str(path) == str(gone):
                unlink(path)
            unlink(path, **kwargs)

        monkeypatch.setattr(os, "unlink", stubborn)
        assert run(root, "purge", "--all", "--yes") == 1
        said = capsys.readouterr()
        assert f"cannot delete {held}: Operation not permitted" in said.err and "2 files deleted" in said.out
        assert pages.page_files(root) == [held]

    @pytest.mark.parametrize(("answer", "deleted"), [("yes", True), ("y", False), ("", False), ("no", False)])
    def test_it_asks_first(
        self, backend: Any, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        answer: str, deleted: bool,
    ) -> None:  # fmt: skip
        write(backend, 2)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", lambda question: answer)
        assert run(root, "purge", "--all") == (0 if deleted else 2)
        assert len(pages.page_files(root)) == (0 if deleted else 2)
        assert "2 files, 8.5 KiB" in capsys.readouterr().out


class TestRefusals:
    @pytest.mark.parametrize(
        ("flags", "why"),
        [
            ((), "say what to purge"),
            (("--all", "--tenant", "none"), "say what to purge"),
            (("--all",), "give --yes"),
            (("--tenant", "12"), "24 hex digits"),
            (("--tenant", "xyz"), "24 hex digits"),
            (("--tenant", "none", "--extra-key", "a"), "--tenant says it all"),
            (("--namespace", "5a5a5a5"), "at least 8 hex digits"),
            (("--namespace", "123456789"), "of 0 namespaces"),
            (("--namespace", "5a5a5a5a"), "of 2 namespaces"),
            (("--extra-key", "a", "--cache-salt-file", "/no/such/file"), "No such file"),
        ],
    )
    def test_a_mistake_changes_nothing(
        self, backend: Any, root: Path, flags: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        write(backend, 2)
        write(backend, 1, namespace="5a" * 31 + "00")
        monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
        assert run(root, "purge", *flags) == 2
        assert why in capsys.readouterr().err
        assert len(pages.page_files(root)) == 3

    @pytest.mark.parametrize("command", ["du", "verify", "purge"])
    def test_a_folder_that_is_no_store_is_not_looked_into(
        self, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        photos = tmp_path / "photos"
        photos.mkdir()
        (photos / "a.page").write_text("x")
        file = tmp_path / "file"
        file.write_text("x")
        for path in (photos, file, tmp_path / "nothing"):
            assert run(path, command, *(["--all", "--yes"] if command == "purge" else [])) == 2
            assert f"{path} is no file store" in capsys.readouterr().err

    def test_a_folder_that_others_can_write_is_refused(
        self, backend: Any, root: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Somebody could put a link in a folder's place between the look and the deletion."""
        root.chmod(0o777)
        assert run(root, "purge", "--all", "--yes") == 2
        assert "can be written by others" in capsys.readouterr().err
        root.chmod(0o700)
