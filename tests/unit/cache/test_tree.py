"""The tree, one behaviour after the other."""

from __future__ import annotations

import random

import pytest

from sglang_hicache.cache.check import check_pools, check_tree, check_unlocked
from sglang_hicache.cache.digest import StateDigest
from sglang_hicache.cache.evict import EvictionPolicy
from sglang_hicache.cache.page import encode_tokens, namespace_seed, page_keys
from sglang_hicache.cache.pools import PageAllocator
from sglang_hicache.cache.tree import PrefixTree
from sglang_hicache.errors import IntegrityError, UserError

PAGE_SIZE = 4


def key(*pages: int) -> bytes:
    """A key of whole pages, each made of one number."""
    return encode_tokens([number for number in pages for _ in range(PAGE_SIZE)])


@pytest.fixture
def tree() -> PrefixTree:
    return PrefixTree(PAGE_SIZE, StateDigest(), EvictionPolicy.named("lru"))


def test_match_ends_inside_a_node_and_splits_it(tree):
    tree.insert(b"", key(1, 2, 3), [11, 12, 13], tick=1)
    match = tree.match(b"", key(1, 2, 9))
    assert (match.device_pages, match.device_len, match.host_len) == ([11, 12], 8, 0)
    assert [node.page_count for node in tree.nodes()] == [2, 1]
    check_tree(tree)


def test_a_partial_last_page_never_matches(tree):
    tree.insert(b"", key(1, 2), [11, 12], tick=1)
    assert tree.match(b"", key(1, 2)[:-4]).device_pages == [11]
    assert tree.match(b"", key(1)[:-4]).device_pages == []


def test_pages_that_differ_only_in_their_last_token_are_different_children(tree):
    tree.insert(b"", encode_tokens([1, 2, 3, 4]), [1], tick=1)
    tree.insert(b"", encode_tokens([1, 2, 3, 5]), [2], tick=1)
    assert tree.match(b"", encode_tokens([1, 2, 3, 5])).device_pages == [2]


def test_tenants_share_nothing(tree):
    one, other = namespace_seed("a", "bc"), namespace_seed("ab", "c")
    tree.insert(one, key(1, 2), [1, 2], tick=1)
    assert tree.match(other, key(1, 2)).device_pages == []
    assert tree.match(b"", key(1, 2)).device_pages == []
    assert tree.match(one, key(1, 2)).device_pages == [1, 2]


def test_a_seed_alone_never_equals_a_page():
    """With 8 tokens per page a page is as long as a seed; a tenant's empty request found another's page."""
    tree = PrefixTree(8, StateDigest(), EvictionPolicy.named("lru"))
    page = namespace_seed("tenant", None)
    tree.insert(b"", page, [1], tick=1)
    assert tree.match(page, b"").device_pages == []
    assert tree.match(page, b"").host_node is tree.root


def test_a_seed_of_another_length_is_refused(tree):
    with pytest.raises(IntegrityError, match="ambiguous"):
        tree.insert(b"short", key(1), [1], tick=1)


def test_only_pages_that_lost_their_place_come_back(tree):
    tree.insert(b"", key(1, 2, 3), [11, 12, 13], tick=1)
    insertion = tree.insert(b"", key(1, 2, 3, 4), [11, 22, 13, 24], tick=2)
    assert insertion.duplicates == [22]
    assert tree.match(b"", key(1, 2, 3, 4)).device_pages == [11, 12, 13, 24]


def test_duplicates_of_all_nodes_on_the_way_come_back(tree):
    tree.insert(b"", key(1, 2), [11, 12], tick=1)
    tree.insert(b"", key(1, 2, 3), [11, 12, 13], tick=2)
    assert tree.insert(b"", key(1, 2, 3), [21, 22, 23], tick=3).duplicates == [21, 22, 23]


@pytest.mark.parametrize("length", [1, 2, 3, 8, 33])
def test_the_point_where_two_keys_part_is_found(length):
    for parts_at in range(1, length + 1):
        for asked in range(1, length + 1):
            tree = PrefixTree(PAGE_SIZE, StateDigest(), EvictionPolicy.named("lru"))
            tree.insert(b"", key(*range(length)), list(range(length)), tick=1)
            other = key(*(page if page < parts_at else 99 for page in range(asked)))
            assert tree.match(b"", other).device_pages == list(range(min(parts_at, asked)))


