"""A real storage process for benchmarks: pages of a host pool go out and come back, all ops in line at once."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sglang_hicache import wire
from sglang_hicache.cache.pools import HostPool
from sglang_hicache.sockets import Poller
from sglang_hicache.workers.storage_client import StorageClient

OP_PAGES = 64

#: A store that is full is asked again after this long, so often.
OFFER_MS, MOST_OFFERS = 10, 2_000


class Stored:
    """The pages of a pool, in a store."""

    def __init__(self, run_dir: Path, pool: HostPool, backend: str, config: dict[str, Any], rank: int = 0) -> None:
        opened = wire.OpenBackend(
            rank=rank, epoch=1, backend=backend, extra_config_json=msgspec.json.encode(config).decode(),
            namespace=secrets.token_hex(32), head_start=0, head_end=1, writes=True, page_bytes=pool.page_bytes,
            host_pages=pool.pages, log_level="error",
        )  # fmt: skip
        self._pool = pool
        self._keys: list[bytes] = []
        self._client = StorageClient(opened, pool.fd, str(run_dir))
        self._poller = Poller()
        for thing in self._client.fds():
            self._poller.register(thing)
        self._next_op = 0
        self.rename()
        self._until(self._is_opened)

    def rename(self) -> None:
        """From now on the pages are others, for the store."""
        self._keys = [secrets.token_bytes(32) for _ in range(self._pool.pages)]

    def write(self) -> float:
        """Offer every page until it is stored; share of those that were at the first offer."""
        at_first = 0
        for offer in range(MOST_OFFERS):
            stored = self._transfer(self._write_op)
            at_first = at_first or stored
            if stored == self._pool.pages:
                return at_first / stored
            if offer:
                self._poller.wait(OFFER_MS)
        raise SystemExit(f"{stored} of {self._pool.pages} pages could be stored in {MOST_OFFERS} offers")

    def read(self) -> float:
        """Ask for every page once; share of those that came."""
        return self._transfer(self._read_op) / self._pool.pages

    def look_up(self, pages: int) -> int:
        """Ask whether the first of the pages are there; how many are."""
        self._next_op += 1
        self._client.send(wire.LookupPages(op_id=self._next_op, keys=self._keys[:pages]))
        found = 0

        def is_answer(message: wire.FromStorage) -> bool:
            nonlocal found
            found = message.pages if isinstance(message, wire.OpProgress) else found
            return isinstance(message, wire.OpProgress) and message.closed

        self._until(is_answer)
        return found

    def clear(self) -> None:
        self._client.send(wire.ClearPages(command_id="clear"))
        self._until(lambda message: isinstance(message, wire.ClearDone))

    def close(self) -> None:
        self._client.stop()
        while self._client.reap() is None:
            self._poller.wait(100)
        self._client.close()

    def _write_op(self, op_id: int, span: slice) -> wire.ToStorage:
        return wire.WritePages(
            op_id=op_id,
            keys=self._keys[span],
            host_pages=list(range(span.start, span.stop)),
            parent=self._keys[span.start - 1] if span.start else b"",
            depth=span.start,
        )

    def _read_op(self, op_id: int, span: slice) -> wire.ToStorage:
        return wire.ReadPages(op_id=op_id, keys=self._keys[span], host_pages=list(range(span.start, span.stop)))

    def _transfer(self, make: Callable[[int, slice], wire.ToStorage]) -> int:
        """Send every op at once and wait for all of them; pages that went through."""
        open_ops = set()
        for start in range(0, self._pool.pages, OP_PAGES):
            self._next_op += 1
            open_ops.add(self._next_op)
            self._client.send(make(self._next_op, slice(start, min(start + OP_PAGES, self._pool.pages))))
        pages = 0

        def is_last(message: wire.FromStorage) -> bool:
            nonlocal pages
            if isinstance(message, wire.OpProgress) and message.closed:
                open_ops.remove(message.op_id)
                pages += message.pages
            return not open_ops

        self._until(is_last)
        return pages

    @staticmethod
    def _is_opened(message: wire.FromStorage) -> bool:
        if isinstance(message, wire.BackendOpenFailed):
            raise SystemExit(f"the store does not open: {message.reason}")
        return isinstance(message, wire.BackendOpened)

    def _until(self, is_over: Callable[[wire.FromStorage], bool]) -> None:
        while True:
            self._poller.wait(None)
            # Every message is looked at, also behind the last one: it is counted by being looked at.
            verdicts = [is_over(message) for message in self._client.receive()]
            if any(verdicts):
                return
            if self._client.exited():
                raise SystemExit("the storage process ended")
