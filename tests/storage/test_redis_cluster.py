"""A Redis cluster whose slots move and whose nodes die; a master that dies, and whose replica takes its place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.crc import key_slot

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.backend import PageResult, StorageBackend
from sglang_hicache.storage.checked import BatchResult
from sglang_hicache.storage.diagnosis import diagnose
from tests.servers.redis import (
    Cluster,
    RedisServer,
    Watched,
    answers,
    client,
    cluster_replica,
    holds,
    redis_cluster,
    redis_with_sentinel,
)
from tests.storage import pages
from tests.storage.conftest import Open
from tests.storage.redis_world import incoming, look_up, name, names_on, page_names, read, write
from tests.storage.test_dry_run import dry_run

_COUNT = 30


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three masters that stay alive."""
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(autouse=True)
def empty_cluster(cluster: Cluster) -> None:
    """Every node forgets what the test before has left."""
    for node in cluster.nodes:
        node.run("FLUSHALL")


def _open(open_backend: Open, cluster: Cluster, **more: object) -> StorageBackend:
    return open_backend("redis", {"url": cluster.url, "mode": "cluster", "timeout_s": 20.0, **more})


def _owner(cluster: Cluster, number: int) -> RedisServer:
    """Who has a page."""
    return next(node for node in cluster.nodes if name(number) in names_on(node))


def _node_id(node: RedisServer) -> str:
    return node.run("CLUSTER", "MYID").decode()


def _give_away(cluster: Cluster, slot: int, to: RedisServer) -> None:
    """All nodes are told at once, so that none hears it from another.  Nobody gives a slot away that has names."""
    for node in cluster.nodes:
        if node is not to:
            node.run("FLUSHALL")
    for node in sorted(cluster.nodes, key=lambda node: node is not to):
        node.run("CLUSTER", "SETSLOT", slot, "NODE", _node_id(to))


def test_a_node_of_a_cluster_that_is_taken_for_a_single_server(cluster: Cluster, open_backend: Open) -> None:
    """It has a third of the names: an operator hears what to set, from a dry run too."""
    with pytest.raises(StorageError, match="set mode to cluster") as caught:
        look_up(open_backend("redis", {"url": cluster.url}), _COUNT)
    assert (caught.value.reason, caught.value.code) == ("refused", "bad_config")
    reports = (dry_run("redis", {"url": cluster.url}) for _ in range(100))  # chance puts its page on any of the nodes
    assert next(report.code for report in reports if report.failed_step) == "bad_config"


def test_pages_are_spread_and_found(cluster: Cluster, open_backend: Open) -> None:
    backend = _open(open_backend, cluster)
    assert write(backend, _COUNT) == read(backend, _COUNT) == BatchResult(_COUNT)
    assert look_up(backend, _COUNT) == _COUNT
    assert all(names_on(node) for node in cluster.nodes), "a node has nothing"
    assert backend.info()["servers"] == "3"
    _owner(cluster, 17).run("DEL", name(17))
    assert look_up(backend, _COUNT) == 16
    assert read(backend, _COUNT) == BatchResult(16, reason="miss")
    assert backend.clear_blocking(pages.NAMESPACE) == _COUNT - 1
    assert not any(names_on(node) for node in cluster.nodes)


def test_any_node_leads_to_the_others(cluster: Cluster, open_backend: Open) -> None:
    """The node of the URL is gone; another one of the list answers."""
    host, ports = "127.0.0.1", [node.port for node in cluster.nodes]
    dead = {"url": f"redis://{host}:1", "mode": "cluster"}
    with pytest.raises(StorageError) as caught:
        open_backend("redis", dead)
    assert diagnose(caught.value, "redis").code == "refused"
    backend = open_backend("redis", dead | {"nodes": [f"{host}:2", f"{host}:{ports[2]}"]})
    assert write(backend, _COUNT) == BatchResult(_COUNT)


def test_a_slot_that_has_moved_is_followed_and_learnt(cluster: Cluster, open_backend: Open) -> None:
    """The backends know the old owner, which names the new one for each page: at first they go the long way."""
    writer, reader = (_open(open_backend, cluster, ttl_s=600) for _ in range(2))
    write(writer, _COUNT)
    slot, old = key_slot(name(5).encode()), _owner(cluster, 5)
    new = next(node for node in cluster.nodes if node is not old)
    _give_away(cluster, slot, new)
    try:
        for backend, calls in ((writer, (write, read)), (reader, (read, write))):
            for call in calls:
                assert call(backend, _COUNT) == BatchResult(_COUNT), call
            learnt = _redirected(backend)
            assert learnt > 0
            assert read(backend, _COUNT) == BatchResult(_COUNT)
            assert _redirected(backend) == learnt, "the new owner is not remembered"
        assert name(5) in names_on(new)
        assert 500 < new.run("TTL", name(5)) <= 600
    finally:
        _give_away(cluster, slot, old)


