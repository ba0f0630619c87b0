"""One Redis server: what is there, under which name, how long it stays, and who else may use it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis

from sglang_hicache.errors import StorageError
from sglang_hicache.storage import redis_facts
from sglang_hicache.storage.backend import PageResult, StorageBackend
from sglang_hicache.storage.checked import BatchResult
from sglang_hicache.storage.page_format import HEADER_BYTES
from sglang_hicache.storage.redis_wire import Line
from tests.servers.redis import RedisServer, redis_server
from tests.storage import pages
from tests.storage.conftest import Open
from tests.storage.redis_world import in_thread, incoming, look_up, name, names_on, outgoing, page_names, read, write

_MIB = 1 << 20
_PASSWORD = "geheim-wort-77"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One for all tests that break nothing."""
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(autouse=True)
def empty_server(server: RedisServer) -> None:
    """The shared one forgets what the test before has left."""
    server.run("FLUSHALL")


# What is there


def test_a_page_is_one_value_under_the_name_that_all_key_stores_use(server: RedisServer, open_backend: Open) -> None:
    backend = open_backend("redis", {"url": server.url})
    assert write(backend, 2) == BatchResult(2)
    assert names_on(server) == {name(1), name(2)}
    assert name(1) == f"hicache/{pages.NAMESPACE}/{pages.key(1).hex()}.0-2"
    stored = server.run("GET", name(1))
    assert len(stored) == HEADER_BYTES + pages.PAGE_BYTES
    assert stored[HEADER_BYTES:] == bytes(pages.content(1))


@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize(("size", "count"), [(64 << 10, 130), (_MIB, 9), (8 * _MIB + 1, 3)])
def test_large_batches_arrive_whole(
    connections: int, size: int, count: int, server: RedisServer, open_backend: Open
) -> None:
    """More pages than are asked for ahead, over one connection and over several."""
    backend = open_backend("redis", {"url": server.url, "connections": connections})
    assert write(backend, count, size=size) == BatchResult(count)
    assert read(backend, count, size=size) == BatchResult(count)
    server.run("DEL", name(2))
    assert read(backend, count, size=size) == BatchResult(1, reason="miss")
    assert read(backend, count - 2, first=3, size=size).pages == count - 2


def test_what_is_behind_a_gap_is_not_fetched(server: RedisServer, open_backend: Open) -> None:
    """Large pages are asked for two at a time: nobody needs the third one when the first is missing."""
    backend = open_backend("redis", {"url": server.url})
    size = 8 * _MIB
    write(backend, 3, first=2, size=size)
    server.run("CONFIG", "RESETSTAT")
    outcomes = backend.read_blocking([incoming(number, size) for number in (1, 2, 3, 4)])
    assert outcomes == [PageResult.MISS, PageResult.HIT]
    with server.client() as asked:
        assert asked.info("commandstats")["cmdstat_get"]["calls"] == 2


def test_databases_and_prefixes_keep_stores_apart(server: RedisServer, open_backend: Open) -> None:
    zero = open_backend("redis", {"url": server.url})
    seven = open_backend("redis", {"url": f"{server.url}/7"})
    other = open_backend("redis", {"url": server.url, "prefix": "team-b/"})
    write(zero, 2)
    assert (look_up(seven, 2), look_up(other, 2)) == (0, 0)
    write(seven, 1)
    write(other, 3)
    assert names_on(server, db=7) == {name(1)}
    assert zero.clear_blocking(pages.NAMESPACE) == 2
    assert (look_up(seven, 1), look_up(other, 3)) == (1, 3)


def test_a_socket_of_this_machine(server: RedisServer, open_backend: Open) -> None:
    backend = open_backend("redis", {"url": f"unix://{server.path}?db=3"})
    assert write(backend, 3) == read(backend, 3) == BatchResult(3)
    assert len(names_on(server, db=3)) == 3
    assert backend.info()["url"] == f"unix://{server.path}?db=3"


