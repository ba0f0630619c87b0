"""The checks themselves: each kind of damage is found and named."""

from __future__ import annotations

import pytest

from sglang_hicache.cache.check import check_pools, check_tree, check_unlocked
from sglang_hicache.cache.digest import StateDigest
from sglang_hicache.cache.evict import EvictionPolicy
from sglang_hicache.cache.page import encode_tokens
from sglang_hicache.cache.pools import PageAllocator
from sglang_hicache.cache.tree import PrefixTree
from sglang_hicache.errors import IntegrityError


def key(*pages: int) -> bytes:
    return encode_tokens([number for number in pages for _ in range(4)])


@pytest.fixture
def parts():
    """A tree of two nodes on the device, the lower one also on the host, and the pools they come from."""
    digest = StateDigest()
    tree = PrefixTree(4, digest, EvictionPolicy.named("lru"))
    device = PageAllocator("device", 8, digest, first=1)
    host = PageAllocator("host", 8, digest)
    top = tree.insert(b"", key(1, 2), device.alloc(2), tick=1).node
    leaf = tree.insert(b"", key(1, 2, 3), [*top.device_pages, *device.alloc(1)], tick=2).node
    tree.set_host(leaf, host.alloc(1))
    tree.keys_of(leaf)
    check_tree(tree)
    check_pools(tree, device, host)
    return tree, top, leaf, device, host


def damage_page_list(tree, top, leaf):
    top.device_pages = top.device_pages[:1]


def damage_hole(tree, top, leaf):
    top.device_pages = None


def damage_depth(tree, top, leaf):
    leaf.depth_pages = 0


def damage_child_count(tree, top, leaf):
    top.device_children = 0


def damage_lock(tree, top, leaf):
    leaf.device_locks = 1


def damage_queue(tree, top, leaf):
    leaf.queued = 0


def damage_keys(tree, top, leaf):
    leaf.keys = (b"x" * 32,)


def damage_filing(tree, top, leaf):
    top.children[b"elsewhere"] = top.children.pop(key(3))


def damage_age(tree, top, leaf):
    leaf.last_access = 99


def damage_counter(tree, top, leaf):
    tree._host_pages += 1


DAMAGES = [
    damage_page_list,
    damage_hole,
    damage_depth,
    damage_child_count,
    damage_lock,
    damage_queue,
    damage_keys,
    damage_filing,
    damage_age,
    damage_counter,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_the_tree_is_found(parts, damage):
    tree, top, leaf, _, _ = parts
    damage(tree, top, leaf)
    with pytest.raises(IntegrityError):
        check_tree(tree)


def test_a_page_without_owner_is_found(parts):
    tree, _, _, device, host = parts
    device.alloc(1)
    with pytest.raises(IntegrityError, match=r"nobody owns the pages \[4\]"):
        check_pools(tree, device, host)
    check_pools(tree, device, host, device_holders={"request r1": [4]})


def test_a_page_with_two_owners_is_found(parts):
    tree, _, leaf, device, host = parts
    with pytest.raises(IntegrityError, match="page 0 belongs to tree and to op 3"):
        check_pools(tree, device, host, host_holders={"op 3": leaf.host_pages})


def test_a_page_that_is_used_and_free_is_found(parts):
    tree, _, leaf, device, host = parts
    host.free(leaf.host_pages)
    with pytest.raises(IntegrityError, match="in use by tree but free"):
        check_pools(tree, device, host)


def test_host_pages_without_a_host_pool_are_found(parts):
    tree, _, _, device, _ = parts
    with pytest.raises(IntegrityError, match="without a host pool"):
        check_pools(tree, device, None)


def test_locks_on_an_idle_rank_are_found(parts):
    tree, top, _, _, _ = parts
    check_unlocked(tree)
    tree.lock_host(top)
    with pytest.raises(IntegrityError, match="locked on an idle rank"):
        check_unlocked(tree)
