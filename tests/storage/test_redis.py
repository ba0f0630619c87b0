"""One Redis server: what is there, who may use it, and what it costs when it has no room, hangs or dies."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.backend import PageResult, StorageBackend
from sglang_hicache.storage.checked import BatchResult
from sglang_hicache.storage.diagnosis import diagnose
from sglang_hicache.storage.page_format import HEADER_BYTES, IncomingPage, OutgoingPage, PageName
from sglang_hicache.storage.redis_servers import OneServer
from tests.servers.program import free_port
from tests.servers.redis import RedisServer, redis_server
from tests.storage import pages
from tests.storage.conftest import Open
from tests.storage.redis_world import in_thread, look_up, name, names_on, read, write

_MIB = 1 << 20
_PASSWORD = "geheim-wort-77"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One for all tests that break nothing."""
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One that is stopped and filled; every test finds it running, empty and without limits."""
    with redis_server(tmp_path_factory.mktemp("own"), password=_PASSWORD) as running:
        yield running


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[RedisServer]:
    """One that dies."""
    with redis_server(tmp_path, password=_PASSWORD) as running:
        yield running


@pytest.fixture
def fragile(own: RedisServer) -> Iterator[RedisServer]:
    """The second one, put in order before and after."""
    _put_in_order(own)
    yield own
    _put_in_order(own)


@pytest.fixture(autouse=True)
def empty_server(server: RedisServer) -> None:
    """The shared one forgets what the test before has left."""
    server.run("FLUSHALL")


def _put_in_order(own: RedisServer) -> None:
    own.run("REPLICAOF", "NO", "ONE")
    own.run("FLUSHALL")
    own.run("CONFIG", "SET", "maxmemory", "0", "maxmemory-policy", "noeviction")


def _config(own: RedisServer, **more: object) -> dict[str, object]:
    return {"url": own.url, "password": _PASSWORD, "timeout_s": 20.0, **more}


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
    outcomes = backend.read_blocking([_incoming(number, size) for number in (1, 2, 3, 4)])
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
    outcomes = backend.read_blocking([_incoming(1), _incoming(2)])
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
    outcomes = backend.write_blocking([_outgoing(number) for number in (1, 2, 3)])
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
    backend.touch_blocking(_names(2))
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
    backend.touch_blocking(_names(2))
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
        backend.touch_blocking(_names(3))
        said = [heard.next_command()["command"] for _ in range(3)]
    assert said == [f"TOUCH {name(number)}" for number in (3, 2, 1)]


# Who may use it


@pytest.mark.parametrize(
    "config",
    [
        {"password": _PASSWORD},
        {"password": _PASSWORD, "username": "default"},
        {"url": "redis://:{password}@127.0.0.1:{port}"},
        {"url": "redis://default:{password}@127.0.0.1:{port}/2"},
        {"url": "valkey://default:wrong@127.0.0.1:{port}", "password": _PASSWORD},
    ],
)
def test_the_right_password(config: dict[str, str], fragile: RedisServer, open_backend: Open) -> None:
    url = config.get("url", fragile.url).format(password=_PASSWORD, port=fragile.port)
    backend = open_backend("redis", config | {"url": url})
    assert write(backend, 1) == BatchResult(1)
    assert _PASSWORD not in f"{backend!r} {backend.info()} {backend.stats()}"


@pytest.mark.parametrize("config", [{}, {"password": "wrong-word-99"}, {"username": "nobody", "password": _PASSWORD}])
def test_a_wrong_password_is_told_without_it(config: dict[str, str], fragile: RedisServer, open_backend: Open) -> None:
    with pytest.raises(StorageError) as caught:
        open_backend("redis", {"url": fragile.url, **config})
    found = diagnose(caught.value, "redis")
    assert (caught.value.reason, found.code) == ("refused", "wrong_password")
    assert not any(secret in str(found) for secret in (_PASSWORD, "wrong-word-99"))
    assert fragile.url in str(found)


#: What a user of a store needs, as docs/stores/redis.md says.
_RIGHTS = "+get +set +strlen +exists +touch +expire +unlink +scan +select +ping"


@pytest.mark.parametrize("info", [True, False])
def test_a_user_with_the_least_rights(info: bool, fragile: RedisServer, open_backend: Open) -> None:
    """Whoever may not ask for the server's memory is told nothing of it, and that is all."""
    rights = [*_RIGHTS.split(), *(["+info"] if info else [])]
    fragile.run("ACL", "SETUSER", "pages", "reset", "on", f">{_PASSWORD}", "~hicache/*", "-@all", *rights)
    config = {"url": f"{fragile.url}/1", "username": "pages", "password": _PASSWORD, "ttl_s": 60}
    backend = open_backend("redis", config)
    assert pages.store(backend).self_test_blocking(0) is None
    assert write(backend, 3) == read(backend, 3) == BatchResult(3)
    backend.touch_blocking(_names(3))
    assert backend.clear_blocking(pages.NAMESPACE) == 3
    assert (backend.info()["max_memory"] == "unknown") is not info
    assert ("used_bytes" in backend.stats()) is info


