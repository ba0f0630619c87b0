"""Tenants share nothing on any tier: one prompt, every way to name a tenant, and what each finds of the others."""

from __future__ import annotations

from itertools import combinations

import pytest

from sglang_hicache import wire
from sglang_hicache.cache.page import namespace_seed, page_keys
from tests.ranks.reads import PROMPT, cached, world_with_storage
from tests.ranks.world import PAGE, World

#: (extra_key, cache_salt) of tenants that are all different; the pairs that only a length tells apart among them.
TENANTS: list[tuple[str | None, str | None]] = [
    (None, None), ("", None), ("a", None), (None, "a"), ("a", "a"), ("a", "bc"), ("ab", "c"), ("abc", None),
    (None, "abc"), ("", "abc"), ("\0", None), ("a\0", "bc"), ("ä", None), ("a\u0308", None),
]  # fmt: skip
#: Other ways to write some of them: an empty salt is none.
SAME = {(None, ""): (None, None), ("a", ""): ("a", None), ("", ""): ("", None)}
WHOLE = len(PROMPT) // PAGE * PAGE


def ask(world: World, tenant: tuple[str | None, str | None]) -> wire.CachedTokens:
    """What a request of this tenant finds cached, and where."""
    rid = world.submit(PROMPT, max_new_tokens=1, extra_key=tenant[0], cache_salt=tenant[1])
    world.settle()
    found = cached(world, rid)
    return wire.CachedTokens(device=found.device, host=found.host, storage=found.storage)


def flush(world: World) -> None:
    command = world.command(wire.FlushCache, timeout_s=1.0)
    world.settle()
    assert world.answer(command).success


def keys_of(tenant: tuple[str | None, str | None]) -> set[bytes]:
    return set(page_keys(PROMPT[:WHOLE], PAGE, namespace_seed(*tenant)))


@pytest.fixture
def world() -> World:
    """Its device holds the pages of three of the tenants, its host those of all."""
    return world_with_storage(device_pages=20, host_pages=200)


def test_no_two_tenants_have_a_key_in_common() -> None:
    for one, other in combinations(TENANTS, 2):
        assert not keys_of(one) & keys_of(other), (one, other)


def test_fm33_no_tenant_finds_a_page_of_another_on_any_tier(world: World) -> None:
    """While every tier holds the whole prompt of all tenants before it, each next one finds nothing."""
    for tenant in TENANTS:
        assert ask(world, tenant) == wire.CachedTokens(), tenant
    assert len(world.store) == 2 * len(TENANTS) * WHOLE // PAGE, "each stored its own pages, on both ranks"
    found = [ask(world, tenant) for tenant in TENANTS]
    assert all(f.device + f.host == WHOLE for f in found), "each finds its own"
    assert any(f.host for f in found), "the device held them all: the host was not asked"
    for other, tenant in SAME.items():
        found_too = ask(world, other)
        assert found_too.device + found_too.host == WHOLE, f"{other} is {tenant}"
    flush(world)
    assert [ask(world, tenant) for tenant in TENANTS] == [wire.CachedTokens(storage=WHOLE)] * len(TENANTS)
    world.check()


def test_fm33_a_tenant_whose_pages_are_gone_finds_nothing_although_all_others_are_stored(world: World) -> None:
    for tenant in TENANTS:
        ask(world, tenant)
    gone = keys_of(("a", "bc"))
    for name in [name for name in world.store if name[1] in gone]:
        del world.store[name]
    flush(world)
    for tenant in TENANTS:
        assert ask(world, tenant).storage == (0 if tenant == ("a", "bc") else WHOLE), tenant
    world.check()


def test_fm33_a_restart_mixes_no_tenants(world: World) -> None:
    for tenant in TENANTS[:-1]:
        ask(world, tenant)
    after = world_with_storage(store=world.store, device_pages=20, host_pages=200)
    assert ask(after, TENANTS[-1]) == wire.CachedTokens()
    for tenant in TENANTS[:-1]:
        assert ask(after, tenant).storage == WHOLE, tenant
    after.check()


def test_every_stored_page_says_whose_it_is(world: World) -> None:
    """For whoever purges a tenant offline: the seed travels with each write."""
    sent: list[wire.WritePages] = []
    process = next(iter(world.ranks[0].storage.values()))
    move = process.move
    process.move = lambda message: (sent.append(message), move(message))[1]
    for tenant in TENANTS:
        ask(world, tenant)
    told = {message.keys[-1]: message.tenant for message in sent if isinstance(message, wire.WritePages)}
    for tenant in TENANTS:
        seed = namespace_seed(*tenant)
        assert told[page_keys(PROMPT[:WHOLE], PAGE, seed)[-1]] == seed
