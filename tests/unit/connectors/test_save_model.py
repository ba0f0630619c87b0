"""`python -m sglang_hicache.save_model`: what it prints, how it ends, and what it leaves when it is interrupted."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_hicache import save_model
from sglang_hicache.connectors import progress
from sglang_hicache.connectors.create import create_remote_connector
from sglang_hicache.connectors.file import FileConnector
from sglang_hicache.connectors.manifest import Manifest, ModelFile, encode_manifest
from sglang_hicache.connectors.progress import Progress
from sglang_hicache.connectors.upload_source import FolderSource
from tests.storage.pages import wait_until
from tests.unit.connectors.conftest import CHUNK_BYTES, PASSWORD, SAVED, Places, write_model


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_model, "FolderSource", lambda directory: FolderSource(directory, CHUNK_BYTES))


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = save_model.main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_saved_listed_and_verified(
    kind: str, places: Places, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORD", PASSWORD)
    url = places.new(kind).replace("p%40ss%2Fw%23rd", "${env.WORD}")
    code, _, err = run(capsys, str(model), url)
    assert code == 0 and f"saved {len(SAVED)} files to" in err and "(100 %)" in err and "MB/s" in err
    assert "left out, as no server reads them: pytorch_model.bin" in err and "warning" not in err
    code, out, err = run(capsys, "--list", url)
    assert code == 0 and [line.split(maxsplit=2)[2] for line in out.splitlines()] == SAVED
    assert run(capsys, "--verify", url)[0] == 0
    code, _, err = run(capsys, str(model), url)
    assert code == 0 and "has this model already" in err


def test_a_password_that_others_see_is_warned_of_and_not_printed(
    places: Places, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, str(model), places.new("redis"))
    assert code == 0 and "warning: other users of this machine can see that password" in err
    assert "p%40ss" not in out + err and PASSWORD not in out + err


def test_from_store_to_store_and_back_to_a_folder(
    places: Places, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, plain = places.new("redis"), places.new("s3"), places.new("s3")
    assert run(capsys, str(model), one)[0] == 0
    assert run(capsys, one, two)[0] == 0
    with create_remote_connector(two) as place:
        folder = Path(place.pull_files(str(tmp_path / "back"), ignore=()))
    assert all((folder / name).read_bytes() == (model / name).read_bytes() for name in SAVED)
    with create_remote_connector(plain) as place:
        for name in SAVED:
            place.write_blocking(name, (model / name).read_bytes())
    assert run(capsys, plain, places.new("file"))[0] == 0
    assert run(capsys, f"file://{model}", places.new("file"))[0] == 0


def test_overwrite(places: Places, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = places.new("file")
    write_model(tmp_path / "new", seed=2)
    assert run(capsys, str(model), url)[0] == 0
    code, _, err = run(capsys, str(tmp_path / "new"), url)
    assert code == 2 and "--overwrite replaces it" in err
    code, _, err = run(capsys, str(tmp_path / "new"), url, "--force")
    assert code == 0 and "chunks of earlier uploads removed" in err


def test_interrupted_and_run_again(
    places: Places, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = places.new("file")
    real, left = FileConnector.write_blocking, [4]

    def write(self: FileConnector, key: str, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(FileConnector, "write_blocking", write)
        code, _, err = run(capsys, str(model), url)
    assert code == 130 and "nothing half is served" in err
    code, _, err = run(capsys, "--verify", url)
    assert code == 1 and "no model that was saved to its end" in err
    code, _, err = run(capsys, str(model), url)
    assert code == 0 and "were there" in err
    assert run(capsys, "--verify", url)[0] == 0


def test_what_went_wrong_has_a_line_of_its_own(places: Places, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the cursor stands behind the progress."""

    real = FileConnector.write_blocking

    def write(self: FileConnector, key: str, data: bytes) -> None:
        if "tokenizer" in key:  # the last file
            raise KeyboardInterrupt
        real(self, key, data)

    monkeypatch.setattr(FileConnector, "write_blocking", write)
    monkeypatch.setattr(progress, "_OFTEN_S", 0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert save_model.main([str(model), places.new("file")]) == 130
    assert terminal.getvalue().splitlines()[-1].startswith("interrupted:")


def test_verify_names_all_that_is_damaged(places: Places, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = places.new("file")
    run(capsys, str(model), url)
    with create_remote_connector(url) as place:
        keys = sorted(entry.key for entry in place.entries_blocking("files/model-"))[:2]
        place.write_blocking(keys[0], b"x")
        place.delete_blocking([keys[1]])
    code, _, err = run(capsys, "--verify", url)
    assert code == 1 and all(key in err for key in keys) and "2 faults" in err


def test_a_damaged_chunk_is_repaired(
    kind: str, places: Places, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has the right name and the right size: only who reads it can know."""
    url = places.new(kind)
    run(capsys, str(model), url)
    with create_remote_connector(url) as place:
        key = next(entry.key for entry in place.entries_blocking("files/model-1.safetensors/"))
        place.write_blocking(key, bytes(len(place.read_blocking(key))))
    assert run(capsys, "--verify", url)[0] == 1
    assert run(capsys, str(model), url, "--overwrite")[0] == 0
    assert run(capsys, "--verify", url)[0] == 0


@pytest.mark.parametrize("manifest", [b"no manifest", b'{"format":"sglang-hicache model","version":9}'])
def test_a_list_that_is_damaged_is_replaced_by_who_says_so(
    manifest: bytes, kind: str, places: Places, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1. The list of a saved model is spoiled. 2. What is said of it must help."""
    url = places.new(kind)
    run(capsys, str(model), url)
    with create_remote_connector(url) as place:
        place.write_blocking("hicache-model.json", manifest)
        # A busy server may show for a moment what was there before.
        wait_until(lambda: place.read_blocking("hicache-model.json") == manifest, "the list is not spoiled")
    code, _, err = run(capsys, str(model), url)
    assert code == 1 and "with --overwrite replaces it" in err
    assert run(capsys, str(model), url, "--overwrite")[0] == 0
    assert run(capsys, "--verify", url)[0] == 0


def test_a_bucket_that_is_not_there_is_named_by_every_command(
    places: Places, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"s3://no-such-bucket/m?endpoint=http://127.0.0.1:{places.rclone.port}"
    for argv in ((str(model), url), ("--list", url), ("--verify", url)):
        code, _, err = run(capsys, *argv)
        assert code == 1 and "no-such-bucket" in err and "bucket does not exist" in err, argv


def test_a_name_in_a_list_does_not_steer_the_terminal(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    url = places.new("file")
    file = ModelFile("a\x1b[2Jb", 0, hashlib.sha256().hexdigest(), ())
    with create_remote_connector(url) as place:
        place.write_blocking("hicache-model.json", encode_manifest(Manifest(chunk_bytes=4096, files=(file,))))
    code, out, _ = run(capsys, "--list", url)
    assert code == 0 and "\x1b" not in out and "'a\\x1b[2Jb'" in out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["/no/such/folder", "file:///tmp/x"], "neither a directory nor a hub id"),
        (["{model}"], "SRC URL"),
        (["{model}", "/a/folder"], "a folder is file:///absolute/path"),
        (["{model}", "http://host/x"], "no connector for http://"),
        (["--list", "file:///x", "file:///y"], "take one URL"),
        (["--verify", "--overwrite", "file:///x"], "take one URL"),
        (["--verify", "/a/folder"], "no URL"),
        (["{empty}", "file:///tmp/x"], "config.json"),
        (["{model}", "redis://:${env.NOT_SET_ANYWHERE}@host/m"], "NOT_SET_ANYWHERE is not set"),
    ],
)
def test_mistakes_change_nothing_and_say_what_to_do(
    argv: list[str], says: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    folders = {"{model}": str(model), "{empty}": str(tmp_path / "empty")}
    code, _, err = run(capsys, *(folders.get(text, text) for text in argv))
    assert code == 2 and says in err and err.count("error:") == 1


def test_a_store_that_cannot_be_reached_is_another_exit_code(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, str(model), "redis://127.0.0.1:1/m")
    assert code == 1 and "redis://127.0.0.1:1/m: cannot" in err and "Traceback" not in err


def test_the_module_runs() -> None:
    command = [sys.executable, "-m", "sglang_hicache.save_model", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "exit codes:" in done.stdout and "--overwrite" in done.stdout


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal_and_few_elsewhere() -> None:
    now = [0.0]
    for output, separator in ((Terminal(), "\r\x1b[K"), (io.StringIO(), "\n")):
        now[0] = 0.0
        counted = Progress(2_000_000_000, output, lambda: now[0])
        for _ in range(100):
            now[0] += 0.25
            counted.tell(10_000_000, 10_000_000)
        counted.end()
        lines = [line for line in output.getvalue().split(separator) if line.strip()]
        assert len(lines) == (101 if separator != "\n" else 2)
        assert lines[0].startswith("20.0 MB of 2.0 GB (1 %), 40.0 MB/s" if separator != "\n" else "800.0 MB of 2.0 GB")
        assert "left" in lines[0] and "were there" in lines[0]


def test_what_a_hub_leaves_behind_is_followed(model: Path, tmp_path: Path) -> None:
    """A snapshot of the hub is a folder of links."""
    links = tmp_path / "snapshot"
    links.mkdir()
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"):
        (links / name).symlink_to(model / name)
    wanted = sorted(path.name for path in links.iterdir())
    (links / "more").symlink_to(model)
    source = FolderSource(str(links))
    assert [file.name for file in source.files] == wanted and source.left_out == ["more/"]
    assert json.loads(source.read_blocking(source.files[0], 0))