@pytest.mark.parametrize("rights", ["~hicache/* +get +exists", "~other/* +@all"])
def test_a_user_without_rights(rights: str, fragile: RedisServer, open_backend: Open) -> None:
    fragile.run("ACL", "SETUSER", "guest", "reset", "on", f">{_PASSWORD}", "-@all", "+select", *rights.split())
    backend = open_backend("redis", {"url": fragile.url, "username": "guest", "password": _PASSWORD})
    with pytest.raises(StorageError) as caught:
        pages.store(backend).self_test_blocking(0)
    found = diagnose(caught.value, "redis")
    assert found.code == "no_permission", found
    assert _PASSWORD not in str(found)


# No room


def test_no_room_is_told_and_what_is_there_can_be_read(
    fragile: RedisServer, open_backend: Open, caplog: pytest.LogCaptureFixture
) -> None:
    fragile.run("CONFIG", "SET", "maxmemory", "8mb")
    backend = open_backend("redis", _config(fragile))
    assert "noeviction" in caplog.text and "allkeys-lru" in caplog.text
    result = write(backend, 12, size=_MIB)
    assert 0 < result.pages < 12 and result.reason.startswith("no_space: ")
    assert read(backend, result.pages, size=_MIB) == BatchResult(result.pages)
    assert backend.stats()["no_space_pages"] > 0
    assert backend.stats()["max_bytes"] == 8 * _MIB
    assert backend.info()["max_memory"] == "8.0 MiB"
    pages.store(backend).self_test_blocking(0)


def test_what_a_server_has_thrown_out_is_a_miss(
    fragile: RedisServer, open_backend: Open, caplog: pytest.LogCaptureFixture
) -> None:
    fragile.run("CONFIG", "SET", "maxmemory", "8mb", "maxmemory-policy", "allkeys-lru")
    backend = open_backend("redis", _config(fragile))
    assert not caplog.text
    for first in range(1, 25, 3):
        assert write(backend, 3, first=first, size=_MIB) == BatchResult(3)
    there = len(names_on(fragile))
    assert 0 < there < 24
    found = [read(backend, 1, first=number, size=_MIB) for number in range(1, 25)]
    assert sum(result.pages for result in found) == there
    assert {result.reason for result in found} == {"", "miss"}


