"""Chains of pages in a Redis store, and what its servers say of them: for the tests of this folder."""

from __future__ import annotations

import threading
from collections.abc import Callable

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.backend import StorageBackend
from sglang_hicache.storage.checked import BatchResult
from sglang_hicache.storage.object_name import DEFAULT_PREFIX, object_name
from sglang_hicache.storage.page_format import IncomingPage, OutgoingPage, PageName
from tests.servers.redis import RedisServer
from tests.storage import pages


def write(backend: StorageBackend, count: int, *, first: int = 1, size: int = pages.PAGE_BYTES) -> BatchResult:
    """A chain of pages."""
    contents = [pages.content(first + index, size) for index in range(count)]
    return pages.store(backend, size=size).write_blocking(pages.keys(count, first), contents, b"", 0)


def read(backend: StorageBackend, count: int, *, first: int = 1, size: int = pages.PAGE_BYTES) -> BatchResult:
    """The same chain; whatever counts as read has the right bytes."""
    targets = pages.empty(count, size)
    result = pages.store(backend, size=size).read_blocking(pages.keys(count, first), targets)
    for index in range(result.pages):
        assert targets[index] == pages.content(first + index, size), index
    return result


def look_up(backend: StorageBackend, count: int, *, first: int = 1) -> int:
    """How many of the chain are there."""
    return pages.store(backend).lookup_blocking(pages.keys(count, first))


def name(number: int, prefix: str = DEFAULT_PREFIX) -> str:
    """What a page is called on the server."""
    return object_name(prefix, pages.layout().name(pages.key(number)))


def page_names(count: int) -> list[PageName]:
    """Of a chain."""
    return [pages.layout().name(key) for key in pages.keys(count)]


def incoming(number: int, size: int = pages.PAGE_BYTES) -> IncomingPage:
    """Room for a page."""
    return IncomingPage(pages.layout(size=size), pages.key(number), pages.empty(1, size)[0])


def outgoing(number: int, size: int = pages.PAGE_BYTES) -> OutgoingPage:
    """A page of its own."""
    return OutgoingPage(pages.layout(size=size), pages.key(number), pages.content(number, size), b"", 0)


def names_on(server: RedisServer, db: int = 0) -> set[str]:
    """Everything that the server has."""
    return {found.decode() for found in server.run("KEYS", "*", db=db)}


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """A call that is under way, and where its result, or the fault that it ended with, will be."""
    ended: list[object] = []

    def run() -> None:
        try:
            ended.append(call())
        except StorageError as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ended
