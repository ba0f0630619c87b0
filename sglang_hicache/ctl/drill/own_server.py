"""A server of the drill's own, in processes like any other: started on a free port, asked over HTTP, stopped in order.

Whatever it says goes to a file in the drill's folder, which is kept when the drill fails.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from sglang_hicache.ctl.drill.stream import StreamClient
from sglang_hicache.errors import HiCacheError
from sglang_hicache.private_file import write_private_blocking
from sglang_hicache.storage.registry import ALLOW_FAULTY_ENV

#: The model is small and comes with the package; a server that is not there by then is broken, or the machine is.
_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 60.0
#: The last of its processes may end a moment after the launcher.
_LINGER_S = 5.0
_POLL_S = 0.02

_READY = re.compile(r"ready: (https?://\S+)")


class DrillError(HiCacheError):
    """The drill could not be carried out; that says nothing about the server's storage."""


class OwnServer:
    """One server, which may be stopped and started again."""

    def __init__(self, folder: Path, flags: Sequence[str]) -> None:
        folder.mkdir(mode=0o700, parents=True)
        self._folder = folder
        self._key = secrets.token_urlsafe(24)
        key_file = folder / "admin.key"
        write_private_blocking(key_file, self._key.encode())
        self._command = [
            sys.executable, "-m", "sglang_hicache.launch_server", "--port", "0",
            "--admin-api-key-file", str(key_file), *flags,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        #: Asks it; another one after each start.
        self.client: StreamClient

    @property
    def log_path(self) -> Path:
        """What the server of the latest start says."""
        return self._folder / f"server-{self._starts}.log"

    def start_blocking(self) -> None:
        """Return when it serves."""
        self._starts += 1
        environment = os.environ | {ALLOW_FAULTY_ENV: "1"}
        with open(os.open(self.log_path, os.O_CREAT | os.O_WRONLY, 0o600), "wb") as log:
            # A group of its own: Ctrl-C is for the drill, which then stops the server in order.
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, process_group=0
            )
        with ExitStack() as unless_it_serves:  # Ctrl-C while it starts must not leave it behind
            unless_it_serves.callback(self.kill_blocking)
            self.client = StreamClient(self._url_blocking(), self._key)
            unless_it_serves.pop_all()

    def _url_blocking(self) -> str:
        """Where it serves, once it does."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while (found := _READY.search(self._log())) is None:
            if not self.is_running(_POLL_S) or time.monotonic() > deadline:
                raise DrillError(f"the drill's server did not start; {self.log_path} ends with:\n{self._log_end()}")
        return found[1]

    def is_running(self, patience_s: float = 0.0) -> bool:
        """Waits so long for its end."""
        if self._process is None:
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        return self._process.poll() is None

    def stop_blocking(self) -> list[str]:
        """SIGTERM, and wait; what was not in order about its end."""
        if self._process is None:
            return []
        family = self.pids()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        problems = [] if not self.is_running(_STOP_TIMEOUT_S) else [f"it did not end within {_STOP_TIMEOUT_S:g} s"]
        self.kill_blocking()
        if not problems and self._process.returncode != 0:
            problems.append(f"its exit code is {self._process.returncode}; the log ends with:\n{self._log_end()}")
        if "Traceback" in self._log():
            problems.append(f"its log has a traceback: {self.log_path}")
        problems += [f"process {pid} outlived it" for pid in _still_alive(family, _LINGER_S)]
        self._process = None
        return problems

    def kill_blocking(self) -> None:
        """kill -9, and wait for the end of all of its processes."""
        if self._process is None:
            return
        family = self.pids()
        self._process.kill()
        self._process.wait()
        _still_alive(family, _STOP_TIMEOUT_S)

    def pids(self, pattern: str = "") -> list[int]:
        """Its processes whose command line has this in it, but for the launcher."""
        found: list[int] = []
        parents = [self._process.pid] if self._process is not None else []
        while parents:
            parent = parents.pop()
            for task in Path(f"/proc/{parent}/task").glob("*/children"):
                for child in map(int, _read(task).split()):
                    parents.append(child)
                    if re.search(pattern, _read(Path(f"/proc/{child}/cmdline")).replace("\0", " ")):
                        found.append(child)
        return found

    def _log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def _log_end(self) -> str:
        return "\n".join(self._log().splitlines()[-15:])


def _read(path: Path) -> str:
    """A file of /proc, or nothing: the process or thread may have ended meanwhile."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _still_alive(pids: Sequence[int], patience_s: float) -> list[int]:
    """Those that have not ended by then; they are no children of ours."""
    deadline = time.monotonic() + patience_s
    found: list[int] = []
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                found.append(pid)
        finally:
            os.close(fd)
    return found
