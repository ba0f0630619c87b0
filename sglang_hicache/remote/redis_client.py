"""From settings to a client of a Redis or Valkey server, and from its errors to values.

Used by the storage backend and by the connectors of models, each with clients of its own.  A client may be used by
several threads at a time: each call takes a connection out of its pool.  Keys and values are bytes.  No call waits
without bound, and none is repeated here: whoever calls knows whether that helps.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    InvalidResponse,
    MaxConnectionsError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError

from sglang_hicache.errors import StorageError
from sglang_hicache.remote.redis_url import parse_redis_url

#: Everything that a call of this library raises for what the outside does.
REDIS_ERRORS = (RedisError, RedisClusterException, OSError)

#: What a server says, by its first word, where the library has no class for it or nobody would know the class.
_BY_WORD = {
    "WRONGPASS": ("refused", "wrong_password"),
    "NOAUTH": ("refused", "wrong_password"),
    "NOPERM": ("refused", "no_permission"),
    "READONLY": ("io", "read_only"),
    "OOM": ("no_space", "no_space"),
    "MISCONF": ("no_space", "no_space"),
    "NOREPLICAS": ("io", "read_only"),
    "DENIED": ("refused", "no_permission"),
}

#: What a server says that is another kind of server, or has fewer databases, than the settings say.
_WRONG_KIND = ("DB index is out of range", "unknown command", "Cluster mode is not enabled", "cluster support disabled",
    "is a node of a cluster")

_GOOD_FOR_LOG = 300
_WORD = re.compile(r"[A-Z]+\b")

#: A server repeats a command that it does not know, and that may be one with a password; the library shows its clients,
#: and with them what they were made with, where no sentinel knows the master.
_REPEATED = re.compile(r",? with args beginning with.*", re.DOTALL)
_SENTINEL_SAID = re.compile(r" - (?:\w+:)?(\w+Error)\b")


@dataclass(frozen=True, slots=True)
class Tls:
    """How a server proves who it is, and we who we are."""

    #: File of the authorities that are trusted; "": those of this machine.
    ca_file: str = ""
    #: Certificate and key that are shown to the server; "": none.
    cert_file: str = ""
    key_file: str = ""
    #: Must the certificate be for the host that was asked for?  Whose it is, is checked in any case.
    check_hostname: bool = True


@dataclass(frozen=True, slots=True)
class RedisEndpoint:
    """One server, and how long it may take.  Its repr has no secrets."""

    url: str = field(repr=False)
    #: Instead of those in the URL; "": those in the URL.
    username: str = ""
    password: str = field(default="", repr=False)
    tls: Tls = Tls()
    connect_timeout_s: float = 2.0
    #: Of every single send and receive.
    timeout_s: float = 5.0

    def place(self) -> str:
        """For an operator: no secret."""
        return parse_redis_url(self.url).place()


def connect(endpoint: RedisEndpoint) -> redis.Redis:
    """A client; it connects when it is first used.  ValueError: the URL is none."""
    where = parse_redis_url(endpoint.url)
    if where.path:
        return redis.Redis(unix_socket_path=where.path, db=where.db, **common_options(endpoint))
    return redis.Redis(host=where.host, port=where.port, db=where.db, **common_options(endpoint))


def common_options(endpoint: RedisEndpoint) -> dict[str, Any]:
    """What all connections to a server, or to the nodes of a cluster, are made with."""
    where = parse_redis_url(endpoint.url)
    return {
        "username": endpoint.username or where.username or None,
        "password": endpoint.password or where.password or None,
    } | connection_options(endpoint.tls if where.is_tls else None, endpoint.connect_timeout_s, endpoint.timeout_s)


def connection_options(tls: Tls | None, connect_timeout_s: float, timeout_s: float) -> dict[str, Any]:
    """The same without user and password; `tls`: None without it."""
    options: dict[str, Any] = {
        "socket_connect_timeout": connect_timeout_s,
        "socket_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        # Every server speaks it, and none of them sends what nobody has asked for.
        "protocol": 2,
    }
    if tls is not None:
        options |= {
            "ssl": True,
            "ssl_ca_certs": tls.ca_file or None,
            "ssl_certfile": tls.cert_file or None,
            "ssl_keyfile": tls.key_file or None,
            "ssl_cert_reqs": "required",
            "ssl_check_hostname": tls.check_hostname,
        }
    return options


def storage_error(error: BaseException, place: str) -> StorageError:
    """What an error of the library is to an operator and to the op that met it; `place`: without secrets."""
    reason, code = _judge(error)
    said = " ".join(f"{type(error).__name__}: {_text(error)}".split())[:_GOOD_FOR_LOG]
    return StorageError(f"redis at {place}: {said}", reason, code)


def _text(error: BaseException) -> str:
    """What the error says, without what it repeats."""
    if isinstance(error, MasterNotFoundError):
        return "; ".join([str(error).partition(" : ")[0], *_SENTINEL_SAID.findall(str(error))])
    return _REPEATED.sub("", str(error))


def _judge_sentinels(error: MasterNotFoundError) -> tuple[str, str]:
    """None of them could or would name the master."""
    kinds = _SENTINEL_SAID.findall(str(error))
    if "AuthenticationError" in kinds:
        return "refused", "wrong_password"
    if "TimeoutError" in kinds:
        return "io", "timeout"
    return "io", "refused" if kinds else "not_found"


def _judge(error: BaseException) -> tuple[str, str]:
    """Reason and code."""
    if isinstance(error, MasterNotFoundError):
        return _judge_sentinels(error)
    by_class: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], tuple[str, str]], ...] = (
        ((AuthenticationError, AuthenticationWrongNumberOfArgsError), ("refused", "wrong_password")),
        ((NoPermissionError, AuthorizationError), ("refused", "no_permission")),
        (OutOfMemoryError, ("no_space", "no_space")),
        (ReadOnlyError, ("io", "read_only")),
        (InvalidResponse, ("refused", "refused")),
        ((BusyLoadingError, TryAgainError, ClusterDownError, AskError, MaxConnectionsError), ("io", "")),
    )
    for link in _chain(error):
        for classes, found in by_class:
            if isinstance(link, classes):
                return found
        word = _WORD.match(str(link))
        if isinstance(link, ResponseError) and word and word[0] in _BY_WORD:
            return _BY_WORD[word[0]]
    return _judge_connection(error)


def _judge_connection(error: BaseException) -> tuple[str, str]:
    """What kept us from talking to the server at all."""
    chain = list(_chain(error))
    for link in reversed(chain):
        if isinstance(link, ssl.SSLCertVerificationError) and "not yet valid" in str(link):
            return "refused", "clock"
        if isinstance(link, ssl.SSLCertVerificationError):
            return "refused", "tls"
        # A server without TLS waits for the rest of what it takes for a command.
        if isinstance(link, ssl.SSLError) or "handshake operation timed out" in str(link):
            return "io", "tls"
        if isinstance(link, socket.gaierror):
            return "io", "wrong_host"
        if isinstance(link, FileNotFoundError):
            return "io", "not_found"
        if isinstance(link, PermissionError):
            return "refused", "no_permission"
        if isinstance(link, (TimeoutError, redis.TimeoutError)):
            return "io", "timeout"
        if isinstance(link, ConnectionError):
            return "io", "refused"
    if isinstance(error, redis.ConnectionError):
        return "io", "" if isinstance(error.__cause__ or error.__context__, OSError) else "refused"
    if any(words in str(link) for link in chain for words in _WRONG_KIND):
        return "refused", "bad_config"
    return "io", ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what was behind it."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
