"""The key comes from a file that nobody else can read, or from the environment, and never from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.ctl.conftest import Ran
from tests.unit.ctl.fake import FakeServer, Said

Run = Callable[..., Ran]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_text("key-of-the-file\n")
    file.chmod(0o600)
    return file


@pytest.fixture(autouse=True)
def answers(server: FakeServer) -> None:
    server.says("GET", "/hicache/operations", Said({"operations": []}))


def test_the_key_of_the_environment(server: FakeServer, run: Run) -> None:
    assert run("operations", "list").code == 0
    assert server.asked[0].key == "Bearer the-admin-key"


@pytest.mark.parametrize("before", [True, False])
def test_a_key_file_wins_before_or_after_the_command(
    server: FakeServer, run: Run, key_file: Path, before: bool
) -> None:
    flag = ["--key-file", str(key_file)]
    assert run(*(flag if before else []), "operations", "list", *([] if before else flag)).code == 0
    assert server.asked[0].key == "Bearer key-of-the-file"


def test_a_key_file_of_the_environment(
    server: FakeServer, run: Run, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path is no secret, and the key is then in no process's environment."""
    monkeypatch.setenv("HICACHECTL_KEY_FILE", str(key_file))
    assert run("operations", "list").code == 0
    assert server.asked[0].key == "Bearer key-of-the-file"


@pytest.mark.parametrize("flag", ["--key", "--api-key", "--admin-key", "--admin-api-key"])
@pytest.mark.parametrize("form", ["{flag} hunter2", "{flag}=hunter2"])
def test_a_key_on_the_command_line_is_refused(server: FakeServer, run: Run, flag: str, form: str) -> None:
    ran = run(*form.format(flag=flag).split(), "operations", "list")
    assert ran.code == 2 and not server.asked
    assert "--key-file" in ran.err and "HICACHECTL_KEY" in ran.err
    assert "hunter2" not in ran.out + ran.err


def test_no_flag_is_short_for_another(server: FakeServer, run: Run, key_file: Path) -> None:
    """Else `--key-f` would work today, and `--key` mean the file to whoever saw it."""
    assert run("operations", "list", "--key-f", str(key_file)).code == 2
    assert not server.asked


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_file_that_others_can_read_is_refused(server: FakeServer, run: Run, key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    ran = run("operations", "list", "--key-file", str(key_file))
    assert ran.code == 2 and not server.asked
    assert f"{mode:04o}" in ran.err and "chmod 600" in ran.err


@pytest.mark.parametrize(
    ("content", "words"), [("", "empty"), (" \n", "empty"), ("two keys", "blanks"), ("schlüssel", "ASCII")]
)
def test_a_key_file_without_a_key(run: Run, key_file: Path, content: str, words: str) -> None:
    key_file.write_text(content)
    ran = run("operations", "list", "--key-file", str(key_file))
    assert ran.code == 2 and words in ran.err


def test_a_key_file_that_is_not_there(run: Run, tmp_path: Path) -> None:
    ran = run("operations", "list", "--key-file", str(tmp_path / "nothing"))
    assert ran.code == 2 and "No such file" in ran.err


def test_the_url_of_the_flag_wins(server: FakeServer, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HICACHECTL_URL", "http://127.0.0.1:1")
    assert run("operations", "list", "--url", server.url).code == 0