@pytest.mark.parametrize(
    ("limit", "policy", "ttl_s", "words"),
    [
        ("64mb", "volatile-lru", 0, "give the store a ttl_s"),
        ("64mb", "volatile-lru", 600, ""),
        ("64mb", "allkeys-lfu", 0, ""),
        ("64mb", "noeviction", 600, "no page is written"),
        ("0", "noeviction", 0, "no maxmemory"),
    ],
)
def test_an_operator_hears_of_what_will_go_wrong(
    limit: str, policy: str, ttl_s: int, words: str, fragile: RedisServer, open_backend: Open,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    fragile.run("CONFIG", "SET", "maxmemory", limit, "maxmemory-policy", policy)
    with caplog.at_level(logging.WARNING):
        backend = open_backend("redis", _config(fragile, ttl_s=ttl_s))
    assert words in caplog.text and bool(words) == bool(caplog.text)
    assert backend.info()["policy"] == policy


# Servers that die, hang, or are something else


def test_a_server_that_was_killed_is_found_again(mortal: RedisServer, open_backend: Open) -> None:
    """It dies between two calls, and comes back: the connections that are left from before cost nothing."""
    backend = open_backend("redis", _config(mortal))
    write(backend, 3)
    assert read(backend, 3) == BatchResult(3)
    mortal.kill_blocking()
    try:
        with pytest.raises(StorageError) as caught:
            backend.exists_blocking(_names(3))
        assert (caught.value.reason, caught.value.code) == ("io", "refused")
        assert read(backend, 3).reason.startswith("io: ")
        assert write(backend, 3).reason.startswith("io: ")
        with pytest.raises(StorageError):
            backend.clear_blocking(pages.NAMESPACE)
    finally:
        mortal.start_blocking()
    assert look_up(backend, 3) == 0
    assert read(backend, 3).reason == "miss"
    assert write(backend, 3) == read(backend, 3) == BatchResult(3)


def test_a_server_that_was_restarted_meanwhile_costs_nothing(mortal: RedisServer, open_backend: Open) -> None:
    """Nobody has called while it was away: the first call after that has a connection whose other end is gone."""
    backend = open_backend("redis", _config(mortal))
    write(backend, 2)
    mortal.kill_blocking()
    mortal.start_blocking()
    assert backend.exists_blocking(_names(2)) == 0
    assert backend.write_blocking([_outgoing(1)]) == [PageResult.WRITTEN]
    assert backend.read_blocking([_incoming(1)]) == [PageResult.HIT]


@pytest.mark.parametrize("call", ["read", "write", "exists", "clear"])
def test_a_server_dies_within_a_call(call: str, mortal: RedisServer, open_backend: Open) -> None:
    """It was stopped, so that the call is surely under way when it dies."""
    backend = open_backend("redis", _config(mortal))
    write(backend, 4, size=_MIB)
    mortal.pause()
    calls = {
        "read": lambda: backend.read_blocking([_incoming(1, _MIB)]),
        "write": lambda: backend.write_blocking([_outgoing(9, _MIB)]),
        "exists": lambda: backend.exists_blocking(_names(4)),
        "clear": lambda: backend.clear_blocking(pages.NAMESPACE),
    }
    thread, ended = in_thread(calls[call])
    mortal.kill_blocking()
    thread.join()
    mortal.start_blocking()
    answer = ended[0][0] if isinstance(ended[0], list) else ended[0]
    assert isinstance(answer, StorageError) and answer.reason == "io", ended
    assert write(backend, 4, size=_MIB) == read(backend, 4, size=_MIB) == BatchResult(4)


def test_a_server_that_hangs_costs_no_more_than_the_timeout(fragile: RedisServer, open_backend: Open) -> None:
    """What it says when it goes on belongs to nobody: the connection was closed."""
    backend = open_backend("redis", _config(fragile, timeout_s=0.2, connect_timeout_s=0.2))
    write(backend, 2)
    fragile.pause()
    try:
        for _ in range(2):
            with pytest.raises(StorageError) as caught:
                backend.exists_blocking(_names(2))
            assert caught.value.code == "timeout"
            for outcome in (
                backend.read_blocking([_incoming(1)])[0],
                _thrown(lambda: backend.write_blocking([_outgoing(9)])),
                _thrown(lambda: backend.delete_blocking(_names(1))),
            ):
                assert isinstance(outcome, StorageError) and outcome.code == "timeout", outcome
    finally:
        fragile.go_on()
    with fragile.client() as asked:
        assert asked.ping()
    patient = open_backend("redis", _config(fragile))
    assert look_up(patient, 2) in (0, 2)
    assert write(backend, 2) == read(backend, 2) == BatchResult(2)


def test_a_replica_is_read_and_not_written(fragile: RedisServer, open_backend: Open) -> None:
    """Until it is made a master, and then the next call goes through."""
    backend = open_backend("redis", _config(fragile))
    write(backend, 2)
    fragile.run("REPLICAOF", "127.0.0.1", free_port())
    assert read(backend, 2) == BatchResult(2)
    with pytest.raises(StorageError) as caught:
        pages.store(backend).self_test_blocking(0)
    assert diagnose(caught.value, "redis").code == "read_only"
    fragile.run("REPLICAOF", "NO", "ONE")
    assert write(backend, 1, first=7) == BatchResult(1)


def test_servers_are_looked_for_anew_when_one_is_lost(
    fragile: RedisServer, open_backend: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not answer, or is no master any more; one that only complains is still the right one."""
    lost: list[str] = []
    backend = open_backend("redis", _config(fragile, timeout_s=0.3, connect_timeout_s=0.3))
    monkeypatch.setattr(OneServer, "lost", lambda _: lost.append("lost"))
    fragile.run("CONFIG", "SET", "maxmemory", "1")
    assert write(backend, 1).reason.startswith("no_space: ")
    assert lost == []
    fragile.run("REPLICAOF", "127.0.0.1", free_port())
    (outcome,) = backend.write_blocking([_outgoing(1)])
    assert isinstance(outcome, StorageError) and outcome.code == "read_only" and len(lost) == 1
    with pytest.raises(StorageError):
        backend.delete_blocking(_names(1))
    assert len(lost) == 2
    fragile.pause()
    try:
        with pytest.raises(StorageError):
            backend.exists_blocking(_names(1))
    finally:
        fragile.go_on()
    assert len(lost) == 3


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("redis://127.0.0.1:{free}", "refused"),
        ("redis://no-such-host.invalid", "wrong_host"),
        ("unix:///nowhere/redis.sock", "not_found"),
        ("{server}/9999", "bad_config"),
    ],
)
def test_a_server_that_is_not_there(url: str, code: str, server: RedisServer, open_backend: Open) -> None:
    with pytest.raises(StorageError) as caught:
        open_backend("redis", {"url": url.format(free=free_port(), server=server.url), "connect_timeout_s": 5})
    assert diagnose(caught.value, "redis").code == code, caught.value


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


def _thrown(call: object) -> object:
    """The outcome of the first page, or the fault of the whole call."""
    assert callable(call)
    try:
        return call()[0]
    except StorageError as error:
        return error


def _names(count: int) -> list[PageName]:
    return [pages.layout().name(key) for key in pages.keys(count)]


def _incoming(number: int, size: int = pages.PAGE_BYTES) -> IncomingPage:
    return IncomingPage(pages.layout(size=size), pages.key(number), pages.empty(1, size)[0])


def _outgoing(number: int, size: int = pages.PAGE_BYTES) -> OutgoingPage:
    return OutgoingPage(pages.layout(size=size), pages.key(number), pages.content(number, size), b"", 0)


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