def test_a_page_list_of_another_length_is_refused(tree):
    with pytest.raises(IntegrityError, match="2 pages"):
        tree.insert(b"", key(1), [1, 2], tick=1)


def test_host_only_nodes_on_the_way_get_the_device_pages(tree):
    tree.insert_host(b"", key(1, 2), 0, [101, 102], tick=1)
    match = tree.match(b"", key(1, 2))
    assert (match.device_len, match.host_len) == (0, 8)
    assert tree.insert(b"", key(1, 2, 3), [1, 2, 3], tick=2).duplicates == []
    match = tree.match(b"", key(1, 2, 3))
    assert (match.device_pages, match.host_len) == ([1, 2, 3], 0)
    check_tree(tree)


def test_prefetched_pages_below_what_is_there(tree):
    tree.insert(b"", key(1, 2), [1, 2], tick=1)
    node, duplicates = tree.insert_host(b"", key(1, 2, 3, 4), 1, [101, 102, 103], tick=2)
    assert duplicates == [101]
    assert node.host_pages == [102, 103]
    assert node.depth_pages == 2


def test_fm17_prefetched_pages_whose_anchor_is_gone_all_come_back(tree):
    """The anchor of a prefetch is evicted while storage reads.  The pages must not leak and not hang in the air."""
    anchor = tree.insert(b"", key(1), [1], tick=1).node
    tree.lock_host(anchor)
    assert tree.drop_device(tree.device_victim()) == [1]
    assert tree.insert_host(b"", key(1, 2), 1, [102], tick=2) == (None, [102])
    tree.unlock_host(anchor)
    check_tree(tree)
    check_unlocked(tree)


def test_a_lock_on_a_removed_node_is_given_back_after_its_parent_was_split(tree):
    tree.insert(b"", key(1, 2), [1, 2], tick=1)
    leaf = tree.insert(b"", key(1, 2, 3), [1, 2, 3], tick=2).node
    tree.lock_host(leaf)
    tree.drop_device(leaf)
    tree.match(b"", key(1, 9))
    tree.unlock_host(leaf)
    check_unlocked(tree)
    check_tree(tree)


def test_fm24_a_lock_survives_splits_and_leaves_nothing_behind(tree):
    node = tree.insert(b"", key(1, 2, 3, 4), [1, 2, 3, 4], tick=1).node
    tree.lock_device(node)
    tree.match(b"", key(1, 2, 9))
    tree.match(b"", key(1, 9))
    assert [n.device_locks for n in tree.nodes()] == [1, 1, 1]
    assert tree.device_victim() is None
    assert tree.device_tokens_evictable == 0
    tree.unlock_device(node)
    check_unlocked(tree)
    assert tree.device_tokens_evictable == 16
    with pytest.raises(IntegrityError, match="more often"):
        tree.unlock_device(node)


def test_nodes_below_a_locked_one_are_free(tree):
    node = tree.insert(b"", key(1), [1], tick=1).node
    tree.lock_device(node)
    leaf = tree.insert(b"", key(1, 2), [1, 2], tick=2).node
    assert tree.device_victim() is leaf
    tree.drop_device(leaf)
    assert tree.device_victim() is None


def test_a_host_leaf_can_go_once_its_device_lock_is_given_back(tree):
    node, _ = tree.insert_host(b"", key(1), 0, [101], tick=1)
    tree.lock_device(node)
    assert tree.host_victim() is None
    tree.unlock_device(node)
    assert tree.host_victim() is node


def test_fm37_an_insert_during_a_load_back_cannot_adopt_or_free_its_pages(tree):
    """A second request computes the same prefix while the first loads it back: its pages are the duplicates."""
    node, _ = tree.insert_host(b"", key(1, 2), 0, [101, 102], tick=1)
    tree.lock_device(node)
    tree.lock_host(node)
    tree.set_device(node, [1, 2])
    assert tree.insert(b"", key(1, 2), [3, 4], tick=2).duplicates == [3, 4]
    with pytest.raises(IntegrityError, match="locked"):
        tree.drop_device(node)
    with pytest.raises(IntegrityError, match="locked"):
        tree.clear_host(node)


def test_a_device_victim_with_host_children_is_demoted_or_dropped_with_them(tree):
    top = tree.insert(b"", key(1), [1], tick=1).node
    tree.insert_host(b"", key(1, 2), 1, [102], tick=2)
    assert tree.device_victim() is top
    with pytest.raises(IntegrityError, match="in the air"):
        tree.drop_device(top)
    assert tree.drop_subtree(top) == ([1], [102])
    assert list(tree.nodes()) == []


