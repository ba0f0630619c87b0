"""Redis keeps the contract: one server, a cluster, and the master that a sentinel names, plain and under attack."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from sglang_hicache.storage.conformance import CHECKS, Make
from sglang_hicache.storage.conformance_faults import (
    SABOTAGES,
    check_damage_at_every_byte,
    check_pages_cut_at_every_byte,
    check_sabotaged,
)
from sglang_hicache.storage.encryption import AesGcm
from tests.servers.redis import Watched, redis_cluster, redis_server, redis_with_sentinel
from tests.storage import pages

_CONFIGS = {
    "standalone": {},
    "side by side": {"connections": 3},
    "with a time to live": {"ttl_s": 3600},
    "cluster": {"mode": "cluster"},
    "sentinel": {"mode": "sentinel", "service_name": Watched.SERVICE},
}


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Where the servers of each mode are."""
    folder = tmp_path_factory.mktemp("redis")
    with (
        redis_server(folder / "one") as one,
        redis_cluster(folder) as cluster,
        redis_with_sentinel(folder) as watched,
    ):
        yield {"standalone": one.url, "cluster": cluster.url, "sentinel": watched.url}


def _maker(which: str, urls: dict[str, str]) -> Make:
    config = _CONFIGS[which]
    url = urls[str(config.get("mode", "standalone"))]
    return lambda: pages.backend("redis", config | {"url": url})


@pytest.mark.parametrize("which", _CONFIGS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_redis_keeps_the_contract(check: Callable[[Make], None], which: str, urls: dict[str, str]) -> None:
    check(_maker(which, urls))


@pytest.mark.parametrize("cipher_key", [b"", b"k" * 32], ids=["plain", "encrypted"])
@pytest.mark.parametrize("which", ["standalone", "cluster"])
@pytest.mark.parametrize(("call", "kind"), SABOTAGES)
def test_a_saboteur_costs_pages_and_nothing_else(
    which: str, call: str, kind: str, cipher_key: bytes, urls: dict[str, str]
) -> None:
    check_sabotaged(_maker(which, urls), call, kind, AesGcm(cipher_key) if cipher_key else None)


@pytest.mark.parametrize("cipher_key", [b"", b"k" * 32], ids=["plain", "encrypted"])
@pytest.mark.parametrize("check", [check_damage_at_every_byte, check_pages_cut_at_every_byte])
def test_damage_at_any_byte_is_a_miss(check: Callable[..., None], cipher_key: bytes, urls: dict[str, str]) -> None:
    check(_maker("standalone", urls), AesGcm(cipher_key) if cipher_key else None)