def test_clear_takes_the_pages_of_one_namespace_whatever_the_prefix_looks_like(
    server: RedisServer, open_backend: Open
) -> None:
    """In a pattern *, ?, [ and \\ mean more than themselves: unescaped they would take pages of others along."""
    prefix = "a*[bc]?\\"
    backend = open_backend("redis", {"url": server.url, "prefix": prefix})
    other = f"{pages.NAMESPACE[:-1]}b/{'0' * 64}.0-2"
    near = f"aXXbZ\\{name(1, '')}", f"{prefix}{pages.NAMESPACE}/notes", f"{prefix}{other}"
    for strange in near:
        server.run("SET", strange, "of somebody else")
    write(backend, 3)
    assert backend.clear_blocking(pages.NAMESPACE) == 3
    assert names_on(server) == set(near)


def test_clear_counts_thousands(server: RedisServer, open_backend: Open) -> None:
    backend = open_backend("redis", {"url": server.url})
    with server.client() as asked:
        asked.mset({name(number): b"x" for number in range(5000)} | {f"else{number}": b"x" for number in range(3000)})
    assert backend.clear_blocking(pages.NAMESPACE) == 5000
    assert len(names_on(server)) == 3000


def test_what_is_no_page_under_the_name_of_one_gives_way(server: RedisServer, open_backend: Open) -> None:
    """Somebody has put a list, and a value of another size, where pages belong."""
    backend = open_backend("redis", {"url": server.url})
    server.run("RPUSH", name(1), "a", "b")
    server.run("SET", name(2), "short")
    outcomes = backend.read_blocking([incoming(1), incoming(2)])
    assert outcomes == [PageResult.WRONG_SIZE, PageResult.WRONG_SIZE]
    assert write(backend, 2) == read(backend, 2) == BatchResult(2)
    server.run("DEL", name(1))
    server.run("RPUSH", name(1), "a", "b")
    assert read(backend, 2).corrupt == 1
    assert look_up(backend, 2) == 0, "a wrong value is found again and again"


def test_a_page_that_is_there_is_not_sent_again(server: RedisServer, open_backend: Open) -> None:
    backend = open_backend("redis", {"url": server.url})
    write(backend, 3)
    server.run("DEL", name(2))
    server.run("CONFIG", "RESETSTAT")
    outcomes = backend.write_blocking([outgoing(number) for number in (1, 2, 3)])
    assert outcomes == [PageResult.PRESENT, PageResult.WRITTEN, PageResult.PRESENT]
    with server.client() as asked:
        assert asked.info("commandstats")["cmdstat_set"]["calls"] == 1


def test_two_servers_write_one_page_at_a_time(server: RedisServer, open_backend: Open) -> None:
    """Both have asked before either has sent: the same value takes the place of the same value."""
    one, two = (open_backend("redis", {"url": server.url}) for _ in range(2))
    threads = [in_thread(lambda backend=backend: write(backend, 40, size=64 << 10)) for backend in (one, two)]
    for thread, ended in threads:
        thread.join()
        assert ended == [BatchResult(40)]
    assert read(one, 40, size=64 << 10) == BatchResult(40)


# How long pages stay


def _seconds_left(server: RedisServer, count: int) -> list[int]:
    return [server.run("TTL", name(number)) for number in range(1, count + 1)]


def test_pages_have_no_time_to_live_unless_asked_for(server: RedisServer, open_backend: Open) -> None:
    backend = open_backend("redis", {"url": server.url})
    write(backend, 2)
    backend.touch_blocking(page_names(2))
    assert _seconds_left(server, 2) == [-1, -1]


def test_a_use_makes_a_page_live_longer(server: RedisServer, open_backend: Open) -> None:
    """A touch, a second write, and a write of what hangs on the page."""
    backend = open_backend("redis", {"url": server.url, "ttl_s": 1000})
    write(backend, 3)
    assert min(_seconds_left(server, 3)) > 990

    def soon_over() -> None:
        for number in (1, 2, 3):
            server.run("EXPIRE", name(number), 100)

    soon_over()
    backend.touch_blocking(page_names(2))
    assert [left > 990 for left in _seconds_left(server, 3)] == [True, True, False]
    soon_over()
    write(backend, 2)
    assert [left > 990 for left in _seconds_left(server, 3)] == [True, True, False]
    soon_over()
    content = [pages.content(4)]
    assert pages.store(backend).write_blocking([pages.key(4)], content, pages.key(3), 3) == BatchResult(1)
    assert [left > 990 for left in _seconds_left(server, 4)] == [False, False, True, True]


