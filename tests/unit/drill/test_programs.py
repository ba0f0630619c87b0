"""Programs beside the server: started on a free port, killed, started again, and never left behind."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from sglang_hicache.ctl.drill.own_server import DrillError
from sglang_hicache.ctl.drill.programs import Programs
from sglang_hicache.ctl.drill.scenario import ProgramTable

LISTENS = "import socket, sys\ns = socket.create_server(('127.0.0.1', int(sys.argv[1])))\nwhile True: s.accept()"


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_program_listens_is_killed_and_comes_back_on_the_same_port(tmp_path: Path) -> None:
    table = ProgramTable(command=[sys.executable, "-c", LISTENS, "{port}", "{folder}"])
    with Programs({"redis": table}, tmp_path) as programs:
        port = int(programs.names()["redis.port"])
        programs.start_blocking("redis")
        assert _is_open(port)
        programs.kill_blocking("redis")
        assert not _is_open(port)
        programs.start_blocking("redis")
        assert _is_open(port)
    assert not _is_open(port)


@pytest.mark.parametrize("command", [[sys.executable, "-c", "raise SystemExit('no')"], ["/no/such/program"]])
def test_a_program_that_does_not_listen_is_named(tmp_path: Path, command: list[str]) -> None:
    with Programs({"redis": ProgramTable(command=command)}, tmp_path) as programs:
        with pytest.raises(DrillError, match="the program 'redis'"):
            programs.start_blocking("redis")
