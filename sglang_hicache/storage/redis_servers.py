"""Which server has a page: the one there is, the one that the sentinels name, or a node of a cluster.

Used by the Redis backend from both of its lanes at the same time.  The client library knows the servers, finds them
again, and follows a page that has moved; it is asked here and nowhere else.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry
from redis.sentinel import Sentinel

from sglang_hicache.remote.redis_client import RedisEndpoint, Tls, common_options, connect, connection_options
from sglang_hicache.remote.redis_url import parse_address, parse_redis_url
from sglang_hicache.storage.redis_settings import RedisSettings

#: Names that one step of a walk through a server looks at.
_SCAN_COUNT = 1000

#: A node that did not answer is asked again by way of another one, once.
_CLUSTER_RETRIES = 1


class Group(NamedTuple):
    """Names that one server has: their numbers in the list that was asked about."""

    pool: redis.ConnectionPool
    numbers: list[int]


class Servers(ABC):
    """Where pages are."""

    def open_blocking(self) -> None:  # noqa: B027 - most connect when they are first used
        """Learn what must be known before the first page."""

    @abstractmethod
    def groups_blocking(self, names: Sequence[bytes]) -> list[Group]:
        """Who has which of these names."""

    @abstractmethod
    def follow_blocking(self, *command: bytes | int) -> Any:
        """One command about one name that its server has sent elsewhere."""

    @abstractmethod
    def nodes_blocking(self) -> list[redis.Redis]:
        """A client for each server that pages may be on."""

    @abstractmethod
    def lost(self) -> None:
        """A server did not answer, or takes no pages any more: look anew before the next call."""

    @abstractmethod
    def close_blocking(self) -> None:
        """No connection stays open."""

    def scan_blocking(self, pattern: bytes) -> Iterator[list[bytes]]:
        """All names of this pattern, some at a time; a name may come twice."""
        for client in self.nodes_blocking():
            cursor, is_over = 0, False
            while not is_over:
                cursor, names = client.scan(cursor, pattern, _SCAN_COUNT)
                is_over = cursor == 0
                if names:
                    yield names


class OneServer(Servers):
    """The server of a client, or the master that the sentinels behind this client know."""

    def __init__(self, client: redis.Redis, asked: Sequence[redis.Redis] = ()) -> None:
        self._client = client
        self._sentinels = asked

    def groups_blocking(self, names: Sequence[bytes]) -> list[Group]:
        return [Group(self._client.connection_pool, list(range(len(names))))]

    def follow_blocking(self, *command: bytes | int) -> Any:
        raise redis.ResponseError("it is a node of a cluster, and does not have all names: set mode to cluster")

    def nodes_blocking(self) -> list[redis.Redis]:
        return [self._client]

    def lost(self) -> None:
        # A connection to a master that is none any more would stay one to that server.
        self._client.connection_pool.disconnect(inuse_connections=False)

    def close_blocking(self) -> None:
        for client in (self._client, *self._sentinels):
            client.close()
            client.connection_pool.disconnect()


class Cluster(Servers):
    """The nodes of a cluster, each with the names whose hash is in its slots."""

    def __init__(self, settings: RedisSettings, endpoint: RedisEndpoint) -> None:
        self._settings = settings
        self._endpoint = endpoint
        self._client: RedisCluster | None = None
        self._lock = threading.Lock()
        self._is_stale = False

    def open_blocking(self) -> None:
        where = parse_redis_url(self._settings.url)
        first = [(where.host, where.port), *map(parse_address, self._settings.nodes)]
        options = common_options(self._endpoint) | {"retry": Retry(NoBackoff(), _CLUSTER_RETRIES)}
        nodes = [ClusterNode(host, port) for host, port in first]
        self._client = RedisCluster(startup_nodes=nodes, require_full_coverage=False, **options)

    def groups_blocking(self, names: Sequence[bytes]) -> list[Group]:
        client = self._known_blocking()
        groups: dict[str, Group] = {}
        for number, name in enumerate(names):
            node = client.get_node_from_key(name)
            if node.name not in groups:
                groups[node.name] = Group(client.get_redis_connection(node).connection_pool, [])
            groups[node.name].numbers.append(number)
        return list(groups.values())

    def follow_blocking(self, *command: bytes | int) -> Any:
        return self._known_blocking().execute_command(*command)

    def nodes_blocking(self) -> list[redis.Redis]:
        client = self._known_blocking()
        return [client.get_redis_connection(node) for node in client.get_primaries()]

    def lost(self) -> None:
        self._is_stale = True

    def close_blocking(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client.disconnect_connection_pools()

    def _known_blocking(self) -> RedisCluster:
        """The client, after it has looked who is who if somebody was lost."""
        assert self._client is not None, "the backend is not open"
        with self._lock:
            if self._is_stale:
                self._client.nodes_manager.initialize()
                self._is_stale = False
        return self._client


def make_servers(settings: RedisSettings) -> Servers:
    """Those of these settings; none is connected yet."""
    tls = Tls(settings.tls_ca_file, settings.tls_cert_file, settings.tls_key_file, settings.tls_check_hostname)
    endpoint = RedisEndpoint(
        settings.url, settings.username, settings.password, tls, settings.connect_timeout_s, settings.timeout_s
    )
    if settings.mode == "cluster":
        return Cluster(settings, endpoint)
    if settings.mode == "sentinel":
        return _behind_sentinels(settings, endpoint)
    return OneServer(connect(endpoint))


def _behind_sentinels(settings: RedisSettings, endpoint: RedisEndpoint) -> OneServer:
    where = parse_redis_url(settings.url)
    tls = endpoint.tls if where.is_tls else None
    options = connection_options(tls, settings.connect_timeout_s, settings.timeout_s) | {
        "username": settings.sentinel_username or None,
        "password": settings.sentinel_password or None,
    }
    sentinels = Sentinel(
        [(where.host, where.port), *map(parse_address, settings.nodes)],
        sentinel_kwargs=options,
        **(common_options(endpoint) | {"db": where.db}),
    )
    return OneServer(sentinels.master_for(settings.service_name), sentinels.sentinels)
