"""Stores made of stores in a real storage process: what a rank sees when one of them dies, and when it comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache import wire
from sglang_hicache.storage import registry
from sglang_hicache.storage.fault_control import write_faults
from sglang_hicache.storage.faulty_settings import Fault
from tests.processes.storage_world import Rank, keys
from tests.servers.redis import RedisServer

Start = Callable[..., Rank]

_DEAD = {call: Fault(kind="error") for call in ("exists", "read", "write", "touch", "delete", "set_aside", "clear")}


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts storage processes and takes them down after the test."""
    monkeypatch.setenv(registry.ALLOW_FAULTY_ENV, "1")
    (tmp_path / "run").mkdir(mode=0o700)
    ranks: list[Rank] = []

    def start_one(backend: str, config: dict[str, Any], **changes: Any) -> Rank:
        ranks.append(Rank(tmp_path / "run", backend, config, **changes))
        return ranks[-1]

    yield start_one
    for rank in ranks:
        rank.close()


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis server that is not started yet."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill_blocking()


def _file(path: Path) -> dict[str, Any]:
    return {"backend": "file", "extra_config": {"file_storage_path": str(path)}}


def _found(rank: Rank, op_id: int, count: int) -> int:
    rank.send(wire.LookupPages(op_id=op_id, keys=keys(count)))
    return rank.end_of(op_id).pages


def _last_stats(rank: Rank) -> dict[str, int]:
    rank.client.stop()
    assert rank.exit_status() == 0
    rank.heard += rank.client.receive()
    return [message for message in rank.heard if isinstance(message, wire.BackendStats)][-1].stats


@pytest.mark.parametrize("dead", [0, 1])
def test_a_mirror_outlives_one_of_its_copies(start: Start, tmp_path: Path, dead: int) -> None:
    """1. Pages are written to both.  2. One of them fails from then on.  3. Everything goes on, new pages too."""
    control = tmp_path / "control.json"
    copies = [_file(tmp_path / str(number)) for number in range(2)]
    copies[dead] = {"backend": "faulty", "extra_config": {
        "inner": "file", "inner_config": copies[dead]["extra_config"], "control": str(control),
    }}  # fmt: skip
    rank = start("mirror", {"copies": copies})
    assert rank.opened().info[f"copy{dead + 1}"] == "faulty: well"
    rank.write(1, 20)
    assert rank.end_of(1).pages == 20
    write_faults(control, _DEAD)
    for round_number in range(4):
        assert _found(rank, 10 + round_number, 30) == 20
        rank.read(20 + round_number, 20)
        assert rank.end_of(20 + round_number) == wire.OpProgress(
            op_id=20 + round_number, pages=20, settled=True, closed=True
        )
    assert rank.pool.buffer[128 * 4096 : 148 * 4096] == rank.pool.buffer[: 20 * 4096]
    rank.write(2, 10, first=21, host_page=20)
    assert rank.end_of(2) == wire.OpProgress(op_id=2, pages=10, settled=True, closed=True)
    assert _found(rank, 3, 30) == 30
    stats = _last_stats(rank)
    assert stats["away_stores"] == stats[f"copy{dead + 1}_away"] == 1
    assert stats["failed_calls"] >= 3 and stats.get("retried_calls", 0) == 0


def test_a_store_that_was_not_there_at_the_attach_joins_when_it_is(
    start: Start, tmp_path: Path, redis: RedisServer
) -> None:
    """1. A mirror is attached while its Redis server is down.  2. The server is started.  3. It gets pages, too."""
    redis_store = {"backend": "redis", "extra_config": {"url": redis.url, "connect_timeout_s": 0.5}}
    config = {"copies": [redis_store, _file(tmp_path / "store")], "retry_initial_s": 0.05, "retry_max_s": 0.05}
    rank = start("mirror", config)
    assert "is left alone" in rank.opened().info["copy1"]
    rank.write(1, 5)
    assert rank.end_of(1).pages == 5
    redis.start_blocking()
    op_id = 1
    while not redis.run("DBSIZE") and op_id < 2000:
        op_id += 1
        rank.read(op_id, 5)  # what the first copy lacks is read from the second, and copied to the first
        assert rank.end_of(op_id).pages == 5
    assert _last_stats(rank)["copied_pages"] > 0
    redis.kill_blocking()


def test_pages_of_a_killed_near_tier_come_from_the_far_one(start: Start, tmp_path: Path, redis: RedisServer) -> None:
    """A near Redis is killed under load, and is used again once it is back: no operation fails."""
    redis.start_blocking()
    near = {"backend": "redis", "extra_config": {"url": redis.url, "connect_timeout_s": 0.5}}
    config = {"tiers": [near, _file(tmp_path / "store")], "retry_initial_s": 0.05, "retry_max_s": 0.05}
    rank = start("tiered", config)
    rank.opened()
    rank.write(1, 5)
    assert rank.end_of(1).pages == 5
    redis.kill_blocking()
    rank.read(2, 5)
    assert rank.end_of(2) == wire.OpProgress(op_id=2, pages=5, settled=True, closed=True)
    rank.write(3, 5, first=6)
    assert rank.end_of(3).pages == 5
    redis.start_blocking()
    op_id = 3
    while redis.run("DBSIZE") < 10 and op_id < 2000:
        op_id += 1
        rank.read(op_id, 10)
        assert rank.end_of(op_id).pages == 10
    stats = _last_stats(rank)
    assert stats["copied_pages"] >= 10 and stats["away_stores"] == 0
    redis.kill_blocking()