def _redirected(backend: StorageBackend) -> int:
    stats = backend.stats()
    return stats.get("redirected_commands", 0) + stats.get("redirected_pages", 0)


def test_a_slot_that_is_on_its_way_is_asked_for_at_both_ends(cluster: Cluster, open_backend: Open) -> None:
    backend = _open(open_backend, cluster)
    write(backend, 9)
    slot, old = key_slot(name(5).encode()), _owner(cluster, 5)
    new = next(node for node in cluster.nodes if node is not old)
    new.run("CLUSTER", "SETSLOT", slot, "IMPORTING", _node_id(old))
    old.run("CLUSTER", "SETSLOT", slot, "MIGRATING", _node_id(new))
    try:
        assert read(backend, 9) == BatchResult(9)
        old.run("MIGRATE", "127.0.0.1", new.port, name(5), 0, 5000)
        assert name(5) not in names_on(old)
        assert read(backend, 9) == BatchResult(9)
        assert backend.delete_blocking([pages.layout().name(pages.key(5))]) == 1
        outcomes = pages.store(backend).write_blocking(pages.keys(9), [pages.content(n) for n in range(1, 10)], b"", 0)
        assert outcomes == BatchResult(9)
        assert read(backend, 9) == BatchResult(9)
    finally:
        for owner in (new, old):
            old.run("FLUSHALL")
            _give_away(cluster, slot, owner)


def test_the_least_rights_in_a_cluster(cluster: Cluster, open_backend: Open) -> None:
    """As docs/stores/redis.md says."""
    rights = "+get +set +strlen +exists +touch +expire +unlink +scan +select +ping +cluster|slots +command +asking"
    for node in cluster.nodes:
        node.run("ACL", "SETUSER", "pages", "reset", "on", ">geheim-3", "~hicache/*", "-@all", *rights.split())
    backend = _open(open_backend, cluster, username="pages", password="geheim-3")
    assert write(backend, _COUNT) == read(backend, _COUNT) == BatchResult(_COUNT)
    assert backend.clear_blocking(pages.NAMESPACE) == _COUNT
    assert backend.info()["max_memory"] == "unknown"


def test_a_node_dies_and_comes_back(tmp_path: Path, open_backend: Open) -> None:
    """Its pages are a fault of the call, those of the others stay; when it is back, the next call goes through."""
    with redis_cluster(tmp_path) as mortal:
        backend = _open(open_backend, mortal)
        write(backend, _COUNT)
        lost = _owner(mortal, 5)
        gone = {number for number in range(1, _COUNT + 1) if name(number) in names_on(lost)}
        lost.kill_blocking()
        first = min(gone)
        for _ in range(3):
            result = read(backend, _COUNT)
            assert result.pages == first - 1 and result.reason.startswith("io: "), result
            with pytest.raises(StorageError) as caught:
                backend.exists_blocking(page_names(_COUNT))
            assert caught.value.reason == "io"
        there = [number for number in range(1, _COUNT + 1) if number not in gone]
        assert [read(backend, 1, first=number).pages for number in there] == [1] * len(there)
        lost.start_blocking()
        pages.wait_until(lambda: b"cluster_state:ok" in lost.run("CLUSTER", "INFO"), "the node does not come back")
        assert write(backend, _COUNT) == read(backend, _COUNT) == BatchResult(_COUNT)


