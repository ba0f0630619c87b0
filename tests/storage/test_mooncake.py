"""The Mooncake backend over a master and a holder: where pages lie, whose they are, and what dies on the way."""

from __future__ import annotations

import re
import secrets
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sglang_hicache.cache.pools import HostPool
from sglang_hicache.errors import StorageError
from sglang_hicache.storage import registry
from sglang_hicache.storage.backend import OpenContext, PageResult, StorageBackend
from sglang_hicache.storage.page_format import HEADER_BYTES, IncomingPage, OutgoingPage, PageLayout
from tests.servers.mooncake import Mooncake, needs_mooncake, warm_up
from tests.servers.program import free_port
from tests.storage import pages

needs_mooncake()

from sglang_hicache.storage.mooncake import MooncakeBackend  # noqa: E402 - it imports the library
from sglang_hicache.storage.mooncake_memory import LEAST_DIRECT_BYTES  # noqa: E402 - as above

_PAGE_BYTES = LEAST_DIRECT_BYTES
_WAIT = {"connect_timeout_s": 0.5, "timeout_s": 1.0}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mooncake]:
    """A store that the tests of this file share; and the library's own threads and descriptors, which stay."""
    with Mooncake(tmp_path_factory.mktemp("mooncake")) as started:
        warm_up(started)
        yield started


@pytest.fixture
def make(store: Mooncake) -> Iterator[Callable[..., MooncakeBackend]]:
    """Opens backends and closes them after the test."""
    opened: list[StorageBackend] = []

    def make_one(pool: HostPool | None = None, **config: object) -> MooncakeBackend:
        _, settings = registry.validate_extra_config("mooncake", pages.text(store.config(**_WAIT, **config)))
        memory = pool.buffer if pool else None
        context = OpenContext(rank=0, namespace=pages.NAMESPACE, page_bytes=_PAGE_BYTES, host_memory=memory)
        backend = registry.create("mooncake", settings, context)
        opened.append(backend)
        backend.open_blocking()
        return backend

    yield make_one
    for backend in opened:
        backend.close_blocking()


def new_layout(size: int = pages.PAGE_BYTES) -> PageLayout:
    """Pages of a namespace that no other test has."""
    return pages.layout(secrets.token_hex(32), size=size)


def outgoing(layout: PageLayout, count: int, first: int = 1) -> list[OutgoingPage]:
    """Pages to be written."""
    return [
        OutgoingPage(layout, pages.key(number), pages.content(number, layout.payload_bytes), b"", 0)
        for number in range(first, first + count)
    ]


def incoming(layout: PageLayout, count: int, first: int = 1) -> list[IncomingPage]:
    """Places for the same pages."""
    return [
        IncomingPage(layout, pages.key(number), memoryview(bytearray(layout.payload_bytes)))
        for number in range(first, first + count)
    ]


def names(layout: PageLayout, count: int, first: int = 1) -> list:
    """Their names."""
    return [page.name for page in incoming(layout, count, first)]


def test_pages_of_the_host_pool_travel_in_place_and_others_by_a_copy(make: Callable[..., MooncakeBackend]) -> None:
    layout = new_layout(_PAGE_BYTES)
    with HostPool(6, _PAGE_BYTES) as pool:
        backend = make(pool)
        for number in range(3):
            pool.page(number)[:] = pages.content(number, _PAGE_BYTES)
        inside = [OutgoingPage(layout, pages.key(number), pool.page(number), b"", 0) for number in range(3)]
        outside = outgoing(layout, 2, first=3)
        assert backend.write_blocking([*inside, *outside]) == [PageResult.WRITTEN] * 5
        assert (backend.stats()["direct_pages"], backend.stats()["staged_pages"]) == (3, 2)
        back = [IncomingPage(layout, pages.key(number), pool.page(5 - number)) for number in range(3)]
        back += incoming(layout, 2, first=3)
        assert backend.read_blocking(back) == [PageResult.HIT] * 5
        assert (backend.stats()["direct_pages"], backend.stats()["staged_pages"]) == (6, 4)
        assert all(page.judge().value == "good" for page in back)
        assert [bytes(page.payload) for page in back] == [bytes(pages.content(n, _PAGE_BYTES)) for n in range(5)]
        backend.close_blocking()
        del inside, back  # a pool with live views cannot close: the backend must not have kept one


