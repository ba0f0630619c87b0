"""Page keys that the tree hands out belong to the caller."""

from __future__ import annotations

from sglang_hicache.cache.digest import StateDigest
from sglang_hicache.cache.evict import EvictionPolicy
from sglang_hicache.cache.page import encode_tokens, page_keys
from sglang_hicache.cache.tree import PrefixTree


def test_fm30_a_list_of_keys_that_its_caller_changes_leaves_the_tree_alone() -> None:
    tokens = list(range(12))
    tree = PrefixTree(2, StateDigest(), EvictionPolicy.named("lru", 2))
    tree.insert(b"", encode_tokens(tokens[:8]), [1, 2, 3, 4], 1)
    node = tree.insert(b"", encode_tokens(tokens), [1, 2, 3, 4, 5, 6], 2).node
    expected = page_keys(tokens, 2)
    upper, lower = (tree.keys_of(part) for part in (node.parent, node))
    assert upper + lower == expected
    upper += lower  # what a backup that collects a span might do
    lower.clear()
    assert tree.keys_of(node.parent) + tree.keys_of(node) == expected
    split = tree.match(b"", encode_tokens(tokens[:10])).host_node
    split_keys = tree.keys_of(split)
    split_keys.append(b"not mine")
    assert [key for part in tree.span(node, 6) for key in tree.keys_of(part)] == expected
