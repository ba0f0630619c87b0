"""What a Redis server says of itself, and what an operator should know of it before the store is relied upon.

Asked when a store is opened, and now and then by the lane that writes.  A user who may not ask is told nothing, and
nothing is taken for granted then.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import redis
from redis.exceptions import NoPermissionError

from sglang_hicache.storage.capacity import size_text

UNKNOWN = "unknown"

#: Of a server whose administrator has taken the command away.
_UNKNOWN_INFO = re.compile("unknown command .info", re.IGNORECASE)

_LRU = "set maxmemory-policy allkeys-lru there, unless something else on it must never go"


class ServerFacts(NamedTuple):
    """One server; all of them unknown: it does not tell this user."""

    version: str = UNKNOWN
    #: 0: as much as the machine has.  -1: unknown, and so is the next one.
    max_bytes: int = -1
    used_bytes: int = -1
    #: What goes when there is no room.
    policy: str = UNKNOWN


def facts_blocking(client: redis.Redis) -> ServerFacts:
    """Ask one server.  Errors of the connection come out; a server that refuses to tell is no error."""
    try:
        told = client.info()
    except redis.ResponseError as error:
        if isinstance(error, NoPermissionError) or _UNKNOWN_INFO.search(str(error)):
            return ServerFacts()
        raise
    name = "valkey" if "valkey_version" in told else "redis"
    version = told.get("valkey_version") or told.get("redis_version") or UNKNOWN
    return ServerFacts(
        f"{name} {version}",
        _bytes(told.get("maxmemory")),
        _bytes(told.get("used_memory")),
        str(told.get("maxmemory_policy", UNKNOWN)),
    )


def _bytes(value: object) -> int:
    """What is no number is unknown."""
    return value if isinstance(value, int) else -1


def shown(facts: Sequence[ServerFacts]) -> dict[str, str]:
    """For the status pages."""
    found = {
        "server": ", ".join(sorted({server.version for server in facts})),
        "policy": ", ".join(sorted({server.policy for server in facts})),
        "max_memory": _memory(facts),
    }
    return found | ({"servers": str(len(facts))} if len(facts) != 1 else {})


def counted(facts: Sequence[ServerFacts]) -> dict[str, int]:
    """For the counters: bytes of all servers, of whoever uses them; nothing that is unknown."""
    used, most = [server.used_bytes for server in facts], [server.max_bytes for server in facts]
    found: dict[str, int] = {}
    if used and min(used) >= 0:
        found["used_bytes"] = sum(used)
    if most and min(most) > 0:
        found["max_bytes"] = sum(most)
    return found


def warnings(facts: Sequence[ServerFacts], place: str, ttl_s: int) -> list[str]:
    """What will go wrong with these servers once they are full, and what to set instead."""
    said = {_warning(server, ttl_s) for server in facts} - {""}
    return [f"redis at {place} {words}" for words in sorted(said)]


def _warning(server: ServerFacts, ttl_s: int) -> str:
    if server.max_bytes == 0:
        return f"has no maxmemory: pages fill the memory of its machine; set maxmemory to what it may use, and {_LRU}"
    if server.max_bytes < 0:
        return ""
    size = size_text(server.max_bytes)
    if server.policy == "noeviction":
        return f"holds {size} and throws nothing out (noeviction): when it is full, no page is written; {_LRU}"
    if server.policy.startswith("volatile-") and not ttl_s:
        return (
            f"throws out only what has a time to live ({server.policy}), and pages have none: when its {size} are "
            f"full, no page is written; give the store a ttl_s, or {_LRU}"
        )
    return ""


def _memory(facts: Sequence[ServerFacts]) -> str:
    if any(server.max_bytes < 0 for server in facts):
        return UNKNOWN
    if any(server.max_bytes == 0 for server in facts):
        return "no limit"
    return size_text(sum(server.max_bytes for server in facts))
