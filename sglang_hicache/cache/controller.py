"""What moves between device and host, and why: eviction, write-through, demotion, load-back.

Owns the two page allocators and the tree; asked by admission (pages, load-back), results (insert) and core
(finished copies).  Decides only; the copies it wants are collected in `copies_out` and `copies_in`, which the
loop hands to the worker: outs first, then ins, then the forward.  Replicated on every rank, so nothing here
reads a clock, a future or the arrival order of anything.

Order on the device is the stream's: a device page that a demotion gives up is free at once, because whatever
refills it is queued behind the copy.  Order on the host is the plan's: a host page is published, unlocked or
freed only when the plan says that the copy has ended on every rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass

from sglang_hicache.cache.op import Op, OpKind, OpTable
from sglang_hicache.cache.pools import PageAllocator
from sglang_hicache.cache.tree import Match, Node, PrefixTree
from sglang_hicache.config import CacheConfig
from sglang_hicache.errors import IntegrityError

#: Hits a node needs before it is copied to the host; write_back copies at eviction instead.
WRITE_THRESHOLD = {"write_through": 1, "write_through_selective": 2}


@dataclass(frozen=True, slots=True)
class Copy:
    """Page i of `device_pages` and page i of `host_pages` belong together."""

    op_id: int
    device_pages: list[int]
    host_pages: list[int]


@dataclass(frozen=True, slots=True)
class Inserted:
    """Result of putting a request's pages into the tree."""

    #: Bottom node of the inserted prefix: what the request locks.
    node: Node
    #: Pages of the whole prefix as the tree holds them; the request's own duplicates are freed.
    pages: list[int]
    #: Nodes from the root to `node`.
    path: list[Node]


