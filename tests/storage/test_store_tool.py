"""`python -m sglang_hicache.store`: what it says of a folder, what it deletes, and what it never touches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache import store
from sglang_hicache.cache.page import namespace_seed
from sglang_hicache.storage import file_survey
from sglang_hicache.storage.checked import CheckedStore
from sglang_hicache.storage.page_format import HEADER_BYTES
from tests.house.source import ROOT
from tests.storage import pages
from tests.storage.conftest import Open

OTHER = "77" * 32
SEED = namespace_seed("customer-7", "pepper")


@pytest.fixture
def backend(open_backend: Open, root: Path) -> Any:
    """An open file store, as a server has it."""
    return open_backend("file", {"file_storage_path": str(root)})


def write(backend: Any, count: int, first: int = 1, tenant: bytes = b"", **layout: Any) -> None:
    """A chain of pages from the root."""
    contents = [pages.content(first + index) for index in range(count)]
    chain = CheckedStore(backend, pages.layout(**layout))
    assert chain.write_blocking(pages.keys(count, first), contents, b"", 0, tenant).pages == count


def run(root: Path, command: str, *flags: str) -> int:
    return store.main([command, "--path", str(root), *flags])


def du(root: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run(root, "du", "--json", *flags) == 0
    return json.loads(capsys.readouterr().out)


def hostile(root: Path) -> list[Path]:
    """What may lie in a folder that is not ours alone; none of it is ours, some has a page's name."""
    shelf = root / pages.NAMESPACE / "00"
    names = [pages.key(number).hex() for number in range(900, 906)]
    made = [
        root / "notes.txt",
        root / ("x" * 255),
        root / "tmp-of-somebody",
        root / pages.NAMESPACE / "readme",
        shelf / "photo.page",
        shelf / f"{names[0]}.0-2.page",
        shelf / f"{'ff' * 32}.0-2.page",
        shelf / f"{names[0]}.0-2.page.bak",
        shelf / ("y" * 255),
    ]
    for path in made:
        path.write_text("somebody else's bytes")
    links = [shelf / f"{names[1]}.0-2.page", root / ("ab" * 32), root / pages.NAMESPACE / "cd"]
    links[0].symlink_to(pages.page_files(root)[0])
    for link in links[1:]:
        link.symlink_to(root.parent / "elsewhere")
    pipe, folder = shelf / f"{names[2]}.0-2.page", shelf / f"{names[3]}.0-2.page"
    os.mkfifo(pipe)
    folder.mkdir()
    end = shelf / f"{names[4]}.0-2.page"
    os.mknod(end, 0o600 | 0o140000)
    return [*made, *links, pipe, folder, end]


@pytest.fixture
def elsewhere(tmp_path: Path, backend: Any, open_backend: Open) -> Path:
    """A store of somebody else, to which links lead."""
    other = tmp_path / "elsewhere"
    write(open_backend("file", {"file_storage_path": str(other)}), 3)
    return other


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
        os.truncate(torn, 3)
        content = bytearray(bad.read_bytes())
        content[-1] ^= 1
        bad.write_bytes(content)
        assert run(root, "verify", "--set-aside") == 1
        torn.write_bytes(b"")
        with other_format.open("r+b") as file:
            file.seek(8)
            file.write((1).to_bytes(2, "little"))
        assert run(root, "purge", "--yes", "--namespace", pages.NAMESPACE) == 0
        assert {path.parts[-3] for path in pages.page_files(root)} == {OTHER}
        assert len(pages.page_files(root)) == 4
        assert list((root / "quarantine").iterdir()) == []

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
        dead = root / "tmp" / "0-dead"
        dead.mkdir()
        (dead / "lock").touch()
        (dead / "3").write_bytes(b"half a page")
        assert file_survey.users_blocking(root) == 1
        assert run(root, "purge", "--all", "--yes") == 0
        assert list((root / "tmp").iterdir()) == [living]
        write(backend, 1)

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
