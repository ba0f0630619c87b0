"""`python -m sglang_hicache.store du` and `verify`: what they say of a folder, and what happens to it meanwhile."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache import store
from sglang_hicache.storage import file_survey
from sglang_hicache.storage.page_format import HEADER_BYTES
from tests.storage import pages
from tests.storage.conftest import Open
from tests.storage.store_folder import OTHER, SEED, hostile, run, write


def du(root: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run(root, "du", "--json", *flags) == 0
    return json.loads(capsys.readouterr().out)


class TestDu:
    def test_pages_are_counted_by_namespace_and_tenant(
        self, backend: Any, root: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(backend, 3)
        write(backend, 2, first=100, tenant=SEED)
        write(backend, 4, namespace=OTHER)
        for number, path in enumerate(sorted((root / OTHER).glob("*/*"))):
            os.utime(path, (1_000_000 + number, 1_000_000 + number))
        found = du(root, capsys)
        size = HEADER_BYTES + pages.PAGE_BYTES
        none, tenant = "00" * 12, SEED[:12].hex()
        assert {
            (space, whose): (tally["files"], tally["bytes"])
            for space, tenants in found["pages"].items()
            for whose, tally in tenants.items()
        } == {
            (pages.NAMESPACE, none): (3, 3 * size),
            (pages.NAMESPACE, tenant): (2, 2 * size),
            (OTHER, none): (4, 4 * size),
        }
        used = found["pages"][OTHER][none]
        assert (used["oldest_use"], used["newest_use"]) == (1_000_000, 1_000_003)
        assert list(du(root, capsys, "--namespace", OTHER)["pages"]) == [OTHER]
        assert list(du(root, capsys, "--extra-key", "customer-7")["pages"]) == []
        assert run(root, "du") == 0
        text = capsys.readouterr().out
        assert "open in 1 storage process" in text and tenant in text and "1970-01-12 13:46" in text
        assert text.splitlines()[-1].split() == ["all", "9", "38.2", "KiB"]

    def test_what_is_no_page_of_ours_is_told_apart(
        self, backend: Any, root: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(backend, 6)
        strange = hostile(root)
        files = [path for path in pages.page_files(root) if path not in strange]
        os.truncate(files[0], 100)
        with files[1].open("r+b") as file:
            file.seek(8)
            file.write((99).to_bytes(2, "little"))
        (root / "tmp" / "0-dead").mkdir()
        (root / "tmp" / "0-dead" / "7").write_bytes(b"half a page")
        (root / "quarantine").mkdir(exist_ok=True)
        (root / "quarantine" / "1-bad").write_bytes(b"bad page")
        found = du(root, capsys)
        assert found["pages"][pages.NAMESPACE]["00" * 12]["files"] == 4
        assert [found[what]["files"] for what in ("torn", "other_formats", "temporary", "quarantine")] == [1, 1, 1, 1]
        assert found["foreign"] == len(strange)
        assert run(root, "du") == 0
        assert "not ours: " in capsys.readouterr().out

    def test_pages_of_another_format_are_not_called_bad(self, backend: Any, root: Path) -> None:
        """A server of another version reads them, and none of this one ever will."""
        write(backend, 2)
        for path in pages.page_files(root):
            with path.open("r+b") as file:
                file.seek(8)
                file.write((1).to_bytes(2, "little"))
        assert run(root, "verify") == 0


class TestVerify:
    def test_a_whole_store_is_good(self, backend: Any, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write(backend, 5, tenant=SEED)
        assert run(root, "verify") == 0
        assert capsys.readouterr().out.startswith("5 pages, 21.2 KiB, 0 bad; ")

    def test_every_kind_of_damage_is_named_and_can_be_set_aside(
        self, backend: Any, root: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(backend, 8)
        files = pages.page_files(root)
        files[0].write_bytes(files[7].read_bytes())
        os.truncate(files[1], HEADER_BYTES + 100)
        os.truncate(files[2], 7)
        content = bytearray(files[3].read_bytes())
        content[-1] ^= 1
        files[3].write_bytes(content)
        files[4].write_bytes(bytes(len(content)))
        wrong = {
            files[0]: "header of another page",
            files[1]: "356 bytes long, and its header says 4352",
            files[2]: "torn: shorter than a header",
            files[3]: "checksum",
            files[4]: "no header of ours",
        }
        assert run(root, "verify") == 1
        out = capsys.readouterr().out
        for path, what in wrong.items():
            assert f"bad: {path}: {what}\n" in out
        assert "8 pages, " in out and ", 5 bad; " in out

        assert run(root, "verify", "--set-aside") == 1
        assert "5 set aside" in capsys.readouterr().out
        assert len(list((root / "quarantine").iterdir())) == 5
        assert pages.page_files(root) == files[5:]
        assert run(root, "verify") == 0
        assert "1 whole pages lack the page before them" in capsys.readouterr().out

    def test_what_a_reader_would_stumble_over_is_told_and_left_alone(
        self, backend: Any, root: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(backend, 1)
        strange = hostile(root)
        before = {path: path.lstat() for path in strange}
        assert run(root, "verify") == 1
        out = capsys.readouterr().out
        assert out.count("no regular file, but in the way of a page") == 4
        assert out.count("no header of ours") == 1
        assert {path: path.lstat() for path in strange} == before

    def test_a_long_list_is_cut_and_counted(
        self, backend: Any, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(backend, 9)
        for path in pages.page_files(root):
            os.truncate(path, 5)
        monkeypatch.setattr(store, "_MOST_LISTED", 4)
        assert run(root, "verify") == 1
        out = capsys.readouterr().out
        assert out.count("bad: ") == 4 and "and 5 more" in out and ", 9 bad; " in out

    def test_a_page_that_goes_or_cannot_be_read_meanwhile(
        self, backend: Any, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(backend, 3)
        gone, sick, _ = pages.page_files(root)
        real_open = os.open

        def open_late(path: Any, *args: Any, **kwargs: Any) -> int:
            if path == str(gone):
                gone.unlink()
            if path == str(sick):
                raise OSError(5, "Input/output error", path)
            return real_open(path, *args, **kwargs)

        monkeypatch.setattr(os, "open", open_late)
        assert run(root, "verify", "--set-aside") == 1
        out = capsys.readouterr().out
        assert f"bad: {sick}: cannot be read: Input/output error" in out
        assert "2 pages, " in out and "0 set aside" in out and sick.exists()

    def test_a_page_that_comes_again_is_no_stranger(
        self, backend: Any, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """1. A folder is listed. 2. A page in it is evicted. 3. The walk finds it gone. 4. It is written again."""
        write(backend, 3)
        for command in ("verify", "du"):
            page_file = file_survey.page_file
            monkeypatch.setattr(file_survey, "page_file", lambda folder, entry: None)
            assert run(root, command) == 0
            monkeypatch.setattr(file_survey, "page_file", page_file)
            out = capsys.readouterr().out
            assert "not ours" not in out and "bad: " not in out

    def test_beside_a_writer_no_page_is_ever_bad(self, backend: Any, root: Path, open_backend: Open) -> None:
        """Pages come by rename and go by unlink, at any moment of the walk."""
        other = open_backend("file", {"file_storage_path": str(root)}, rank=1)
        done, rounds = threading.Event(), 0
        names = [pages.layout().name(key) for key in pages.keys(40)]

        def come_and_go() -> None:
            while not done.is_set():
                write(other, 40)
                other.delete_blocking(names[::-1])

        writer = threading.Thread(target=come_and_go)
        writer.start()
        try:
            while rounds < 10:
                assert run(root, "verify") == 0
                assert run(root, "du") == 0
                rounds += 1
        finally:
            done.set()
            writer.join()


def test_help_has_examples_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--help"], ["purge", "--help"]):
        with pytest.raises(SystemExit) as caught:
            store.main(flags)
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert "examples:" in text and "exit codes:" in text


def test_a_salt_is_asked_for_on_a_terminal_and_never_echoed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(store.getpass, "getpass", lambda prompt: "pepper")
    args = store._parser().parse_args(["du", "--extra-key", "customer-7", "--cache-salt-file", "-"])
    assert store._tenant(args) == SEED[:12]
