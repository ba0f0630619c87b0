"""Victim order: which node leaves a tier first.

A policy is a key function; the smallest key is evicted first.  A `VictimQueue` keeps the candidates of one
tier in that order across evictions.  Both are called by the residency of the tree, on the scheduler thread.
Nothing here reads a clock: time is the tick number, and every tie is broken by the tree's own counters, so
that all ranks evict the same nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from operator import attrgetter
from typing import Any

from sglang_hicache.cache.node import Node
from sglang_hicache.errors import UserError

#: Below this many entries a queue is never swept.
_LEAST_SWEEP = 1024


@dataclass(frozen=True, slots=True)
class EvictionPolicy:
    """A name and the key by which nodes are ordered."""

    name: str
    key: Callable[[Node], Any]
    #: An access moves the node forward in the order.  The other policies only ever move it back, which lets
    #: their queues correct an entry when it comes up.
    access_hastens: bool = False

    @staticmethod
    def named(name: str, protected_threshold: int = 2) -> EvictionPolicy:
        """The policy of that name.  `protected_threshold`: hits from which slru protects a node."""
        keys: dict[str, Callable[[Node], Any]] = {
            "lru": attrgetter("last_access"),
            "lfu": attrgetter("hit_count", "last_access"),
            "slru": lambda node: (node.hit_count >= protected_threshold, node.last_access),
            "priority": attrgetter("priority", "last_access"),
            "fifo": attrgetter("created"),
            "mru": lambda node: -node.last_access,
            "filo": lambda node: -node.created,
        }
        if name not in keys:
            raise UserError(f"eviction policy {name!r} is unknown: use one of {', '.join(keys)}")
        return EvictionPolicy(name, keys[name], access_hastens=name == "mru")


class VictimQueue:
    """The candidates of one tier, best victim first, without a scan and without a fresh heap per eviction.

    A heap whose entries may be out of date.  A node is pushed when it becomes evictable and then left alone:
    an access, a lock or a new child does not touch the heap.  When an entry comes to the top it is compared
    with the node as it is now, and is dropped, moved back or used.  Each change of a node therefore costs at
    most one correction later.
    """

    __slots__ = ("_bit", "_heap", "_is_evictable", "_key", "_policy", "_sweep_at")

    def __init__(self, policy: EvictionPolicy, is_evictable: Callable[[Node], bool], bit: int) -> None:
        self._policy = policy
        self._key = policy.key
        self._is_evictable = is_evictable
        #: Set in `Node.queued` while this queue holds an entry for the node.
        self._bit = bit
        #: (key, -depth, id, node).  Of nodes used together the deeper goes first, so that what is left of a
        #: prefix has no hole; ids are unique, so nodes themselves are never compared.
        self._heap: list[tuple[Any, int, int, Node]] = []
        self._sweep_at = _LEAST_SWEEP

    def push(self, node: Node) -> None:
        """The node has become evictable."""
        # An entry from before is good enough unless it may sort too late: see `hasten`.
        if not node.queued & self._bit or self._policy.access_hastens:
            self._push(node)

    def hasten(self, node: Node) -> None:
        """The node's key has become smaller: its entry, if any, would come up too late."""
        if self._is_evictable(node):
            self._push(node)

    def _push(self, node: Node) -> None:
        node.queued |= self._bit
        heappush(self._heap, (self._key(node), -node.depth_pages, node.id, node))
        if len(self._heap) > self._sweep_at:
            self._sweep()

    def best(self, skip: Container[int]) -> Node | None:
        """The first victim whose id is not in `skip`.  It stays queued until it is really evicted."""
        heap, key = self._heap, self._key
        passed_over: list[tuple[Any, int, int, Node]] = []
        best = None
        while heap:
            entry = heap[0]
            node = entry[3]
            if not self._is_evictable(node):
                heappop(heap)
                node.queued &= ~self._bit
                continue
            now = key(node)
            if now == entry[0]:
                if node.id not in skip:
                    best = node
                    break
                passed_over.append(heappop(heap))
            else:
                heapreplace(heap, (now, -node.depth_pages, node.id, node))
        for entry in passed_over:
            heappush(heap, entry)
        return best

    def _sweep(self) -> None:
        """Forget entries of nodes that cannot be evicted now, so that the heap stays as large as the tree."""
        nodes = [entry[3] for entry in self._heap]
        for node in nodes:
            node.queued &= ~self._bit
        entries = []
        for node in nodes:
            if not node.queued & self._bit and self._is_evictable(node):
                node.queued |= self._bit
                entries.append((self._key(node), -node.depth_pages, node.id, node))
        heapify(entries)
        self._heap = entries
        # At least doubling between sweeps makes them cost O(1) per push.
        self._sweep_at = max(_LEAST_SWEEP, 2 * len(entries))

    def clear(self) -> None:
        """Forget everything; the nodes are gone."""
        self._heap.clear()

    def __len__(self) -> int:
        """Entries, out-of-date ones included."""
        return len(self._heap)
