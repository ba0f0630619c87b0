"""A Redis server that knows us not, has no room, hangs, dies, or is something else: a value, and an end in time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.backend import PageResult
from sglang_hicache.storage.checked import BatchResult
from sglang_hicache.storage.diagnosis import diagnose
from sglang_hicache.storage.redis_servers import OneServer
from tests.servers.program import free_port
from tests.servers.redis import RedisServer, redis_server
from tests.storage import pages
from tests.storage.conftest import Open
from tests.storage.redis_world import in_thread, incoming, look_up, names_on, outgoing, page_names, read, write
from tests.storage.test_dry_run import dry_run

_MIB = 1 << 20
_PASSWORD = "geheim-wort-77"


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


def _put_in_order(own: RedisServer) -> None:
    own.run("REPLICAOF", "NO", "ONE")
    own.run("FLUSHALL")
    own.run("CONFIG", "SET", "maxmemory", "0", "maxmemory-policy", "noeviction")


def _config(own: RedisServer, **more: object) -> dict[str, object]:
    return {"url": own.url, "password": _PASSWORD, "timeout_s": 20.0, **more}


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
    backend.touch_blocking(page_names(3))
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
            backend.exists_blocking(page_names(3))
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
    assert backend.exists_blocking(page_names(2)) == 0
    assert backend.write_blocking([outgoing(1)]) == [PageResult.WRITTEN]
    assert backend.read_blocking([incoming(1)]) == [PageResult.HIT]


@pytest.mark.parametrize("call", ["read", "write", "exists", "clear"])
def test_a_server_dies_within_a_call(call: str, mortal: RedisServer, open_backend: Open) -> None:
    """It was stopped, so that the call is surely under way when it dies."""
    backend = open_backend("redis", _config(mortal))
    write(backend, 4, size=_MIB)
    mortal.pause()
    calls = {
        "read": lambda: backend.read_blocking([incoming(1, _MIB)]),
        "write": lambda: backend.write_blocking([outgoing(9, _MIB)]),
        "exists": lambda: backend.exists_blocking(page_names(4)),
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
                backend.exists_blocking(page_names(2))
            assert caught.value.code == "timeout"
            for outcome in (
                backend.read_blocking([incoming(1)])[0],
                _thrown(lambda: backend.write_blocking([outgoing(9)])),
                _thrown(lambda: backend.delete_blocking(page_names(1))),
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
    (outcome,) = backend.write_blocking([outgoing(1)])
    assert isinstance(outcome, StorageError) and outcome.code == "read_only" and len(lost) == 1
    with pytest.raises(StorageError):
        backend.delete_blocking(page_names(1))
    assert len(lost) == 2
    fragile.pause()
    try:
        with pytest.raises(StorageError):
            backend.exists_blocking(page_names(1))
    finally:
        fragile.go_on()
    assert len(lost) == 3


def test_no_connection_to_a_lost_server_is_kept(fragile: RedisServer, open_backend: Open) -> None:
    """Sentinels may name another master by now: each one that is left would be found out by a fault of its own."""
    backend = open_backend("redis", _config(fragile, connections=3))

    def connections() -> int:
        with fragile.client() as asked:
            return len(asked.client_list()) - 1

    write(backend, 7, size=2 * _MIB)
    assert connections() >= 3
    fragile.run("REPLICAOF", "127.0.0.1", free_port())
    (outcome,) = backend.write_blocking([outgoing(1)])
    assert isinstance(outcome, StorageError) and outcome.code == "read_only"
    pages.wait_until(lambda: connections() == 0, "connections are kept")


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("redis://127.0.0.1:{free}", "refused"),
        ("redis://no-such-host.invalid", "wrong_host"),
        ("unix:///nowhere/redis.sock", "not_found"),
        ("{server}/9999", "bad_config"),
    ],
)
def test_a_server_that_is_not_there(url: str, code: str, fragile: RedisServer, open_backend: Open) -> None:
    with pytest.raises(StorageError) as caught:
        open_backend("redis", _config(fragile, url=url.format(free=free_port(), server=fragile.url)))
    assert diagnose(caught.value, "redis").code == code, caught.value


def _thrown(call: object) -> object:
    """The outcome of the first page, or the fault of the whole call."""
    assert callable(call)
    try:
        return call()[0]
    except StorageError as error:
        return error


@pytest.mark.parametrize(
    ("more", "step", "code"),
    [
        ({}, "", ""),
        ({"password": "wrong-word-99"}, "connect", "wrong_password"),
        ({"url": "redis://127.0.0.1:1"}, "connect", "refused"),
        ({"url": "redis://:wrong-word-99@127.0.0.1:1x"}, "connect", "bad_config"),
    ],
)
def test_a_dry_run_says_why(more: dict[str, str], step: str, code: str, fragile: RedisServer) -> None:
    """And leaves nothing on the server."""
    report = dry_run("redis", _config(fragile, **more))
    assert (report.failed_step, report.code) == (step, code), report
    assert _PASSWORD not in str(report) and "wrong-word-99" not in str(report)
    assert report.read_page_s > 0 or code
    assert fragile.run("DBSIZE") == 0