def test_a_long_batch_is_cut_into_calls_and_keeps_its_order(make: Callable[..., MooncakeBackend]) -> None:
    backend, layout = make(local_buffer_size=20_000), new_layout()
    assert backend.write_blocking(outgoing(layout, 150)) == [PageResult.WRITTEN] * 150
    assert backend.exists_blocking(names(layout, 151)) == 150
    found = incoming(layout, 150)
    assert backend.read_blocking(found) == [PageResult.HIT] * 150
    assert [bytes(page.payload) for page in found] == [bytes(pages.content(n)) for n in range(1, 151)]


def test_a_page_that_is_there_is_not_written_again(make: Callable[..., MooncakeBackend]) -> None:
    backend, layout = make(), new_layout()
    assert backend.write_blocking(outgoing(layout, 2, first=2)) == [PageResult.WRITTEN] * 2
    there = [PageResult.WRITTEN, PageResult.PRESENT, PageResult.PRESENT, PageResult.WRITTEN]
    assert backend.write_blocking(outgoing(layout, 4)) == there
    assert backend.stats()["staged_pages"] == 4


def test_an_object_of_another_size_gives_way_to_a_page_and_is_never_read(make: Callable[..., MooncakeBackend]) -> None:
    """The library answers "written" for a name that is taken, whatever lies there."""
    backend, layout = make(), new_layout()
    for size in (1000, pages.PAGE_BYTES + 1000):
        assert backend.write_blocking(outgoing(pages.layout(layout.namespace, size=size), 1)) == [PageResult.WRITTEN]
        room = bytearray(b"x" * (pages.PAGE_BYTES + 2000))
        page = IncomingPage(layout, pages.key(1), memoryview(room)[1000 : 1000 + pages.PAGE_BYTES])
        assert backend.read_blocking([page]) == [PageResult.WRONG_SIZE]
        assert set(room[:1000]) == set(room[-1000:]) == {ord("x")}, "wrote beside the page"
        assert backend.write_blocking(outgoing(layout, 1)) == [PageResult.WRITTEN]
        assert backend.read_blocking(incoming(layout, 1)) == [PageResult.HIT]
        assert backend.delete_blocking(names(layout, 1)) == 1


def test_a_page_that_somebody_has_begun_to_write_is_neither_there_nor_written(
    make: Callable[..., MooncakeBackend],
) -> None:
    """A server died in the middle of a write.  The library says "written" to the next one that writes this page."""
    backend, layout = make(), new_layout()
    second = names(layout, 2)[1]
    key = f"hicache/{second.namespace}/{second.key.hex()}.{second.head_start}-{second.head_end}"
    raw = backend._client._store
    assert raw.batch_put_session_start([key], [HEADER_BYTES + pages.PAGE_BYTES]) == [0]
    first, lost = backend.write_blocking(outgoing(layout, 3))
    assert first is PageResult.WRITTEN
    assert isinstance(lost, StorageError) and lost.reason == "io" and "somebody else is writing it" in str(lost)
    assert backend.exists_blocking(names(layout, 3)) == 1
    assert backend.read_blocking(incoming(layout, 2)) == [PageResult.HIT, PageResult.MISS]
    assert backend.delete_blocking(names(layout, 2)) == 1


def test_what_was_just_read_can_be_removed(make: Callable[..., MooncakeBackend]) -> None:
    """The master lends what was read to its reader for ten seconds; a corrupt page must go all the same."""
    backend, layout = make(), new_layout()
    backend.write_blocking(outgoing(layout, 2))
    assert backend.read_blocking(incoming(layout, 2)) == [PageResult.HIT] * 2
    assert backend.set_aside_blocking(names(layout, 1)[0]) is True
    assert backend.delete_blocking(names(layout, 3)) == 1