@pytest.mark.long
def test_a_replica_takes_the_place_of_a_node(tmp_path: Path, open_backend: Open) -> None:
    """The backend has never heard of the replica as an owner: after a fault it asks again who has what."""
    hasty = ("--cluster-node-timeout", "1000", "--repl-diskless-sync-delay", "0")
    with redis_cluster(tmp_path, 1, *hasty) as alone, cluster_replica(tmp_path, alone) as replica:
        reader, writer = _open(open_backend, alone), _open(open_backend, alone)
        write(writer, _COUNT)
        pages.wait_until(lambda: len(names_on(replica)) == _COUNT, "the replica does not follow")
        alone.nodes[0].kill_blocking()
        with pytest.raises(StorageError) as caught:
            reader.exists_blocking(page_names(_COUNT))
        assert caught.value.reason == "io"
        assert read(writer, 1).reason.startswith("io: ")
        replica.run("CLUSTER", "FAILOVER", "TAKEOVER")
        assert reader.exists_blocking(page_names(_COUNT)) == _COUNT
        assert write(writer, _COUNT + 3) == read(writer, _COUNT + 3) == BatchResult(_COUNT + 3)


# Sentinel


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    """A master that may die."""
    with redis_with_sentinel(tmp_path, sentinel_password="waechter-5") as running:
        yield running


def _sentinel_config(watched: Watched, **more: object) -> dict[str, object]:
    return {
        "url": watched.url, "mode": "sentinel", "service_name": Watched.SERVICE, "sentinel_password": "waechter-5",
        "timeout_s": 1.0, **more,
    }  # fmt: skip


def test_the_replica_takes_the_place_of_its_master(watched: Watched, open_backend: Open) -> None:
    """While nobody is master every call is a fault; after that the next call finds the new one, with the old pages."""
    backend = open_backend("redis", _sentinel_config(watched))
    assert write(backend, 9) == read(backend, 9) == BatchResult(9)
    pages.wait_until(lambda: len(names_on(watched.replica)) == 9, "the replica does not follow")
    watched.master.kill_blocking()
    with pytest.raises(StorageError) as caught:
        backend.exists_blocking(page_names(9))
    assert caught.value.reason == "io"
    watched.wait_for_failover_blocking()
    assert read(backend, 9) == BatchResult(9)
    assert write(backend, 3, first=100) == BatchResult(3)
    assert {name(100), name(101), name(102)} <= names_on(watched.replica)


def test_a_master_that_hangs_is_left_for_its_replica(watched: Watched, open_backend: Open) -> None:
    """Its connections are open and say nothing; when it goes on, and is no master any more, it gets no page of ours."""
    backend = open_backend("redis", _sentinel_config(watched, timeout_s=0.3, connect_timeout_s=0.3))
    write(backend, 3)
    watched.master.pause()
    try:
        pages.wait_until(lambda: write(backend, 3, first=50).pages == 3, "the new master is not found")
    finally:
        watched.master.go_on()
    assert write(backend, 3, first=60) == BatchResult(3)
    assert name(60) in names_on(watched.replica)


@pytest.mark.long
def test_a_master_that_steps_down_is_left(watched: Watched, open_backend: Open) -> None:
    """A failover that an operator has asked for: connections to the old master would only hear READONLY."""
    backend = open_backend("redis", _sentinel_config(watched))
    write(backend, 3)
    with client(watched.sentinel_port, password="waechter-5") as asked:
        order = lambda: asked.execute_command("SENTINEL", "FAILOVER", Watched.SERVICE)  # noqa: E731
        pages.wait_until(lambda: answers(order), "the sentinel finds no replica good enough")
    arrived = holds(lambda: name(50) in names_on(watched.replica))
    pages.wait_until(lambda: write(backend, 3, first=50).pages == 3 and arrived(), "the new master is not found")


@pytest.mark.parametrize(
    ("more", "code"),
    [({"sentinel_password": "falsch-9"}, "wrong_password"), ({"service_name": "other"}, "not_found")],
)
def test_sentinels_that_do_not_say(more: dict[str, str], code: str, watched: Watched, open_backend: Open) -> None:
    with pytest.raises(StorageError) as caught:
        open_backend("redis", _sentinel_config(watched) | more)
    found = diagnose(caught.value, "redis")
    assert found.code == code, found
    assert "falsch-9" not in str(found) and "waechter-5" not in str(found)


def test_another_sentinel_of_the_list_is_asked(watched: Watched, open_backend: Open) -> None:
    more = {"url": "redis://127.0.0.1:1/2", "nodes": [f"127.0.0.1:{watched.sentinel_port}"]}
    backend = open_backend("redis", _sentinel_config(watched) | more)
    assert backend.write_blocking([]) == []
    assert write(backend, 1) == BatchResult(1)
    assert names_on(watched.master, db=2) == {name(1)}
    assert backend.read_blocking([]) == []
    assert PageResult.HIT in backend.read_blocking([incoming(1)])
