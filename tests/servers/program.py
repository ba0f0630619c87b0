"""A server program that a test starts by itself, on a private loopback port, and kills."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

#: Upper bound of every wait: reached only when a test fails.
START_S = 60.0
_POLL_S = 0.02


def free_port() -> int:
    """A loopback port that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def listens(port: int) -> bool:
    """Does somebody answer on this loopback port?"""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


class Program:
    """One server: `start_blocking` returns when it is ready; `with` ends it.  Its words are in `log`."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        is_ready: Callable[[], bool],
        env: dict[str, str] | None = None,
    ) -> None:
        self._command = list(command)
        self._folder = folder
        self._is_ready = is_ready
        self._env = env
        self._process: subprocess.Popen[bytes] | None = None
        self.log = folder / f"{Path(command[0]).name}.log"

    def __enter__(self) -> Program:
        self.start_blocking()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill_blocking()

    @property
    def pid(self) -> int:
        """Of the server that runs."""
        assert self._process is not None, "the program does not run"
        return self._process.pid

    def start_blocking(self) -> None:
        """Start, and return when it is ready."""
        assert self._process is None, "the program runs already"
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=os.environ | (self._env or {}), process_group=0,
            )  # fmt: skip
        deadline = time.monotonic() + START_S
        while not self._is_ready():
            try:
                code = self._process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                if time.monotonic() < deadline:
                    continue
                code = None
            words = self.log.read_text(errors="replace")[-3000:]
            self.kill_blocking()
            raise AssertionError(f"{self._command} is not ready (exit code {code}): {words}")

    def kill_blocking(self) -> None:
        """kill -9 of everything that it has started; harmless when it does not run."""
        self._end(signal.SIGKILL)

    def stop_blocking(self) -> None:
        """SIGTERM, and wait until it has left."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """It hangs from now on, connections and all."""
        os.killpg(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)  # a busy machine may let it go on for a while

    def go_on(self) -> None:
        """It hangs no longer."""
        os.killpg(self.pid, signal.SIGCONT)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:
                os.killpg(process.pid, number)
            process.wait()