def test_clear_takes_a_prefix_for_what_it_is_and_no_pattern(make: Callable[..., MooncakeBackend]) -> None:
    layout = new_layout()
    odd, plain = make(prefix="a.b[c]+(d)|/"), make(prefix="aXb[c]+(d)|/")
    tagged = make(prefix="a.b[c]+(d)|/", extra_backend_tag="two")
    for backend in (odd, plain, tagged):
        assert backend.write_blocking(outgoing(layout, 3)) == [PageResult.WRITTEN] * 3
    assert odd.clear_blocking(layout.namespace) == 3
    assert odd.exists_blocking(names(layout, 1)) == 0
    for backend in (plain, tagged):
        assert backend.exists_blocking(names(layout, 3)) == 3
        assert backend.clear_blocking(layout.namespace) == 3


_OTHER_SERVER = """
    import json, sys
    from tests.storage import pages
    backend = pages.backend("mooncake", json.loads(sys.argv[1]))
    backend.open_blocking()
    store = pages.store(backend, namespace=sys.argv[2])
    read = store.read_blocking(pages.keys(3), targets := pages.empty(3))
    assert read.pages == 3, read
    assert [bytes(found) for found in targets] == [bytes(pages.content(number)) for number in (1, 2, 3)]
    written = store.write_blocking(pages.keys(2, 4), [pages.content(4), pages.content(5)], pages.key(3), 3)
    assert written.pages == 2, written
    backend.close_blocking()
    print("well")
"""