def test_a_demoted_victim_keeps_its_host_children(tree):
    top = tree.insert(b"", key(1), [1], tick=1).node
    tree.insert_host(b"", key(1, 2), 1, [102], tick=2)
    tree.set_host(top, [101])
    assert tree.drop_device(top) == [1]
    assert tree.match(b"", key(1, 2)).host_len == 8
    check_tree(tree)


def test_a_locked_subtree_is_not_dropped(tree):
    top = tree.insert(b"", key(1), [1], tick=1).node
    leaf, _ = tree.insert_host(b"", key(1, 2), 1, [102], tick=2)
    tree.lock_host(leaf)
    with pytest.raises(IntegrityError, match="locked"):
        tree.drop_subtree(top)


def test_a_host_victim_is_a_leaf_first_and_a_duplicate_on_request(tree):
    both = tree.insert(b"", key(1), [1], tick=1).node
    tree.set_host(both, [101])
    leaf, _ = tree.insert_host(b"", key(2), 0, [102], tick=2)
    assert tree.host_victim() is leaf
    assert tree.host_victim(duplicates_first=True) is both
    assert tree.host_victim(skip={leaf.id}) is both
    assert tree.host_victim(skip={leaf.id, both.id}) is None
    assert tree.host_victim() is leaf
    assert tree.clear_host(both) == [101]
    assert tree.holds(both)
    assert tree.clear_host(leaf) == [102]
    assert not tree.holds(leaf)


def test_page_lists_of_the_caller_are_not_the_tree_s(tree):
    node = tree.insert(b"", key(1), [1], tick=1).node
    mine = [101]
    tree.set_host(node, mine)
    mine.append(0)
    tree.match(b"", key(1)).device_pages.append(0)
    check_tree(tree)


def test_fm29_keys_asked_for_late_cover_the_whole_prefix(tree):
    """Nodes older than an attach once had no keys; the chain of their children started in the middle."""
    tree.insert(b"", key(1, 2, 3), [1, 2, 3], tick=1)
    leaf = tree.insert(b"", key(1, 2, 3, 4, 5), [1, 2, 3, 4, 5], tick=2).node
    tokens = [number for number in (1, 2, 3, 4, 5) for _ in range(PAGE_SIZE)]
    assert tree.keys_of(leaf) == page_keys(tokens, PAGE_SIZE)[3:]
    assert tree.parent_key(leaf) == page_keys(tokens, PAGE_SIZE)[2]
    assert tree.last_key(leaf, b"") == page_keys(tokens, PAGE_SIZE)[4]


def test_keys_begin_with_the_seed(tree):
    seed = namespace_seed("tenant", "salt")
    node = tree.insert(seed, key(1), [1], tick=1).node
    assert tree.keys_of(node) == page_keys([1] * PAGE_SIZE, PAGE_SIZE, seed)
    assert tree.parent_key(node) == b""
    assert tree.last_key(tree.root, seed) == seed


def test_fm30_keys_are_the_caller_s_to_change(tree):
    node = tree.insert(b"", key(1, 2), [1, 2], tick=1).node
    first = tree.keys_of(node)
    wanted = list(first)
    first.extend(first)
    first.reverse()
    assert tree.keys_of(node) == wanted
    check_tree(tree)


