"""Nothing of a Mooncake store is written into host memory after the call has returned that asked for it.

The rank gives a page of the host pool away as soon as the op that it belonged to is closed; bytes that come later would
be those of another request, behind every checksum.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_hicache.cache.pools import HostPool
from sglang_hicache.errors import StorageError
from sglang_hicache.storage import registry
from sglang_hicache.storage.backend import OpenContext, PageOutcome, PageResult, StorageBackend
from sglang_hicache.storage.page_format import IncomingPage, OutgoingPage, PageLayout
from tests.servers.mooncake import Mooncake, needs_mooncake, warm_up
from tests.storage import pages

needs_mooncake()

from sglang_hicache.storage import mooncake_client  # noqa: E402 - it imports the library
from sglang_hicache.storage.mooncake_client import EXIT_FATE_UNKNOWN, GIVES_UP_S, MooncakeClient  # noqa: E402
from sglang_hicache.storage.mooncake_memory import LEAST_DIRECT_BYTES, Pieces  # noqa: E402
from sglang_hicache.storage.mooncake_settings import MooncakeSettings  # noqa: E402

_PAGE_BYTES = LEAST_DIRECT_BYTES


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mooncake]:
    """A store whose master does not let go of a holder that was paused."""
    with Mooncake(tmp_path_factory.mktemp("mooncake"), "--client_ttl=60") as started:
        warm_up(started)
        yield started


@pytest.fixture
def pool() -> Iterator[HostPool]:
    with HostPool(2, _PAGE_BYTES) as made:
        yield made


@pytest.fixture
def backend(store: Mooncake, pool: HostPool) -> Iterator[StorageBackend]:
    """One that reads into the pool in place."""
    config = store.config(connect_timeout_s=0.5, timeout_s=1.0)
    _, settings = registry.validate_extra_config("mooncake", pages.text(config))
    context = OpenContext(rank=0, namespace=pages.NAMESPACE, page_bytes=_PAGE_BYTES, host_memory=pool.buffer)
    opened = registry.create("mooncake", settings, context)
    opened.open_blocking()
    yield opened
    opened.close_blocking()


def _read(backend: StorageBackend, layout: PageLayout, pool: HostPool, page: int = 0) -> PageOutcome:
    (outcome,) = backend.read_blocking([IncomingPage(layout, pages.key(1), pool.page(page))])
    return outcome


def _connections(store: Mooncake) -> list[socket.socket]:
    """Those of this process to the holder, over which it has asked for something that the holder has not looked at."""
    waiting = {
        int(words[2].rsplit(":", 1)[1], 16)
        for table in ("tcp", "tcp6")
        for words in map(str.split, Path(f"/proc/self/net/{table}").read_text().splitlines()[1:])
        if int(words[4].split(":")[1], 16)
    }
    found: dict[int, socket.socket] = {}
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
                continue
            copy = socket.socket(fileno=os.dup(int(descriptor)))
            is_wanted = copy.family == socket.AF_INET and copy.getsockname()[1] in waiting
            if is_wanted and copy.getpeername()[1] != store.master.port:
                found.setdefault(copy.getsockname()[1], copy)
            if copy not in found.values():
                copy.close()
    return [found[port] for port in sorted(found)]


@pytest.mark.parametrize("broken", [0, 1])
def test_a_failed_read_has_ended_every_transfer_that_it_began(
    broken: int, store: Mooncake, backend: StorageBackend, pool: HostPool
) -> None:
    """Header and page travel over connections of their own, to a holder that hangs.  One of the two breaks.

    1. Had the call returned then, the rank would give the page to another request.
    2. The holder wakes up and sends what it was asked for, over the other connection: into that request's page.
    """
    layout = pages.layout(secrets.token_hex(32), size=_PAGE_BYTES)
    pool.page(0)[:] = b"\x11" * _PAGE_BYTES
    page = OutgoingPage(layout, pages.key(1), pool.page(0), b"", 0)
    assert backend.write_blocking([page]) == [PageResult.WRITTEN]
    assert _read(backend, layout, pool) is PageResult.HIT
    assert backend.stats()["direct_pages"] == 2
    store.holder.pause()
    outcomes: list[PageOutcome] = []
    reading = threading.Thread(target=lambda: outcomes.append(_read(backend, layout, pool)))
    reading.start()
    connections: list[socket.socket] = []
    try:
        pages.wait_until(lambda: _found(store, connections), "the read did not ask for header and page")
        connections[broken].shutdown(socket.SHUT_RDWR)
        reading.join(pages.PATIENCE_S)
        assert isinstance(outcomes[0], StorageError) and outcomes[0].reason == "io"
        pool.page(0)[:] = b"\x33" * _PAGE_BYTES
    finally:
        for connection in connections:
            connection.close()
        store.holder.go_on()
        reading.join(pages.PATIENCE_S)
    # When the holder has answered this, it is through with what came before.
    pages.wait_until(lambda: _read(backend, layout, pool, 1) is PageResult.HIT, "the holder did not come back")
    assert bytes(pool.page(1)) == b"\x11" * _PAGE_BYTES
    assert bytes(pool.page(0)) == b"\x33" * _PAGE_BYTES


def _found(store: Mooncake, connections: list[socket.socket]) -> bool:
    """Both connections of the read, put into the list."""
    seen = _connections(store)
    if len(seen) == 2:
        connections += seen
        return True
    for connection in seen:
        connection.close()
    return False


class _Library:
    """Answers what it is told to; everything else is not its business."""

    def __init__(self, code: int) -> None:
        self._code = code

    def batch_get_into(self, keys: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
        return [self._code for _ in keys]

    batch_get_into_multi_buffers = batch_put_from = batch_put_from_multi_buffers = batch_get_into


class _Ended(Exception):
    pass


@pytest.mark.parametrize("is_direct", [True, False])
@pytest.mark.parametrize("kind", ["get_blocking", "put_blocking"])
@pytest.mark.parametrize(
    ("took_s", "code", "ends"), [(GIVES_UP_S, -800, True), (GIVES_UP_S, 0, False), (GIVES_UP_S - 1, -800, False)]
)
def test_a_transfer_on_which_the_library_has_given_up_ends_the_process(
    kind: str, is_direct: bool, took_s: float, code: int, ends: bool,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A holder sends a little every now and then.  The library of 0.3.13 says after 60 s that the transfer has failed,
    and goes on with it: 47 of 64 MiB came after the call had returned."""
    client = MooncakeClient(MooncakeSettings(master_server_address="127.0.0.1:1"))
    monkeypatch.setattr(client, "_store", _Library(code))
    monkeypatch.setattr(mooncake_client.time, "monotonic", itertools.count(0.0, took_s).__next__)

    def end(status: int) -> None:
        raise _Ended(status)

    monkeypatch.setattr(mooncake_client.os, "_exit", end)
    pieces = Pieces(is_direct=is_direct)
    pieces.addresses, pieces.sizes = [[1]], [[1]]
    if not ends:
        assert getattr(client, kind)(["key"], pieces) == [code]
        return
    with pytest.raises(_Ended) as met:
        getattr(client, kind)(["key"], pieces)
    assert met.value.args == (EXIT_FATE_UNKNOWN,)
    assert "this process ends" in caplog.text
