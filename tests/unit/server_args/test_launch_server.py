"""What the launcher does before it starts anything: refusals with exit code 2, and the private run folder."""

import os
import socket
import stat
from pathlib import Path

import pytest

from sglang_hicache import launch_server
from sglang_hicache.errors import UserError
from sglang_hicache.server_args import parse


@pytest.mark.parametrize(
    ("argv", "word"),
    [(["--device", "npu"], "npu"), (["--model-path", "/no/such/model"], "/no/such/model"), (["--tp"], "--tp")],
)
def test_a_mistake_in_the_flags_is_one_line_and_exit_code_2(capsys, argv, word):
    assert launch_server.main(argv) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and word in last


def test_a_port_that_is_taken_is_refused_before_the_model_loads():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        http = parse(["--port", str(taken.getsockname()[1])])
        with pytest.raises(UserError, match=r"--port \d+: .*choose another"):
            launch_server._check_port(http)


def test_the_run_folder_is_private_and_goes_with_the_server(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with launch_server.run_folder() as folder:
        assert os.path.dirname(folder) == str(tmp_path)
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        socket = tmp_path / os.path.basename(folder) / "socket"
        socket.touch()
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == []


def test_the_folder_of_a_killed_launcher_is_removed_by_the_next_one(monkeypatch, tmp_path):
    """What lives, what is just being made, and what is not ours stay."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with launch_server.run_folder() as living:
        for name in ("hicache-dead", "hicache-young", "else"):
            (tmp_path / name).mkdir()
        (tmp_path / "hicache-dead" / "launcher").touch()
        (tmp_path / "else" / "launcher").touch()
        (tmp_path / "hicache-file").touch()
        with launch_server.run_folder() as another:
            left = {path.name for path in tmp_path.iterdir()}
    assert left == {Path(living).name, Path(another).name, "hicache-young", "hicache-file", "else"}


def test_a_run_folder_that_cannot_be_made_says_what_to_set(monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/no/such/folder")
    with pytest.raises(UserError, match="XDG_RUNTIME_DIR"), launch_server.run_folder():
        pass