class CacheController:
    """Pages of device and host, and the copies between them."""

    def __init__(
        self, config: CacheConfig, page_size: int, tree: PrefixTree, device: PageAllocator,
        host: PageAllocator | None, ops: OpTable,
    ) -> None:
        self._config = config
        self._page_size = page_size
        self.write_policy = config.write_policy
        self.tree = tree
        self.device = device
        self.host = host
        self.ops = ops
        self.copies_out: list[Copy] = []
        self.copies_in: list[Copy] = []
        #: In tokens, as the metrics count.
        self.counters: Counter[str] = Counter()

    # ------------------------------------------------------------------------------------------ device

    def device_pages_available(self) -> int:
        """Free pages plus those that eviction can free at once."""
        return self.device.free_count + self.tree.device_tokens_evictable // self._page_size

    def allocate_device(self, pages: int) -> list[int] | None:
        """Take pages, evicting as needed; None (and nothing taken) if locks hold too many."""
        passed_over: set[int] = set()
        while self.device.free_count < pages:
            node = self.tree.device_victim(passed_over)
            if node is None:
                return None
            if not self._evict_from_device(node):
                passed_over.add(node.id)
        return self.device.alloc(pages)

    def _evict_from_device(self, node: Node) -> bool:
        """Free the device pages of a victim; False if they cannot go now."""
        tokens = node.page_count * self._page_size
        if node.host_pages is None:
            must_copy = bool(node.children)  # host-only children: without this node they would hang in the air
            if (must_copy or self.write_policy == "write_back") and self._demote(node):
                self.counters["evicted"] += tokens
                return True
            if must_copy:
                return self._drop_subtree(node)
            if self.host is not None:
                is_pressed = self.write_policy == "write_back"
                reason = "host_pressure" if is_pressed else "write_through_unbacked_eviction"
                self.counters[f"dropped_{reason}"] += tokens
        self.device.free(self.tree.drop_device(node))
        self.counters["evicted"] += tokens
        return True

    def _demote(self, node: Node) -> bool:
        """Give the victim a host copy and free its device pages behind that copy."""
        host_pages = self.allocate_host(node.page_count) if self.host is not None else None
        if host_pages is None:
            return False
        op = self.ops.add(OpKind.DEMOTE, node.page_count)
        op.node, node.landing = node, op.id
        self.tree.set_host(node, host_pages)
        self.tree.lock_host(node)
        device_pages = self.tree.drop_device(node)
        self.copies_out.append(Copy(op.id, device_pages, host_pages))
        self.device.free(device_pages)
        return True

    def _drop_subtree(self, node: Node) -> bool:
        """No room to demote: give up the node with its host-only children, unless one of those is locked."""
        if any(below.host_locks or below.device_locks for below in self.tree.subtree(node)):
            return False
        device_pages, host_pages = self.tree.drop_subtree(node)
        self.device.free(device_pages)
        self._need_host().free(host_pages)
        self.counters["evicted"] += len(device_pages) * self._page_size
        self.counters["dropped_host_pressure"] += len(host_pages) * self._page_size
        return True

    # -------------------------------------------------------------------------------------------- host

    def _need_host(self) -> PageAllocator:
        if self.host is None:
            raise IntegrityError("host pages are handled on a server without hierarchical cache")
        return self.host

    def allocate_host(self, pages: int) -> list[int] | None:
        """Take host pages, evicting as needed; None (and nothing taken) if locks hold too many."""
        host = self._need_host()
        if pages > host.total:
            return None
        while host.free_count < pages:
            node = self.tree.host_victim(duplicates_first=self.write_policy == "write_back")
            if node is None:
                return None
            host.free(self.tree.clear_host(node))
        return host.alloc(pages)

    def write_through(self, path: list[Node]) -> None:
        """Copy the nodes of a path to the host, parents first, as far as policy and memory allow."""
        threshold = WRITE_THRESHOLD.get(self.write_policy)
        if threshold is None or self.host is None:
            return
        for node in path:
            if node.host_pages is not None or node.landing:
                continue
            if node.hit_count < threshold:
                self.counters["below_policy"] += node.page_count * self._page_size
                return
            host_pages = self.allocate_host(node.page_count)
            if host_pages is None:
                self.counters["dropped_host_pressure"] += node.page_count * self._page_size
                return
            self._copy_out(node, host_pages)

    def _copy_out(self, node: Node, host_pages: list[int]) -> None:
        op = self.ops.add(OpKind.WRITE_THROUGH, node.page_count)
        op.node, op.host_pages, node.landing = node, host_pages, op.id
        self.tree.lock_device(node)
        self.copies_out.append(Copy(op.id, list(node.device_pages or ()), host_pages))

    def is_below_threshold(self, node: Node) -> bool:
        """The write policy waits for more hits before it copies the node to the host."""
        return node.hit_count < WRITE_THRESHOLD.get(self.write_policy, 0)

    def wants_copy(self, node: Node) -> bool:
        """By the policy the node should be on the host, and is not: there was no room when its turn came."""
        is_missing = node.device_pages is not None and node.host_pages is None and not node.landing
        return is_missing and self.write_policy in WRITE_THRESHOLD and not self.is_below_threshold(node)

    def copy_if_free(self, node: Node) -> bool:
        """Copy the node to the host if that displaces nothing."""
        host = self._need_host()
        if not self.wants_copy(node) or host.free_count < node.page_count:
            return False
        self._copy_out(node, host.alloc(node.page_count) or [])
        return True

    def load_back(self, match: Match) -> list[int] | None:
        """Bring the host part of a match to the device; the caller holds locks on both its nodes."""
        pages = self.allocate_device(match.host_len // self._page_size)
        if pages is None:
            return None
        op = self.ops.add(OpKind.LOAD_BACK, len(pages))
        op.node = match.host_node
        host_pages: list[int] = []
        at = 0
        for node in self.tree.span(match.host_node, len(pages)):
            host_pages += node.host_pages or ()
            self.tree.set_device(node, pages[at : at + node.page_count])
            at += node.page_count
        self.tree.lock_host(match.host_node)
        self.copies_in.append(Copy(op.id, pages, host_pages))
        self.counters["load_back"] += match.host_len
        return pages

    def finish_copy(self, op: Op) -> list[Node]:
        """The copy has ended on every rank: publish, unlock, free.  Returns nodes that are new on the host."""
        self.ops.remove(op)
        node = op.node
        if node is None:
            raise IntegrityError(f"{op!r} copies no node")
        if op.kind is OpKind.LOAD_BACK:
            self.tree.unlock_host(node)
            return []
        landed = self.tree.span(node, op.pages)
        for part in landed:
            part.landing = 0
        self.counters["backup"] += op.pages * self._page_size
        if op.kind is OpKind.DEMOTE:
            self.tree.unlock_host(node)
            return landed
        at = 0
        for part in landed:
            self.tree.set_host(part, op.host_pages[at : at + part.page_count])
            at += part.page_count
        self.tree.unlock_device(node)
        return landed

    # ------------------------------------------------------------------------------------------ insert

    def insert(self, seed: bytes, key: bytes, pages: list[int], tick: int, priority: int, counted: int) -> Inserted:
        """Put computed pages into the tree, count the hit once per node, and start write-through.

        `counted`: pages from the root whose nodes this request has counted before.
        """
        insertion = self.tree.insert(seed, key, pages, tick, priority)
        self.device.free(insertion.duplicates)
        held: list[int] = []
        for node in insertion.path:
            if node.depth_pages >= counted:
                node.hit_count += 1
            held += node.device_pages or ()
        if len(held) != len(pages):
            raise IntegrityError(f"inserted {len(pages)} pages, the tree holds {len(held)} on the device")
        self.write_through(insertion.path)
        return Inserted(insertion.node, held, insertion.path)

    def reset(self, keep_host_pages: Container[int] = ()) -> None:
        """Empty L1 and L2.  Only while no op is in flight: an op's pages would be freed under its copy.

        `keep_host_pages`: leave the tree like all others, but somebody owns them now.
        """
        if len(self.ops):
            raise IntegrityError(f"the cache cannot be flushed with ops in flight: {self.ops.counts()}")
        device_pages, host_pages = self.tree.reset()
        self.device.free(device_pages)
        if self.host is not None:
            self.host.free([page for page in host_pages if page not in keep_host_pages])
