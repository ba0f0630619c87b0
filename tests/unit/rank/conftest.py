"""A storage client that a test plays, and a tiny server's configuration with a folder for its sockets."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import msgspec
import pytest

from sglang_hicache import wire
from sglang_hicache.scheduler.storage_driver import StorageDriver
from sglang_hicache.sockets import Poller
from tests.ranks.world import server_config


@dataclass
class PlayedClient:
    """Does what the test says; remembers what the driver did."""

    said: list[wire.FromStorage | Exception] = field(default_factory=list)
    sent: list[wire.ToStorage] = field(default_factory=list)
    did: list[str] = field(default_factory=list)
    is_full: bool = False
    status: int | None = None
    pid: int = 4711

    def __post_init__(self) -> None:
        self.fd = os.eventfd(0)

    def fds(self) -> list[int]:
        return [self.fd]

    def send(self, message: wire.ToStorage) -> bool:
        if not self.is_full:
            self.sent.append(message)
        return not self.is_full

    def receive(self) -> list[wire.FromStorage]:
        said, self.said = self.said, []
        for message in said:
            if isinstance(message, Exception):
                raise message
        return said

    def exited(self) -> bool:
        return self.status is not None

    def reap(self) -> int | None:
        self.did.append("reap")
        return self.status

    def kill(self) -> None:
        self.did.append("kill")

    def stop(self) -> None:
        self.did.append("stop")

    def close(self) -> None:
        self.did.append("close")
        os.close(self.fd)


class PlayedStorage:
    """A driver whose processes are played: `clients[epoch]`."""

    def __init__(self) -> None:
        self.clients: dict[int, PlayedClient] = {}
        self.refusal: Exception | None = None
        self.poller = Poller()
        self.driver = StorageDriver(self._launch, self.poller)

    def _launch(self, spawn):
        if self.refusal is not None:
            raise self.refusal
        self.clients[spawn.epoch] = PlayedClient()
        return self.clients[spawn.epoch]


@pytest.fixture
def storage():
    played = PlayedStorage()
    yield played
    played.driver.close()


@pytest.fixture
def config(tmp_path):
    """Two ranks; sockets in a folder of this test."""
    return msgspec.structs.replace(server_config(2), run_dir=str(tmp_path))
