"""What the Redis backend is told: where the server is, who we are there, and how long it may take.

Used by `registry.py` in every process that checks a command; the backend gets its record ready made.  Pure.  A text
with a placeholder is checked on its rank, when it is known.  No complaint repeats a URL: it may hold a password.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from sglang_hicache.remote.redis_url import RedisUrl, address, parse_address, parse_redis_url
from sglang_hicache.storage.object_name import DEFAULT_PREFIX
from sglang_hicache.storage.placeholders import has_placeholder
from sglang_hicache.storage.settings import BackendSettings

#: Names are a prefix and 150 bytes; a server compares them all when it clears a namespace.
_LONGEST_PREFIX = 200
_TEN_YEARS_S = 10 * 365 * 86_400
_LONGEST_WAIT_S = 60.0
_MOST_CONNECTIONS = 32
_MOST_NODES = 1000

_TLS_KEYS = ("tls_ca_file", "tls_cert_file", "tls_key_file")


class RedisSettings(BackendSettings, frozen=True, kw_only=True):
    """One server, a cluster, or whatever server the sentinels call their master."""

    #: The server; of a cluster any node; of sentinels any of them.  Says also whether TLS is spoken, and the database.
    url: str = ""
    #: Instead of those in the URL; "": those in the URL.  Of servers, not of sentinels.
    username: str = ""
    password: str = ""
    mode: Literal["standalone", "cluster", "sentinel"] = "standalone"
    #: More nodes of the cluster, or more sentinels, as host:port: asked when the one in the URL does not answer.
    nodes: tuple[str, ...] = ()
    #: What the sentinels call the master; for `sentinel` alone.
    service_name: str = ""
    #: Who we are for the sentinels; "": nobody in particular.
    sentinel_username: str = ""
    sentinel_password: str = ""
    #: Absolute paths: authorities that are trusted ("": those of the machine), our certificate and its key.
    tls_ca_file: str = ""
    tls_cert_file: str = ""
    tls_key_file: str = ""
    #: Must the certificate of the server name the host of the URL?
    tls_check_hostname: bool = True
    #: In front of every name.
    prefix: str = DEFAULT_PREFIX
    #: Seconds after which a page that nobody used goes; 0: never.
    ttl_s: int = 0
    #: Seconds until a connection is there, and until the server has said or taken anything more.
    connect_timeout_s: float = 2.0
    timeout_s: float = 3.0
    #: Of one batch, to each server; look-ups and reads have as many of their own as writes.  More than one helps where
    #: a server has threads of its own for them (`io-threads`), or the network is far away.
    connections: int = 1

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_prefix()
        for key in _TLS_KEYS:
            path = msgspec.structs.asdict(self)[key]
            if path and not has_placeholder(path) and (not path.startswith("/") or "\0" in path):
                raise ValueError(f"{key}={path!r} is not allowed; it takes the absolute path of a file")
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            raise ValueError("tls_cert_file and tls_key_file go together; give both or none")
        if not self.url:
            raise ValueError("url is missing; give the server, such as redis://127.0.0.1:6379/0")
        self._check_mode()
        if not has_placeholder(self.url):
            self._check_url(parse_redis_url(self.url))

    def __repr__(self) -> str:
        return f"<RedisSettings {self.place()}>"

    def _check_ranges(self) -> None:
        if not 0 <= self.ttl_s <= _TEN_YEARS_S:
            raise ValueError(f"ttl_s={self.ttl_s} is not allowed; it takes seconds from 0 (never) to {_TEN_YEARS_S}")
        for name, seconds in (("connect_timeout_s", self.connect_timeout_s), ("timeout_s", self.timeout_s)):
            if not 0.01 <= seconds <= _LONGEST_WAIT_S:
                raise ValueError(f"{name}={seconds} is not allowed; it takes seconds, 0.01 to {_LONGEST_WAIT_S:.0f}")
        if not 1 <= self.connections <= _MOST_CONNECTIONS:
            raise ValueError(f"connections={self.connections} is not allowed; it takes 1 to {_MOST_CONNECTIONS}")

    def _check_prefix(self) -> None:
        if has_placeholder(self.prefix):
            return
        size_bytes = len(self.prefix.encode(errors="replace"))
        if not 0 < size_bytes <= _LONGEST_PREFIX or not self.prefix.isprintable():
            raise ValueError(
                f"prefix={self.prefix!r} is not allowed; it takes 1 to {_LONGEST_PREFIX} bytes that can be printed"
            )
        if self.mode == "cluster" and "{" in self.prefix:
            raise ValueError(f"prefix={self.prefix!r} has a {{: a cluster may put all pages on one node because of it")

    def _check_mode(self) -> None:
        if (self.mode == "sentinel") != bool(self.service_name):
            raise ValueError("service_name is what sentinels call their master: mode sentinel needs it, no other one")
        if self.mode != "sentinel" and (self.sentinel_username or self.sentinel_password):
            raise ValueError("sentinel_username and sentinel_password are for mode sentinel; a server takes password")
        if self.mode == "standalone" and self.nodes:
            raise ValueError("nodes is for the modes cluster and sentinel; one server is named by url alone")
        if len(self.nodes) > _MOST_NODES:
            raise ValueError(f"nodes has {len(self.nodes)} entries; it takes {_MOST_NODES} at most")
        for number, node in enumerate(self.nodes, start=1):
            if has_placeholder(node):
                continue
            try:
                parse_address(node)
            except ValueError as error:
                raise ValueError(f"nodes, entry {number}: {error}") from error

    def _check_url(self, where: RedisUrl) -> None:
        if self.mode != "standalone" and where.path:
            raise ValueError(f"url is a socket of this machine; mode {self.mode} takes host and port")
        if self.mode == "cluster" and where.db:
            raise ValueError(f"url names database {where.db}; a cluster has database 0 alone")
        if not where.is_tls and (any(msgspec.structs.asdict(self)[key] for key in _TLS_KEYS)):
            raise ValueError(f"{', '.join(_TLS_KEYS)} are for servers with TLS; their url begins with rediss://")

    def place(self) -> str:
        if has_placeholder(self.url):
            return ""
        where = parse_redis_url(self.url)
        if self.mode == "standalone":
            return where.place()
        more = "".join(f",{node}" for node in self.nodes)
        at = f"{address(where.host, where.port)}{more}"
        return f"the cluster of {at}" if self.mode == "cluster" else f"{self.service_name!r} of the sentinels {at}"