def test_two_processes_read_what_the_other_has_written(
    make: Callable[..., MooncakeBackend], store: Mooncake, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two servers share a store; what one wrote is there when it has gone.  Nothing of the library reaches the log."""
    layout = new_layout()
    mine = pages.store(make(), namespace=layout.namespace)
    contents = [pages.content(number) for number in (1, 2, 3)]
    assert mine.write_blocking(pages.keys(3), contents, b"", 0).pages == 3
    other = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_OTHER_SERVER), pages.text(store.config(**_WAIT)), layout.namespace],
        capture_output=True, text=True, timeout=pages.PATIENCE_S, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert (other.returncode, other.stdout, other.stderr) == (0, "well\n", "")
    assert mine.lookup_blocking(pages.keys(5)) == 5
    assert mine.read_blocking(pages.keys(5), pages.empty(5)).pages == 5
    assert capfd.readouterr() == ("", "")


def test_memory_that_this_process_lends_goes_with_it(tmp_path: Path, store: Mooncake) -> None:
    """`store`: the library has its threads already."""
    with Mooncake(tmp_path) as own:
        own.holder.kill_blocking()
        own.kill_blocking()
        own.master.start_blocking()
        lender = pages.backend("mooncake", own.config(**_WAIT, global_segment_size="17MB"))
        lender.open_blocking()
        try:
            assert lender.info()["lends"] == "32.0 MiB, whose pages go when it detaches"
            assert not lender.capabilities.durable
            checked = pages.store(lender)
            assert checked.write_blocking(pages.keys(2), [pages.content(1), pages.content(2)], b"", 0).pages == 2
            assert checked.read_blocking(pages.keys(2), pages.empty(2)).pages == 2
        finally:
            lender.close_blocking()
        user = pages.backend("mooncake", own.config(**_WAIT))
        user.open_blocking()
        try:
            assert pages.store(user).lookup_blocking(pages.keys(2)) == 0
            result = pages.store(user).write_blocking(pages.keys(1), [pages.content(1)], b"", 0)
            assert result.pages == 0 and result.reason.startswith("no_space: ") and "nobody lends" in result.reason
            assert user.stats()["no_space_pages"] == 1
        finally:
            user.close_blocking()


def test_nobody_at_the_address_of_the_master_is_said_at_once() -> None:
    for address, code in ((f"127.0.0.1:{free_port()}", ""), ("no-such-host.invalid:50051", "wrong_host")):
        backend = pages.backend("mooncake", {"master_server_address": address, **_WAIT})
        with pytest.raises(
            StorageError, match=f"the master of mooncake at {re.escape(address)} cannot be reached"
        ) as met:
            backend.open_blocking()
        backend.close_blocking()
        assert (met.value.reason, met.value.code) == ("refused", code)
        assert isinstance(met.value.__cause__, OSError)


def test_what_is_no_master_is_named_when_the_client_cannot_be_set_up() -> None:
    """Somebody listens at the address and says nothing: another program, or a master that hangs."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        backend = pages.backend("mooncake", {"master_server_address": address, **_WAIT})
        began_s = time.monotonic()
        with pytest.raises(
            StorageError, match=f"what answers at {re.escape(address)} may be no master, or one that hangs"
        ):
            backend.open_blocking()
        assert time.monotonic() - began_s < 30.0, "an attach has no more"
        backend.close_blocking()


def test_a_transport_that_the_library_does_not_know_is_refused(store: Mooncake) -> None:
    backend = pages.backend("mooncake", store.config(**_WAIT, protocol="carrier_pigeon"))
    with pytest.raises(StorageError, match="could not be set up: internal error .* protocol='carrier_pigeon'") as met:
        backend.open_blocking()
    backend.close_blocking()
    assert (met.value.reason, met.value.code) == ("refused", "bad_config")


def test_a_master_that_hangs_or_dies_or_is_started_again_costs_calls_and_no_attach(
    tmp_path: Path, store: Mooncake
) -> None:
    """`store`: the library has its threads already.  Bounds are those that only a failing test meets, and the master
    does not give the holder up while it hangs itself."""
    with Mooncake(tmp_path, "--client_ttl=60") as own:
        backend = pages.backend("mooncake", own.config(**_WAIT))
        backend.open_blocking()
        try:
            checked, layout = pages.store(backend), pages.layout()
            assert checked.write_blocking(pages.keys(2), [pages.content(1), pages.content(2)], b"", 0).pages == 2
            own.master.pause()
            _fails(backend, layout, "timed out")
            own.master.go_on()
            assert checked.read_blocking(pages.keys(2), pages.empty(2)).pages == 2
            own.master.kill_blocking()
            _fails(backend, layout, "cannot be reached")
            own.master.start_blocking()
            pages.wait_until(lambda: _writes(checked), "the holder did not come back to the master")
            assert checked.read_blocking(pages.keys(1), pages.empty(1)).pages == 1
            assert checked.lookup_blocking(pages.keys(2)) == 1, "the new master has forgotten the second page"
        finally:
            backend.close_blocking()


def test_a_holder_that_hangs_or_dies_costs_its_pages(tmp_path: Path, store: Mooncake) -> None:
    """`store`: the library has its threads already."""
    with Mooncake(tmp_path, "--client_ttl=5") as own:
        backend = pages.backend("mooncake", own.config(**_WAIT))
        backend.open_blocking()
        try:
            layout = pages.layout()
            assert backend.write_blocking(outgoing(layout, 8)) == [PageResult.WRITTEN] * 8
            own.holder.pause()
            began_s = time.monotonic()
            for _ in range(2):
                outcomes = backend.read_blocking(incoming(layout, 8))
                assert [_is_io(outcome) for outcome in outcomes] == [True]
            assert time.monotonic() - began_s < 60.0
            own.holder.kill_blocking()
            pages.wait_until(lambda: backend.exists_blocking(names(layout, 1)) == 0, "the master keeps what is gone")
            assert backend.read_blocking(incoming(layout, 1)) == [PageResult.MISS]
            own.holder.start_blocking()
            pages.wait_until(lambda: _writes(pages.store(backend)), "nobody takes pages")
            assert backend.read_blocking(incoming(layout, 1)) == [PageResult.HIT]
        finally:
            backend.close_blocking()


def _fails(backend: MooncakeBackend, layout: PageLayout, words: str) -> None:
    """Every call says so, in the time it may take."""
    for call in (
        lambda: backend.exists_blocking(names(layout, 1)),
        lambda: _raise_first(backend.read_blocking(incoming(layout, 1))),
        lambda: _raise_first(backend.write_blocking(outgoing(layout, 1, first=9))),
        lambda: backend.delete_blocking(names(layout, 1, first=9)),
        lambda: backend.clear_blocking("0" * 64),
    ):
        began_s = time.monotonic()
        with pytest.raises(StorageError, match=words) as met:
            call()
        assert met.value.reason == "io"
        assert time.monotonic() - began_s < 30.0


def _raise_first(outcomes: list) -> None:
    if isinstance(outcomes[0], StorageError):
        raise outcomes[0]


def _is_io(outcome: object) -> bool:
    return isinstance(outcome, StorageError) and outcome.reason == "io"


def _writes(checked: object) -> bool:
    return checked.write_blocking(pages.keys(1), [pages.content(1)], b"", 0).pages == 1
