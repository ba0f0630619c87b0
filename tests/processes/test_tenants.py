"""Tenants of a real server, over HTTP: `extra_key` and `cache_salt` on every route that generates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes.server import Server, cached

TEXT = "The list of all the names that are defined in the module, sorted, with a line for each of them. " * 3
TENANTS: tuple[dict[str, str], ...] = (
    {}, {"extra_key": "a"}, {"cache_salt": "a"}, {"extra_key": "a", "cache_salt": "bc"},
    {"extra_key": "ab", "cache_salt": "c"},
)  # fmt: skip


def flags(store: Path) -> tuple[str, ...]:
    extra = json.dumps({"file_storage_path": str(store), "prefetch_threshold": 16})
    return (
        "--page-size", "16", "--max-total-tokens", "4096", "--enable-hierarchical-cache", "--enable-cache-report",
        "--hicache-storage-backend", "file", "--hicache-storage-backend-extra-config", extra,
        "--hicache-storage-prefetch-policy", "wait_complete",
    )  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tenants") / "store"


@pytest.fixture(scope="module")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server"), *flags(store)) as running:
        yield running


def tiers(server: Server, **tenant: str) -> set[str]:
    """The tiers on which /generate found something."""
    found = cached(server.generate(TEXT, max_new_tokens=1, **tenant))
    return {name for name in ("device", "host", "storage") if found.get(name)}


def openai_hits(server: Server, route: str, **tenant: str) -> int:
    prompt = {"prompt": TEXT} if route == "completions" else {"messages": [{"role": "user", "content": TEXT}]}
    body: dict[str, Any] = {"model": "builtin", "max_tokens": 1, "temperature": 0} | prompt | tenant
    reply = server.http.post(f"/v1/{route}", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_fm33_each_tenant_has_its_own_pages_on_the_device_in_storage_and_after_a_restart(
    server: Server, store: Path, tmp_path: Path
) -> None:
    for tenant in TENANTS:
        assert tiers(server, **tenant) == set(), tenant
        assert tiers(server, **tenant) == {"device"}, tenant
    assert tiers(server, cache_salt="") == {"device"}, "an empty salt is none"
    server.quiesce()
    server.flush()
    for tenant in TENANTS:
        assert tiers(server, **tenant) == {"storage"}, tenant
    assert tiers(server, extra_key="b") == set()
    server.quiesce()
    with Server(tmp_path / "again", *flags(store)) as again:
        assert tiers(again, extra_key="abc") == set(), "a tenant that is new finds the pages of nobody"
        for tenant in (*TENANTS, {"extra_key": "b"}):
            assert tiers(again, **tenant) == {"storage"}, tenant


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_fm33_the_openai_routes_separate_tenants_alike(server: Server, route: str) -> None:
    server.quiesce()
    reply = server.admin("POST", "/flush_cache", params={"timeout": 30, "keep_storage": "false"})
    assert reply.status_code == 200, reply.text
    for tenant in TENANTS:
        assert openai_hits(server, route, **tenant) == 0, tenant
        assert openai_hits(server, route, **tenant) > 16, tenant