def test_pages_are_touched_from_the_last_to_the_first(server: RedisServer, open_backend: Open) -> None:
    """So that a server which throws out the least recently used page never keeps a page without its parent."""
    backend = open_backend("redis", {"url": server.url})
    write(backend, 3)
    with server.client() as asked, asked.monitor() as heard:
        backend.touch_blocking(page_names(3))
        said = [heard.next_command()["command"] for _ in range(3)]
    assert said == [f"TOUCH {name(number)}" for number in (3, 2, 1)]


@pytest.mark.parametrize("more", [{"mode": "cluster"}, {"mode": "sentinel", "service_name": "pages"}])
def test_a_single_server_is_neither_a_cluster_nor_a_sentinel(
    more: dict[str, str], server: RedisServer, open_backend: Open
) -> None:
    with pytest.raises(StorageError) as caught:
        open_backend("redis", {"url": server.url, **more})
    assert (caught.value.reason, caught.value.code) == ("refused", "bad_config"), caught.value


def test_what_is_known_of_the_server_is_asked_again_while_pages_are_written(
    server: RedisServer, open_backend: Open
) -> None:
    backend = open_backend("redis", {"url": server.url})
    before = backend.stats()["used_bytes"]
    vars(backend)["_facts_due_s"] = 0.0
    write(backend, 4, size=_MIB)
    assert backend.stats()["used_bytes"] > before + 4 * _MIB


def test_a_server_that_does_not_tell_is_not_asked_with_each_write(
    server: RedisServer, open_backend: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a node of a cluster that is away: each batch would wait until it is clear that it does not answer."""
    backend = open_backend("redis", {"url": server.url})
    asked: list[redis.Redis] = []

    def ask(client: redis.Redis) -> redis_facts.ServerFacts:
        asked.append(client)
        raise redis.ConnectionError("away")

    monkeypatch.setattr(redis_facts, "facts_blocking", ask)
    vars(backend)["_facts_due_s"] = 0.0
    assert write(backend, 1) == write(backend, 1, first=2) == BatchResult(1)
    assert len(asked) == 1


def test_what_a_server_says_of_its_memory_may_be_no_number() -> None:
    told = SimpleNamespace(info=lambda: {"maxmemory": "much", "redis_version": "x"})
    found = redis_facts.facts_blocking(told)  # type: ignore[arg-type]
    assert (found.max_bytes, found.used_bytes, found.version) == (-1, -1, "redis x")


def test_a_number_below_nothing_is_no_count(
    server: RedisServer, open_backend: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken for one it would be a page that is there, or as many pages less that were deleted."""
    backend = open_backend("redis", {"url": server.url})
    monkeypatch.setattr(Line, "reply", lambda _: -5)
    for call in (backend.exists_blocking, backend.delete_blocking):
        with pytest.raises(StorageError, match="no number"):
            call(page_names(2))


def test_a_machine_that_starts_no_thread_more(
    server: RedisServer, open_backend: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lane does all of it: what waits for a thread would come to memory that is not ours by then."""
    backend = open_backend("redis", {"url": server.url, "connections": 3})

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert write(backend, 9, size=2 * _MIB) == read(backend, 9, size=2 * _MIB) == BatchResult(9)


def test_files_of_a_server_that_is_not_installed_are_skipped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="redis-server is not installed here"):
        RedisServer(tmp_path)


def test_both_lanes_use_a_store_at_the_same_time(server: RedisServer, open_backend: Open) -> None:
    backend: StorageBackend = open_backend("redis", {"url": server.url})
    write(backend, 20, size=64 << 10)

    def rewrite() -> None:
        for first in range(101, 181, 20):
            write(backend, 20, first=first, size=64 << 10)
            assert backend.delete_blocking([pages.layout().name(key) for key in pages.keys(20, first)]) == 20

    thread, ended = in_thread(rewrite)
    while thread.is_alive():
        assert read(backend, 20, size=64 << 10) == BatchResult(20)
        assert look_up(backend, 20) == 20
    assert ended == [None]
