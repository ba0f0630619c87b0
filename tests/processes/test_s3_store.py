"""A bucket through real storage processes: refused with the reason, killed under way, moved to another port."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache import wire
from tests.processes.storage_world import Rank
from tests.servers import s3

Start = Callable[..., Rank]
COUNT = 64


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts storage processes and takes them down after the test."""
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)
    ranks: list[Rank] = []

    def start_one(config: dict[str, Any], **changes: Any) -> Rank:
        ranks.append(Rank(run_dir, "s3", config, **changes))
        return ranks[-1]

    yield start_one
    for rank in ranks:
        rank.close()


def test_a_wrong_secret_is_refused_with_the_reason(start: Start, tmp_path: Path) -> None:
    with s3.RcloneServer(tmp_path) as server:
        assert isinstance(server, s3.RcloneServer)
        rank = start(s3.config(server.port, secret_key="not-that-one"))
        answer = rank.next_message()
        assert isinstance(answer, wire.BackendOpenFailed)
        assert answer.reason.startswith("wrong_password: ") and "SignatureDoesNotMatch" in answer.reason
        assert "not-that-one" not in answer.reason
        assert rank.exit_status() == 1


def test_ops_of_a_server_that_is_killed_and_comes_back(start: Start, tmp_path: Path) -> None:
    """What was asked meanwhile settles with a reason, and the same process goes on."""
    with s3.RcloneServer(tmp_path) as server:
        assert isinstance(server, s3.RcloneServer)
        rank = start(s3.config(server.port, retries=0))
        rank.opened()
        rank.write(1, COUNT)
        assert rank.end_of(1).pages == COUNT
        server.kill_blocking()
        rank.read(2, COUNT)
        read = rank.end_of(2)
        rank.write(3, COUNT, first=1000)
        written = rank.end_of(3)
        assert (read.pages, written.pages) == (0, 0)
        assert read.reason.startswith("io: ") and "connection refused" in written.reason
        server.start_blocking()
        rank.read(4, COUNT)
        assert rank.end_of(4).pages == COUNT
        assert [rank.pool.page(n) == rank.pool.page(128 + n) for n in range(COUNT)] == [True] * COUNT


def test_pages_are_read_by_another_process_from_another_port(start: Start, tmp_path: Path) -> None:
    ports = set()
    for epoch in (1, 2):
        with s3.RcloneServer(tmp_path) as server:
            assert isinstance(server, s3.RcloneServer)
            ports.add(server.port)
            rank = start(s3.config(server.port), epoch=epoch)
            rank.opened()
            if epoch == 1:
                rank.write(1, COUNT)
                assert rank.end_of(1).pages == COUNT
            else:
                rank.read(2, COUNT)
                assert rank.end_of(2).pages == COUNT
                assert [rank.pool.page(n) == rank.pool.page(128 + n) for n in range(COUNT)] == [True] * COUNT
            rank.client.stop()
            assert rank.exit_status() == 0
    assert len(ports) == 2
