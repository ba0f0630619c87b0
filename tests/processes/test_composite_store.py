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
from tests.processes.server import Server, cached
from tests.processes.storage_world import Rank, keys
from tests.processes.test_same_text import EXACT, QUESTIONS, SYSTEM, ids
from tests.servers.redis import RedisServer

Start = Callable[..., Rank]

_FLAGS = (
    *EXACT, "--enable-hierarchical-cache", "--max-total-tokens", "768", "--hicache-ratio", "8", "--check-rank-digests",
    "--hicache-upload-rate", "0",
)  # fmt: skip
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
def program(tmp_path_factory: pytest.TempPathFactory) -> RedisServer:
    """A port and a folder for a Redis server."""
    return RedisServer(tmp_path_factory.mktemp("redis"))


@pytest.fixture
def redis(program: RedisServer) -> Iterator[RedisServer]:
    """A Redis server that is not started yet, and does not outlive the test."""
    yield program
    program.kill_blocking()


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
    assert rank.opened().info[f"copy{dead + 1}"] == "faulty: opened"
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


@pytest.mark.long
def test_same_tokens_through_tiers_and_through_a_mirror_that_loses_a_copy(tmp_path: Path, redis: RedisServer) -> None:
    """A whole server of two ranks: tiers of memory and files, then a mirror whose Redis is killed and comes back."""
    redis.start_blocking()
    in_redis = {"backend": "redis", "extra_config": {"url": redis.url, "connect_timeout_s": 0.5}}
    stores = {
        "tiered": {"tiers": [{"backend": "memory"}, _file(tmp_path / "tier")]},
        "mirror": {"copies": [in_redis, _file(tmp_path / "copy")], "retry_initial_s": 0.05, "retry_max_s": 0.05},
    }
    prompts = [SYSTEM + question for question in QUESTIONS[:3]]

    def asked(server: Server) -> list[int]:
        """Tokens of each prompt that came from the store, and none of the wrong ones."""
        server.flush()
        replies = [server.generate(prompt) for prompt in prompts]
        assert ids(replies) == wanted
        return [cached(reply).get("storage", 0) for reply in replies]

    with Server(tmp_path / "s", *_FLAGS, tp_size=2) as server:
        wanted = ids([server.generate(prompt) for prompt in prompts])
        for name, config in stores.items():
            reply = server.attach_store(name, config, switch=True, mode="drain")
            assert reply.status_code == 200, reply.text
            server.wait_until(lambda ranks: all(len(rank["places"]) == 1 for rank in ranks), "the old store is gone")
            assert asked(server)[0] == 0, "the store was not empty"
            server.quiesce()
            assert min(asked(server)) > 0, name
        redis.kill_blocking()
        assert min(asked(server)) > 0, "the other copy has it all"
        told = "copy 1 of the store fails and is left alone for now (backend_stats copy1_away; "
        server.wait_until(lambda ranks: all(told in " ".join(rank["why"]) for rank in ranks), "why says so")
        redis.start_blocking()

        def is_back(ranks: list[dict[str, Any]]) -> bool:
            asked(server)  # only traffic tries a store again
            return all(rank["backend_stats"]["away_stores"] == 0 for rank in ranks)

        status = server.wait_until(is_back, "the copy is used again")
        assert {rank["state"] for rank in status["ranks"]} == {"attached"}, "nobody outside had anything to do"
