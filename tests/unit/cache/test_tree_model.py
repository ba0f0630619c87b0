"""The tree against a model that keeps one record per page and knows no nodes.

Random walks over every operation.  After each step: the integrity checks, equality with the model page by
page, and the victims against the smallest key over all evictable nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_hicache.cache.check import check_pools, check_tree, check_unlocked
from sglang_hicache.cache.digest import StateDigest
from sglang_hicache.cache.evict import EvictionPolicy
from sglang_hicache.cache.page import encode_tokens, namespace_seed
from sglang_hicache.cache.pools import PageAllocator
from sglang_hicache.cache.residency import is_device_evictable, is_duplicate_evictable, is_host_leaf_evictable
from sglang_hicache.cache.tree import Node, PrefixTree

PAGE_SIZE = 2
PAGE_BYTES = 8
POLICIES = ("lru", "lfu", "slru", "priority", "fifo", "mru", "filo")
#: A page of the model: tenant, and all bytes from the first token to the end of the page.
Path = tuple[bytes, bytes]

seeds = st.sampled_from([b"", namespace_seed("tenant", None)])
# Two different pages, and now and then a token that completes none: paths meet, part and repeat all the time.
keys = st.builds(
    lambda pages, tail: encode_tokens([token for page in pages for token in (7, page)] + tail),
    st.lists(st.sampled_from([0, 1]), max_size=6),
    st.sampled_from([[], [], [], [7]]),
)


@dataclass
class Record:
    device: int | None = None
    host: int | None = None


@dataclass
class Lock:
    tier: str
    node: Node
    #: What the lock protects; a page that has left both tiers is protected no more.
    paths: set[Path]


def paths_of(seed: bytes, key: bytes) -> list[Path]:
    return [(seed, key[:end]) for end in range(PAGE_BYTES, len(key) + 1, PAGE_BYTES)]


def end_of(node: Node) -> Path:
    parts: list[bytes] = []
    above: Node | None = node
    while above is not None:
        parts.append(above.key)
        above = above.parent
    return node.seed, b"".join(reversed(parts))


def paths_in(node: Node) -> list[Path]:
    return paths_of(*end_of(node))[node.depth_pages :]


class TreeWalk(RuleBasedStateMachine):
    @initialize(policy=st.sampled_from(POLICIES))
    def build(self, policy):
        self.digest = StateDigest()
        self.policy = EvictionPolicy.named(policy)
        self.tree = PrefixTree(PAGE_SIZE, self.digest, self.policy)
        self.device = PageAllocator("device", 16, self.digest, first=1)
        self.host = PageAllocator("host", 16, self.digest)
        self.model: dict[Path, Record] = {}
        self.locks: list[Lock] = []
        self.tick = 0

    # ------------------------------------------------------------------------------------------- helpers

    def locked(self, tier: str) -> set[Path]:
        return set().union(*(lock.paths for lock in self.locks if lock.tier == tier))

    def forget(self, path: Path) -> None:
        """The page is on no tier any more."""
        assert path not in self.locked("device")
        del self.model[path]
        for lock in self.locks:
            lock.paths.discard(path)

    def take_device(self, node: Node) -> None:
        for path in paths_in(node):
            assert path not in self.locked("device")
            self.model[path].device = None
            if self.model[path].host is None:
                self.forget(path)

    def take_host(self, node: Node) -> None:
        for path in paths_in(node):
            assert path not in self.locked("host")
            self.model[path].host = None
            if self.model[path].device is None:
                self.forget(path)

    def expected_match(self, seed: bytes, key: bytes) -> tuple[list[int], int]:
        """Device pages and the number of host-only pages behind them."""
        pages: list[int] = []
        behind = 0
        for path in paths_of(seed, key):
            record = self.model.get(path)
            if record is None:
                break
            if record.device is not None:
                assert behind == 0
                pages.append(record.device)
            else:
                behind += 1
        return pages, behind

    def best(self, *kinds, skip=frozenset()) -> Node | None:
        for is_evictable in kinds:
            nodes = [n for n in self.tree.nodes() if is_evictable(n) and n.id not in skip]
            if nodes:
                return min(nodes, key=lambda n: (self.policy.key(n), -n.depth_pages, n.id))
        return None

    # --------------------------------------------------------------------------------------------- rules

    @rule(seed=seeds, key=keys, touches=st.booleans())
    def match(self, seed, key, touches):
        self.tick += 1
        pages, behind = self.expected_match(seed, key)
        match = self.tree.match(seed, key)
        assert match.device_pages == pages
        assert match.device_len == len(pages) * PAGE_SIZE
        assert match.host_len == behind * PAGE_SIZE
        assert end_of(match.device_node)[1] == key[: len(pages) * PAGE_BYTES]
        assert end_of(match.host_node)[1] == key[: (len(pages) + behind) * PAGE_BYTES]
        if touches:
            self.tree.touch(match.host_node, self.tick)

    @rule(seed=seeds, key=keys, priority=st.integers(0, 2), own_copy=st.booleans())
    def insert(self, seed, key, priority, own_copy):
        self.tick += 1
        paths = paths_of(seed, key)
        key = key[: len(paths) * PAGE_BYTES]
        held = [] if own_copy else self.tree.match(seed, key).device_pages
        fresh = self.device.alloc(len(paths) - len(held))
        if fresh is None:
            return
        insertion = self.tree.insert(seed, key, held + fresh, self.tick, priority)
        duplicates = []
        for path, page in zip(paths, held + fresh):
            record = self.model.setdefault(path, Record())
            if record.device is None:
                record.device = page
            elif record.device != page:
                duplicates.append(page)
        assert insertion.duplicates == duplicates
        self.device.free(insertion.duplicates)
        assert end_of(insertion.node)[1] == key
        assert [path for node in insertion.path for path in paths_in(node)] == paths
        for node in insertion.path:
            node.hit_count += 1

    @rule(seed=seeds, key=keys, start=st.integers(0, 6))
    def insert_host(self, seed, key, start):
        self.tick += 1
        paths = paths_of(seed, key)
        pages = self.host.alloc(max(len(paths) - start, 0))
        if not pages:
            return
        held = sum(self.expected_match(seed, key)[1:]) + len(self.expected_match(seed, key)[0])
        node, duplicates = self.tree.insert_host(seed, key, start, pages, self.tick)
        if held < start:
            assert node is None
            assert duplicates == pages
        else:
            assert end_of(node)[1] == paths[-1][1]
            assert duplicates == pages[: held - start]
            for path, page in zip(paths[held:], pages[held - start :]):
                self.model[path] = Record(host=page)
        self.host.free(duplicates)

    @rule(seed=seeds, key=keys, tier=st.sampled_from(["device", "host"]))
    def lock(self, seed, key, tier):
        match = self.tree.match(seed, key)
        node = match.device_node if tier == "device" else match.host_node
        (self.tree.lock_device if tier == "device" else self.tree.lock_host)(node)
        self.locks.append(Lock(tier, node, set(paths_of(*end_of(node)))))

    @precondition(lambda self: self.locks)
    @rule(data=st.data())
    def unlock(self, data):
        lock = self.locks.pop(data.draw(st.integers(0, len(self.locks) - 1)))
        (self.tree.unlock_device if lock.tier == "device" else self.tree.unlock_host)(lock.node)

    @rule(demotes=st.booleans(), skips_best=st.booleans())
    def evict_device(self, demotes, skips_best):
        skip = set()
        if skips_best:
            best = self.tree.device_victim()
            skip = {best.id} if best else skip
        victim = self.tree.device_victim(skip)
        assert victim is self.best(is_device_evictable, skip=skip)
        if victim is None:
            return
        if victim.host_pages is None and (demotes or victim.children):
            pages = self.host.alloc(victim.page_count)
            if pages is not None:
                self.tree.set_host(victim, pages)
                for path, page in zip(paths_in(victim), pages):
                    self.model[path].host = page
            elif victim.children:
                self.drop_subtree(victim)
                return
        self.take_device(victim)
        self.device.free(self.tree.drop_device(victim))

    def drop_subtree(self, node):
        if any(below.host_locks or below.device_locks for below in self.tree.subtree(node)):
            return
        for path in [path for below in self.tree.subtree(node) for path in paths_in(below)]:
            self.forget(path)
        device_pages, host_pages = self.tree.drop_subtree(node)
        self.device.free(device_pages)
        self.host.free(host_pages)

    @rule(seed=seeds, key=keys)
    def drop_what_matches(self, seed, key):
        node = self.tree.match(seed, key).host_node
        if node is not self.tree.root:
            self.drop_subtree(node)

    @rule(duplicates_first=st.booleans(), skips_best=st.booleans())
    def evict_host(self, duplicates_first, skips_best):
        skip = set()
        if skips_best:
            best = self.tree.host_victim(duplicates_first=duplicates_first)
            skip = {best.id} if best else skip
        kinds = [is_host_leaf_evictable, is_duplicate_evictable]
        victim = self.tree.host_victim(skip, duplicates_first)
        assert victim is self.best(*(reversed(kinds) if duplicates_first else kinds), skip=skip)
        if victim is not None:
            self.take_host(victim)
            self.host.free(self.tree.clear_host(victim))

    @rule(seed=seeds, key=keys)
    def write_through(self, seed, key):
        match = self.tree.match(seed, key)
        for node in self.tree.span(match.device_node, len(match.device_pages)):
            pages = self.host.alloc(node.page_count) if node.host_pages is None else None
            if pages is not None:
                self.tree.set_host(node, pages)
                for path, page in zip(paths_in(node), pages):
                    self.model[path].host = page

    @rule(seed=seeds, key=keys)
    def load_back(self, seed, key):
        match = self.tree.match(seed, key)
        count = match.host_len // PAGE_SIZE
        pages = self.device.alloc(count)
        for node in self.tree.span(match.host_node, count) if pages else []:
            mine, pages = pages[: node.page_count], pages[node.page_count :]
            self.tree.set_device(node, mine)
            for path, page in zip(paths_in(node), mine):
                self.model[path].device = page

    @rule(seed=seeds, key=keys)
    def ask_keys(self, seed, key):
        self.tree.keys_of(self.tree.match(seed, key).host_node).clear()

    @precondition(lambda self: not self.locks)
    @rule()
    def reset(self):
        device_pages, host_pages = self.tree.reset()
        assert sorted(device_pages) == self.device.used_pages()
        assert sorted(host_pages) == self.host.used_pages()
        self.device.free(device_pages)
        self.host.free(host_pages)
        self.model.clear()

    # --------------------------------------------------------------------------------------------- always

    @invariant()
    def tree_is_whole(self):
        check_tree(self.tree)
        check_pools(self.tree, self.device, self.host)
        if not self.locks:
            check_unlocked(self.tree)

    @invariant()
    def tree_equals_model(self):
        content: dict[Path, Record] = {}
        for node in self.tree.nodes():
            none = [None] * node.page_count
            for path, device, host in zip(paths_in(node), node.device_pages or none, node.host_pages or none):
                content[path] = Record(device, host)
        assert content == self.model
        free_to_go = {path for path, record in self.model.items() if record.device is not None}
        assert self.tree.device_tokens_evictable == len(free_to_go - self.locked("device")) * PAGE_SIZE

    def teardown(self):
        for lock in self.locks:
            (self.tree.unlock_device if lock.tier == "device" else self.tree.unlock_host)(lock.node)
        check_unlocked(self.tree)
        while (victim := self.tree.device_victim()) is not None:
            if victim.host_pages is None and victim.children:
                device_pages, host_pages = self.tree.drop_subtree(victim)
                self.device.free(device_pages)
                self.host.free(host_pages)
            else:
                self.device.free(self.tree.drop_device(victim))
        while (victim := self.tree.host_victim()) is not None:
            self.host.free(self.tree.clear_host(victim))
        assert list(self.tree.nodes()) == []
        assert (self.device.used_count, self.host.used_count) == (0, 0)


TestTreeWalk = TreeWalk.TestCase
TestTreeWalk.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


class LongTreeWalk(TreeWalk):
    pass


TestLongTreeWalk = pytest.mark.long(LongTreeWalk.TestCase)
TestLongTreeWalk.settings = settings(max_examples=2000, stateful_step_count=80, deadline=None)
