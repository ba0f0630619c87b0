"""scripts/serve: a private key that never shows, an address that works, an ordinary end."""

from __future__ import annotations

import errno
import http.server
import json
import os
import pty
import signal
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.house.source import ROOT

START_TIMEOUT_S = 120.0


class Served:
    """A running scripts/serve and what it printed."""

    def __init__(self, state: Path) -> None:
        environment = {**os.environ, "XDG_STATE_HOME": str(state), "HOME": str(state)}
        self.folder = state / "sglang-hicache"
        self.process = subprocess.Popen(
            [ROOT / "scripts" / "serve", "--free-port"],
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.output = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if line.startswith("Ctrl-C"):
                break
        assert "\nReady: " in self.output, self.output
        self.url = self.output.split("\nReady: ")[1].split()[0]

    def stop(self) -> int:
        """SIGTERM to the script alone: it has to pass it on."""
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=START_TIMEOUT_S)
        return self.process.returncode


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A server on a free port, with its files in a folder of the test whose name has a space."""
    running = Served(tmp_path / "my state")
    yield running
    if running.process.poll() is None:
        os.killpg(running.process.pid, signal.SIGKILL)
        running.process.communicate()


@pytest.mark.long
def test_serve_from_start_to_end(served: Served) -> None:
    folder = served.folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    private = [path for path in folder.iterdir() if path.is_file()]
    assert {path.name for path in private} >= {"admin.key", "admin.header"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}

    key = (folder / "admin.key").read_text(encoding="ascii").strip()
    processes = subprocess.run(["ps", "axeww"], capture_output=True, text=True, check=True).stdout
    assert len(key) > 30 and key not in processes and key not in served.output

    status = f"{served.url}/hicache/storage-backend"
    assert httpx.get(status).status_code == 401
    answer = httpx.get(status, headers={"Authorization": f"Bearer {key}"}).json()
    assert answer["hicache_storage_backend"] == "file"
    assert [rank["state"] for rank in answer["ranks"]] == ["attached", "attached"]

    # The lines it prints are lines that work: the admin header comes from its file.
    printed = [line.strip() for line in served.output.splitlines()]
    (exports,) = [line for line in printed if line.startswith("export ")]
    lines = [line for line in printed if line.startswith("curl ") or "/hicachectl' " in line]
    outputs = [
        subprocess.run(["bash", "-c", f"{exports}; {line}"], capture_output=True, text=True, check=True).stdout
        for line in lines
    ]
    assert json.loads(outputs[0])["text"].strip()
    assert "flushed" in outputs[1] and "storage   attached, file" in outputs[2]
    assert "switch succeeded" in outputs[3] and "detach succeeded" in outputs[4]
    assert served.stop() == 0


@pytest.mark.long
def test_one_ctrl_c_in_a_terminal_is_one_stop(tmp_path: Path) -> None:
    """Ctrl-C reaches the whole foreground group: the script and, if it is in there too, the server.

    1. The terminal sends SIGINT to both; the server begins to drain.
    2. The script passes the signal on; for the server that is the second one: it kills its ranks and exits with 1.
    """
    state = tmp_path / "my state"
    process, terminal = pty.fork()
    if process == 0:
        environment = {**os.environ, "XDG_STATE_HOME": str(state), "HOME": str(state)}
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job of a shell ignores it, and bash keeps that
        os.execve(ROOT / "scripts" / "serve", ["serve", "--free-port"], environment)
    output, pressed = b"", False
    while chunk := _read(terminal):
        output += chunk
        if not pressed and b"\nCtrl-C " in output:
            os.write(terminal, b"\x03")
            pressed = True
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    text = output.decode()
    assert os.waitstatus_to_exitcode(status) == 0, text
    assert "stopping" in text and "killing" not in text and text.count("exited with code 0") == 3


class _SomebodyElse(http.server.BaseHTTPRequestHandler):
    """Another server, and a ready one."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_port_that_somebody_else_has_is_not_announced_as_ours(tmp_path: Path) -> None:
    """The script asks the address whether it is ready.

    1. An older server has the port.  Ours starts, and takes seconds to find that out.
    2. The older one answers the question at once: "Ready", and what is typed next changes the wrong server.
    """
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _SomebodyElse) as other:
        serving = threading.Thread(target=other.serve_forever)
        serving.start()
        try:
            ran = _refused(tmp_path, str(other.server_port))
        finally:
            other.shutdown()
            serving.join()
    assert ran.returncode == 1 and "Ready" not in ran.stdout
    assert f"cannot listen on 127.0.0.1 port {other.server_port}" in ran.stdout and "--free-port" in ran.stdout


def test_a_port_that_is_none_ends_in_the_words_of_the_server(tmp_path: Path) -> None:
    ran = _refused(tmp_path, "abc")
    assert ran.returncode == 2 and "'abc' is not a whole number" in ran.stdout and "Traceback" not in ran.stdout


def _refused(state: Path, port: str) -> subprocess.CompletedProcess[str]:
    """A start that comes to nothing."""
    return subprocess.run(
        [ROOT / "scripts" / "serve", "--port", port],
        cwd="/",
        env={**os.environ, "XDG_STATE_HOME": str(state), "HOME": str(state)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )


def _read(terminal: int) -> bytes:
    """What the terminal shows next; nothing once every process has left it."""
    try:
        return os.read(terminal, 65536)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return b""


@pytest.mark.parametrize("flags", [["--hicache-storage-backend", "redis"], ["--hicache-storage-backend=redis"]])
def test_another_storage_backend_takes_the_place_of_the_folder(tmp_path: Path, flags: list[str]) -> None:
    """The script's own --file-storage-path made the server refuse every other backend, and nobody could leave it out.
    This one is refused as well, for its missing url: nothing has to run for that."""
    ended = subprocess.run(
        [ROOT / "scripts" / "serve", "--free-port", *flags],
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    assert ended.returncode != 0 and "extra config of redis: url is missing" in ended.stdout + ended.stderr
