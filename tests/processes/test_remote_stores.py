"""Stores in servers of their own, under whole servers of ours: the same text, for every server that shares them, and
after everything but the stored bytes was started anew on other ports.

Each server of ours takes every store in turn, by a switch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.processes.server import Server, cached
from tests.processes.test_same_text import EXACT, QUESTIONS, SYSTEM, ids
from tests.servers.mooncake import Mooncake
from tests.servers.redis import RedisServer
from tests.servers.s3 import RcloneServer
from tests.servers.s3 import config as s3_config

FLAGS = (
    *EXACT, "--enable-hierarchical-cache", "--max-total-tokens", "768", "--hicache-ratio", "8", "--check-rank-digests",
    "--hicache-upload-rate", "0",
)  # fmt: skip
MINE = [SYSTEM + question for question in QUESTIONS[:2]]
YOURS = ["The other server asks about something else. " + SYSTEM + QUESTIONS[2]]


class Store(Protocol):
    """A store with its server."""

    backend: str

    def config(self) -> dict[str, Any]:
        """Extra config for where it is now."""

    def move_blocking(self) -> None:
        """Stop its server and start another one, elsewhere, over what it has kept."""

    def close(self) -> None:
        """End its server."""


class Redis:
    backend = "redis"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = RedisServer(folder)
        self._server.start_blocking()

    def config(self) -> dict[str, Any]:
        return {"url": self._server.url}

    def move_blocking(self) -> None:
        self._server.run("SAVE")
        self.close()
        self._server = RedisServer(self._folder)
        self._server.start_blocking()

    def close(self) -> None:
        self._server.kill_blocking()


class S3:
    backend = "s3"

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._server = RcloneServer(folder)
        self._server.start_blocking()

    def config(self) -> dict[str, Any]:
        return s3_config(self._server.port)

    def move_blocking(self) -> None:
        self.close()
        self._server = RcloneServer(self._folder)
        self._server.start_blocking()

    def close(self) -> None:
        self._server.kill_blocking()


class InMooncake:
    """Its pages live in the memory of its servers, which therefore stay where they are."""

    backend = "mooncake"

    def __init__(self, folder: Path) -> None:
        self._servers = Mooncake(folder)
        self._servers.start_blocking()

    def config(self) -> dict[str, Any]:
        return self._servers.config()

    def move_blocking(self) -> None:
        pass

    def close(self) -> None:
        self._servers.kill_blocking()


STORES: tuple[Callable[[Path], Store], ...] = (Redis, S3, InMooncake)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[list[Store]]:
    """Every store, each with a server that runs."""
    with contextlib.ExitStack() as stack:
        stores = []
        for make in STORES:
            store = make(folder / make.backend)
            stack.callback(store.close)
            stores.append(store)
        yield stores


def take(server: Server, store: Store) -> None:
    """Use this store from now on; what the server knows of before is forgotten on device and host."""
    reply = server.attach_store(store.backend, store.config(), switch=True, mode="drain")
    assert reply.status_code == 200, reply.text
    server.wait_until(lambda ranks: all(len(rank["places"]) == 1 for rank in ranks), "the old store is gone")
    server.flush()


def hits(reply: dict[str, Any]) -> int:
    return cached(reply).get("storage", 0)


@pytest.mark.parametrize("tp_size", [1, pytest.param(2, marks=pytest.mark.long)])
def test_two_servers_read_what_the_other_one_wrote(tp_size: int, tmp_path: Path) -> None:
    mine = Server(tmp_path / "a", *FLAGS, tp_size=tp_size)
    yours = Server(tmp_path / "b", *FLAGS, tp_size=tp_size)
    with running(tmp_path) as stores, mine, yours:
        wanted = ids([mine.generate(prompt) for prompt in [*MINE, *YOURS]])
        for store in stores:
            take(mine, store)
            take(yours, store)
            first = [mine.generate(prompt) for prompt in MINE]
            assert ids(first) == wanted[:2] and not hits(first[0]), "the store was not empty"
            mine.quiesce()
            read = [yours.generate(prompt) for prompt in [*MINE, *YOURS]]
            assert ids(read) == wanted and hits(read[0]) > 100 and hits(read[1]), store.backend
            yours.quiesce()
            back = mine.generate(YOURS[0])
            assert back["output_ids"] == wanted[2] and hits(back) > 100, store.backend


@pytest.mark.parametrize("tp_size", [1, 2])
def test_same_tokens_through_every_store_and_after_a_restart(tp_size: int, tmp_path: Path) -> None:
    prompts = [*MINE, *YOURS]
    with running(tmp_path) as stores:
        with Server(tmp_path / "a", *FLAGS, tp_size=tp_size) as server:
            wanted = ids([server.generate(prompt) for prompt in prompts])
            assert len({tuple(tokens) for tokens in wanted}) > 1, "all texts are alike: nothing could be told apart"
            for store in stores:
                take(server, store)
                assert ids([server.generate(prompt) for prompt in prompts]) == wanted, store.backend
                server.quiesce()
                server.flush()
                read = server.generate_all(prompts)
                assert ids(read) == wanted and sum(map(hits, read)) > 100, store.backend
        for store in stores:
            store.move_blocking()
        with Server(tmp_path / "b", *FLAGS, tp_size=tp_size) as server:
            for store in stores:
                take(server, store)
                again = [server.generate(prompt) for prompt in prompts]
                assert ids(again) == wanted and all(map(hits, again)) and hits(again[0]) > 100, store.backend
