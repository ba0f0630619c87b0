"""Programs that a drill starts beside its server, such as the server of a store, each on a free port."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from sglang_hicache.ctl.drill.own_server import DrillError
from sglang_hicache.ctl.drill.scenario import ProgramTable
from sglang_hicache.ctl.drill.stores import filled

_START_TIMEOUT_S = 30.0
_POLL_S = 0.02


def program_path(name: str) -> str | None:
    """Where a program is: on the PATH, or beside this interpreter, where pip puts those that come as packages."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


class Programs:
    """Those of one scenario; `with` ends them all."""

    def __init__(self, tables: Mapping[str, ProgramTable], folder: Path) -> None:
        self._tables = tables
        self._folder = folder
        self._ports = {name: _free_port() for name in tables}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._running):
            self.kill_blocking(name)

    def names(self) -> dict[str, str]:
        """What texts of a scenario may stand for: `{redis.port}`."""
        return {"folder": str(self._folder)} | {f"{name}.port": str(port) for name, port in self._ports.items()}

    def start_blocking(self, name: str) -> None:
        """Return when it listens."""
        names = self.names() | {"port": str(self._ports[name])}
        program, *arguments = [filled(word, names) for word in self._tables[name].command]
        command = [program_path(program) or program, *arguments]
        log_path = self._folder / f"{name}.log"
        with open(os.open(log_path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600), "ab") as log:
            try:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
            except OSError as error:
                raise DrillError(f"the program {name!r} cannot be started: {error}") from error
        self._running[name] = process
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not _listens(self._ports[name]):
            try:
                process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                if time.monotonic() < deadline:
                    continue
            raise DrillError(f"the program {name!r} does not listen on its port; see {log_path}")

    def kill_blocking(self, name: str) -> None:
        """kill -9."""
        process = self._running.pop(name, None)
        if process is not None:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started
            process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True