def test_keys_stay_right_over_many_splits(tree):
    rng = random.Random(7)
    for tick in range(1, 300):
        tokens = [rng.randrange(2) for _ in range(PAGE_SIZE * rng.randrange(1, 12))]
        pages = [-1] * (len(tokens) // PAGE_SIZE)
        node = tree.insert(b"", encode_tokens(tokens), pages, tick).node
        if rng.random() < 0.5:
            assert tree.keys_of(node)[-1] == page_keys(tokens, PAGE_SIZE)[-1]
    check_tree(tree)


def test_a_deep_chain_of_nodes_needs_no_recursion(tree):
    tokens: list[int] = []
    for depth in range(1500):
        tokens += [depth] * PAGE_SIZE
        node = tree.insert(b"", encode_tokens(tokens), list(range(depth + 1)), tick=depth + 1).node
    assert tree.keys_of(node) == page_keys(tokens, PAGE_SIZE)[-1:]
    assert sum(1 for _ in tree.nodes()) == 1500


def test_reset_returns_everything_once_nothing_is_locked(tree):
    node = tree.insert(b"", key(1, 2), [1, 2], tick=1).node
    tree.insert_host(b"", key(1, 2, 3), 2, [103], tick=1)
    tree.lock_device(node)
    with pytest.raises(IntegrityError, match="1 device and 0 host locks"):
        tree.reset()
    tree.unlock_device(node)
    assert tree.reset() == ([1, 2], [103])
    assert not tree.holds(node)
    assert tree.device_victim() is tree.host_victim() is None
    check_tree(tree)


@pytest.mark.parametrize(
    ("policy", "first"),
    [("lru", 2), ("mru", 1), ("fifo", 1), ("filo", 3), ("lfu", 2), ("slru", 2), ("priority", 2)],
)
def test_policies(policy, first):
    """Three nodes: 1 is oldest, used last and hit twice; 2 is used first; 3 is newest and has priority."""
    tree = PrefixTree(PAGE_SIZE, StateDigest(), EvictionPolicy.named(policy))
    nodes = {n: tree.insert(b"", key(n), [n], tick=n, priority=n // 3).node for n in (1, 2, 3)}
    tree.touch(nodes[1], tick=9)
    nodes[1].hit_count = 2
    assert tree.device_victim() is nodes[first]


def test_an_unknown_policy_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="'clock'.*lru, lfu, slru"):
        EvictionPolicy.named("clock")


def test_slru_threshold():
    tree = PrefixTree(PAGE_SIZE, StateDigest(), EvictionPolicy.named("slru", protected_threshold=3))
    one = tree.insert(b"", key(1), [1], tick=1).node
    two = tree.insert(b"", key(2), [2], tick=2).node
    one.hit_count = two.hit_count = 2
    assert tree.device_victim() is one
    one.hit_count = 3
    assert tree.device_victim() is two


def test_mru_sees_an_access_that_happened_under_a_lock():
    """The entry in the queue is older than the access and would sort too late."""
    tree = PrefixTree(PAGE_SIZE, StateDigest(), EvictionPolicy.named("mru"))
    one = tree.insert(b"", key(1), [1], tick=1).node
    two = tree.insert(b"", key(2), [2], tick=2).node
    tree.lock_device(one)
    tree.touch(one, tick=3)
    assert tree.device_victim() is two
    tree.unlock_device(one)
    assert tree.device_victim() is one


def test_skipped_victims_stay_in_line(tree):
    nodes = [tree.insert(b"", key(n), [n], tick=n).node for n in range(1, 6)]
    skip: set[int] = set()
    for node in nodes:
        assert tree.device_victim(skip) is node
        skip.add(node.id)
    assert tree.device_victim(skip) is None
    assert tree.device_victim() is nodes[0]


def test_queues_do_not_grow_with_use(tree):
    """Locks, accesses and evictions by the thousand leave no more entries than nodes, give or take the sweep."""
    pool = PageAllocator("device", 64, StateDigest())
    for tick in range(1, 8000):
        match = tree.match(b"", key(tick % 97))
        tree.touch(match.device_node, tick)
        tree.lock_device(match.device_node)
        if not match.device_pages:
            while pool.free_count < 1:
                pool.free(tree.drop_device(tree.device_victim()))
            tree.insert(b"", key(tick % 97), pool.alloc(1), tick)
        tree.unlock_device(match.device_node)
    check_tree(tree)
    check_pools(tree, pool, None)
    assert len(tree._device_queue) <= 1024


def test_digest_follows_every_change():
    def steps(skip: int) -> int:
        digest = StateDigest()
        tree = PrefixTree(PAGE_SIZE, digest, EvictionPolicy.named("lru"))
        node = tree.insert(b"", key(1, 2), [1, 2], tick=1).node
        actions = [
            lambda: tree.match(b"", key(1, 9)),
            lambda: tree.touch(node, 5),
            lambda: tree.lock_device(node),
            lambda: tree.lock_host(node),
            lambda: tree.set_host(node, [101]),
            lambda: tree.insert_host(b"", key(8), 0, [108], tick=6),
            lambda: tree.insert(b"", key(7), [7], tick=7),
        ]
        for at, action in enumerate(actions):
            if at != skip:
                action()
        return digest.value

    # The first step splits the node and is always taken: a host copy of one page fits the half only.
    values = [steps(skip) for skip in (-1, 1, 2, 3, 4, 5, 6)]
    assert len(set(values)) == len(values)
    assert steps(-1) == values[0]
