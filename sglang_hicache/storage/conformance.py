"""The contract of a backend as checks that run: the authors of a backend hand `check_backend` a way to make one.

Used by tests, and by whoever writes a backend of their own.  A check opens backends, uses them the way the storage
process does, and raises `ContractBroken` with a sentence that says what was expected.  Every check works in a namespace
of its own, so that they may run over one store, in any order and at the same time.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sglang_hicache.storage.backend import PageOutcome, PageResult, StorageBackend
from sglang_hicache.storage.checked import CheckedStore
from sglang_hicache.storage.page_format import (
    CHUNK_BYTES,
    WRITE_CHUNK_BYTES,
    IncomingPage,
    OutgoingPage,
    PageLayout,
    PageName,
    Part,
    Verdict,
)

#: Makes a new, unopened backend object over the same store each time.
Make = Callable[[], StorageBackend]

_PAGE_BYTES = 4096


class ContractBroken(AssertionError):
    """A backend does not do what `backend.py` says."""


def check_backend(make: Make) -> None:
    """Run every check."""
    for check in CHECKS:
        check(make)


def check_self_test(make: Make) -> None:
    """What an attach asks of a backend."""
    with opened(make) as backend:
        _store(backend, new_layout()).self_test_blocking(0)


def check_round_trip(make: Make) -> None:
    """What was written is read, byte by byte, whatever the size of a page."""
    with opened(make) as backend:
        for size in (1, _PAGE_BYTES, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES - 256, WRITE_CHUNK_BYTES + 1):
            layout = new_layout(page_bytes=size)
            keys, contents = _write(backend, layout, 3)
            targets = [bytearray(size) for _ in keys]
            result = _store(backend, layout).read_blocking(keys, list(map(memoryview, targets)))
            demand(result.pages == 3, f"reads {result} of 3 pages of {size} bytes")
            demand(targets == contents, f"returns other bytes for a page of {size} bytes")


def check_exists_counts_from_the_first(make: Make) -> None:
    """`exists` is the length of the prefix without a gap."""
    with opened(make) as backend:
        layout = new_layout()
        keys, _ = _write(backend, layout, 4)
        names = [layout.name(key) for key in keys]
        demand(backend.exists_blocking(names) == 4, "does not find all of 4 pages")
        demand(backend.exists_blocking([]) == 0, "finds pages in an empty list")
        demand(backend.delete_blocking([names[2]]) == 1, "does not say that it deleted one page")
        demand(backend.exists_blocking(names) == 2, "counts pages behind a gap")
        demand(backend.exists_blocking(names[2:]) == 0, "finds a deleted page")


def check_misses_are_values(make: Make) -> None:
    """A page that is not there is MISS, and a batch may end at it."""
    with opened(make) as backend:
        layout = new_layout()
        keys, _ = _write(backend, layout, 3)
        absent = layout.name(secrets.token_bytes(32))
        demand(backend.delete_blocking([absent]) == 0, "counts a page that was not there as deleted")
        backend.touch_blocking([absent])
        backend.delete_blocking([layout.name(keys[1])])
        outcomes = backend.read_blocking([_incoming(layout, key) for key in keys])
        demand(outcomes[:2] == [PageResult.HIT, PageResult.MISS], f"reads page, gap, page as {outcomes}")


def check_other_names_are_misses(make: Make) -> None:
    """Another model, another head range, another key: none of them finds the page."""
    with opened(make) as backend:
        layout = new_layout()
        keys, _ = _write(backend, layout, 1)
        own = layout.name(keys[0])
        for other in (
            PageName(secrets.token_hex(32), own.key, own.head_start, own.head_end),
            PageName(own.namespace, secrets.token_bytes(32), own.head_start, own.head_end),
            PageName(own.namespace, own.key, own.head_start, own.head_end + 2),
            PageName(own.namespace, own.key, own.head_end, own.head_end + 2),
        ):
            demand(backend.exists_blocking([other]) == 0, f"finds {own} under the name {other}")


def check_other_sizes_are_refused(make: Make) -> None:
    """An object of another size than asked for is no hit."""
    with opened(make) as backend:
        layout = new_layout()
        keys, _ = _write(backend, layout, 1)
        for size in (_PAGE_BYTES - 1, _PAGE_BYTES + 1, 1):
            page = _incoming(new_layout(layout.namespace, size), keys[0])
            outcomes = backend.read_blocking([page])
            demand(outcomes == [PageResult.WRONG_SIZE], f"reads {_PAGE_BYTES} bytes as {size}: {outcomes}")


def check_second_write_is_harmless(make: Make) -> None:
    """A page that is there may be written again; it stays what it is."""
    with opened(make) as backend:
        layout = new_layout()
        keys, contents = _write(backend, layout, 2)
        again = _store(backend, layout).write_blocking(keys, list(map(memoryview, contents)), b"", 0)
        demand(again.pages == 2, f"writes pages that are there with {again}")
        demand(_is_good(backend, layout, keys[1]), "loses a page that is written twice")


def check_clear_is_confined(make: Make) -> None:
    """`clear` takes all pages of one namespace and none of another."""
    with opened(make) as backend:
        mine, other = new_layout(), new_layout()
        my_keys, _ = _write(backend, mine, 3)
        other_keys, _ = _write(backend, other, 3)
        demand(backend.clear_blocking(mine.namespace) == 3, "does not count what it clears")
        demand(backend.exists_blocking([mine.name(key) for key in my_keys]) == 0, "keeps pages that were cleared")
        demand(backend.exists_blocking([other.name(key) for key in other_keys]) == 3, "clears another namespace")
        demand(backend.clear_blocking(mine.namespace) == 0, "clears twice")
        _write(backend, mine, 1)


def check_readers_see_whole_pages(make: Make) -> None:
    """While one thread deletes and writes a page, another sees it whole or not at all."""
    layout = new_layout(page_bytes=2 * CHUNK_BYTES)
    key, content = secrets.token_bytes(32), bytearray(secrets.token_bytes(2 * CHUNK_BYTES))
    with opened(make) as backend:
        writer = threading.Thread(target=_rewrite_often, args=(backend, layout, key, content))
        writer.start()
        try:
            while writer.is_alive():
                page = _incoming(layout, key)
                outcome = backend.read_blocking([page])[0]
                demand(outcome in (PageResult.HIT, PageResult.MISS), f"shows a page being written as {outcome}")
                if outcome is PageResult.HIT:
                    demand(page.judge() is Verdict.GOOD, "shows a page that is not whole")
        finally:
            writer.join()


def check_durable_pages_survive(make: Make) -> None:
    """What a durable backend says it has written is there for the next process."""
    layout = new_layout()
    with opened(make) as backend:
        keys, _ = _write(backend, layout, 2)
        durable = backend.capabilities.durable
    if durable:
        with opened(make) as backend:
            demand(_is_good(backend, layout, keys[0]), "says it is durable and forgets")


def check_tells_about_itself(make: Make) -> None:
    """`info` and `stats` are what the status pages can show."""
    with opened(make) as backend:
        info, stats = backend.info(), backend.stats()
        demand(all(type(value) is str for pair in info.items() for value in pair), f"info is {info}")
        demand(all(type(name) is str and type(value) is int for name, value in stats.items()), f"stats is {stats}")


CHECKS: tuple[Callable[[Make], None], ...] = (
    check_self_test,
    check_round_trip,
    check_exists_counts_from_the_first,
    check_misses_are_values,
    check_other_names_are_misses,
    check_other_sizes_are_refused,
    check_second_write_is_harmless,
    check_clear_is_confined,
    check_readers_see_whole_pages,
    check_durable_pages_survive,
    check_tells_about_itself,
)


@contextmanager
def opened(make: Make) -> Iterator[StorageBackend]:
    """A backend for the length of a check."""
    backend = make()
    try:
        backend.open_blocking()
        yield backend
    finally:
        backend.close_blocking()


def new_layout(namespace: str = "", page_bytes: int = _PAGE_BYTES) -> PageLayout:
    """Pages of a namespace that nobody else uses, unless one is given."""
    return PageLayout(namespace or secrets.token_hex(32), 0, 2, (Part("kv", page_bytes),))


def _store(backend: StorageBackend, layout: PageLayout) -> CheckedStore:
    return CheckedStore(backend, layout)


def _incoming(layout: PageLayout, key: bytes) -> IncomingPage:
    return IncomingPage(layout, key, memoryview(bytearray(layout.payload_bytes)))


def _write(backend: StorageBackend, layout: PageLayout, count: int) -> tuple[list[bytes], list[bytearray]]:
    """A chain of pages with random content."""
    keys = [secrets.token_bytes(32) for _ in range(count)]
    contents = [bytearray(secrets.token_bytes(layout.payload_bytes)) for _ in keys]
    result = _store(backend, layout).write_blocking(keys, list(map(memoryview, contents)), b"", 0)
    demand(result.pages == count, f"writes {result} of {count} pages")
    return keys, contents


def _rewrite_often(backend: StorageBackend, layout: PageLayout, key: bytes, content: bytearray) -> None:
    for _ in range(30):
        backend.write_blocking([OutgoingPage(layout, key, memoryview(content), b"", 0)])
        backend.delete_blocking([layout.name(key)])


def _is_good(backend: StorageBackend, layout: PageLayout, key: bytes) -> bool:
    page = _incoming(layout, key)
    outcomes: list[PageOutcome] = backend.read_blocking([page])
    return outcomes == [PageResult.HIT] and page.judge() is Verdict.GOOD


def demand(holds: bool, complaint: str) -> None:
    """Break off with what the backend does and must not do."""
    if not holds:
        raise ContractBroken(f"the backend {complaint}")
