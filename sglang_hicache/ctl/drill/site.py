"""Where a drill takes place: on a server of its own, with which it may do anything, or on somebody else's."""

from __future__ import annotations

import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from sglang_hicache.ctl.drill.own_server import DrillError, OwnServer
from sglang_hicache.ctl.drill.programs import Programs
from sglang_hicache.ctl.drill.stores import Store
from sglang_hicache.ctl.drill.stream import StreamClient
from sglang_hicache.storage.faulty_settings import Fault

_STORAGE_TIMEOUT_S = 60.0
_POLL_S = 0.02

STATUS = "/hicache/storage-backend"


class Site(ABC):
    """A server, its stores, and what can be done to their processes."""

    def __init__(self, stores: Mapping[str, Store]) -> None:
        self.stores = stores

    @property
    @abstractmethod
    def client(self) -> StreamClient:
        """Asks the server that runs now."""

    @property
    @abstractmethod
    def where(self) -> str:
        """For the report."""

    @abstractmethod
    def kill_storage_blocking(self, rank: int) -> None:
        """kill -9 of the storage process of a rank."""

    def status(self) -> dict[str, Any]:
        """What the ranks say."""
        return self.client.ask(STATUS)

    def heal(self) -> None:
        """No faults anywhere any more."""
        for store in self.stores.values():
            store.heal()


class OwnSite(Site):
    """The drill's own server."""

    def __init__(self, server: OwnServer, stores: Mapping[str, Store], programs: Programs, tp_size: int) -> None:
        super().__init__(stores)
        self.server = server
        self.programs = programs
        self._tp_size = tp_size

    @property
    def client(self) -> StreamClient:
        return self.server.client

    @property
    def where(self) -> str:
        return f"own server, {self._tp_size} rank{'s' if self._tp_size > 1 else ''}"

    def kill_storage_blocking(self, rank: int) -> None:
        victims = self.server.pids(f"storage_process rank {rank}")
        if not victims:
            raise DrillError(f"rank {rank} has no storage process that could be killed")
        for pid in victims:
            os.kill(pid, signal.SIGKILL)

    def restart_blocking(self, how: Literal["TERM", "KILL"]) -> list[str]:
        """Stop the server and start it again; what was not in order about its end."""
        problems: list[str] = []
        if how == "TERM":
            problems = self.server.stop_blocking()
        else:
            self.server.kill_blocking()
        self.server.start_blocking()
        return problems


class ForeignSite(Site):
    """A server that the drill has not started, and whose processes it cannot reach."""

    def __init__(self, client: StreamClient, stores: Mapping[str, Store]) -> None:
        super().__init__(stores)
        self._client = client

    @property
    def client(self) -> StreamClient:
        return self._client

    @property
    def where(self) -> str:
        return self._client.url

    def kill_storage_blocking(self, rank: int) -> None:
        """By a fault: every storage process of the store dies in its next call, on all ranks."""
        store = next(store for store in self.stores.values() if store.control is not None)
        before = self.status()
        crash = Fault(kind="crash")
        store.inject({"exists": crash, "read": crash, "write": crash})
        deadline, moment = time.monotonic() + _STORAGE_TIMEOUT_S, threading.Event()
        try:
            while not _has_left(before, self.status()):
                if time.monotonic() > deadline:
                    raise DrillError(f"no storage process of {store.name!r} died within {_STORAGE_TIMEOUT_S:g} s")
                moment.wait(_POLL_S)
        finally:
            store.heal()


def _has_left(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Is any rank in another state or epoch?  One that does not answer says nothing."""
    pairs = zip(before["ranks"], now["ranks"])
    return any(
        new["epoch"] is not None and (old["state"], old["epoch"]) != (new["state"], new["epoch"]) for old, new in pairs
    )
