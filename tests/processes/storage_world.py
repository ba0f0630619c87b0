"""A rank's side of a storage process, for tests: starts one, talks to it, and takes it down whatever happened."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from sglang_hicache import wire
from sglang_hicache.cache.pools import HostPool
from sglang_hicache.sockets import Poller
from sglang_hicache.workers.storage_client import StorageClient

NAMESPACE = "5a" * 32
PAGE_BYTES = 4096
HOST_PAGES = 256
PATIENCE_S = 60.0
LAST_WORDS_S = 10.0


def keys(count: int, first: int = 1) -> list[bytes]:
    """Page keys."""
    return [(first + index).to_bytes(32, "big") for index in range(count)]


class Rank:
    """A host pool and one storage process over it."""

    def __init__(self, run_dir: Path, backend: str, config: dict[str, Any], **changes: Any) -> None:
        self.pool = HostPool(HOST_PAGES, PAGE_BYTES)
        for page in range(HOST_PAGES):
            self.pool.page(page)[:] = random.Random(page).randbytes(PAGE_BYTES)
        fields: dict[str, Any] = {
            "rank": 1, "epoch": 1, "backend": backend, "extra_config_json": msgspec.json.encode(config).decode(),
            "namespace": NAMESPACE, "head_start": 0, "head_end": 2, "writes": True, "page_bytes": PAGE_BYTES,
            "host_pages": HOST_PAGES,
        }  # fmt: skip
        self.client = StorageClient(wire.OpenBackend(**(fields | changes)), self.pool.fd, str(run_dir))
        self._poller = Poller()
        for thing in self.client.fds():
            self._poller.register(thing)
        #: Of the op that was waited for last.
        self.took_us = 0
        self._unread: list[wire.FromStorage] = []
        #: Every message so far.
        self.heard: list[wire.FromStorage] = []

    def send(self, message: wire.ToStorage) -> None:
        """Send; it must be taken."""
        assert self.client.send(message)

    def next_message(
        self, wanted: Callable[[Any], bool] = lambda message: not isinstance(message, wire.BackendStats)
    ) -> Any:
        """The next message that is wanted (counters come whenever they like); others are passed over."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            while self._unread:
                message = self._unread.pop(0)
                if wanted(message):
                    return message
            assert time.monotonic() < deadline, f"nothing came; heard so far: {self.heard}"
            messages = self.client.receive()
            if any(isinstance(message, wire.BackendOpenFailed) for message in messages):
                self.client.stop()  # as a rank does
            self._unread += messages
            self.heard += messages
            if not messages:
                # Also when the process has ended: its last words may still be on their way to us.
                self._poller.wait(100)
                if self.client.exited():
                    deadline = min(deadline, time.monotonic() + LAST_WORDS_S)

    def opened(self) -> wire.BackendOpened:
        """Wait until the backend is open."""
        message = self.next_message()
        assert isinstance(message, wire.BackendOpened), message
        return message

    def end_of(self, op_id: int) -> wire.OpProgress:
        """Wait until an op is closed.  How long that took is another time each time, and is put into `took_us`."""
        message = self.next_message(lambda message: isinstance(message, wire.OpProgress) and message.op_id == op_id
                                    and message.closed)  # fmt: skip
        self.took_us = message.took_us
        return msgspec.structs.replace(message, took_us=0)

    def write(self, op_id: int, count: int, first: int = 1, host_page: int = 0) -> None:
        """Ask for a write of `count` pages."""
        parent = keys(1, first - 1)[0] if first > 1 else b""
        pages = list(range(host_page, host_page + count))
        message = wire.WritePages(
            op_id=op_id, keys=keys(count, first), host_pages=pages, parent=parent, depth=first - 1
        )
        self.send(message)

    def read(self, op_id: int, count: int, first: int = 1, host_page: int = 128) -> None:
        """Ask for a read of `count` pages."""
        pages = list(range(host_page, host_page + count))
        self.send(wire.ReadPages(op_id=op_id, keys=keys(count, first), host_pages=pages))

    def exit_status(self) -> int:
        """Wait for the end of the process and reap it."""
        deadline = time.monotonic() + PATIENCE_S
        while (status := self.client.reap()) is None:
            assert time.monotonic() < deadline, "the process does not end"
            self._poller.wait(100)
            self.heard += self.client.receive()
        return status

    def close(self) -> None:
        """Kill what still lives and give everything back."""
        if self.client.reap() is None:
            self.client.kill()
            self.exit_status()
        self.client.close()
        self.pool.close()
