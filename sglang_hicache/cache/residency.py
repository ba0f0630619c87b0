"""Which nodes are on which tier, who holds them there, and who leaves next.

The base of `PrefixTree`; scheduler thread only, pure.  Rules that hold between any two calls:

    union    every node is on the device or on the host, and so is its parent
    device   the parent of a node on the device is on the device (or is the root)
    locks    a lock counts on the locked node and on every ancestor, so an unlocked node has no locked
             descendant, and "unlocked" is the same as "can be evicted once its children are gone"

A host-only node may hang below a device-only node: write_back demotes leaves first.  A host lock guards host
copies and nothing else; a device-only node under it may be evicted, and giving the lock back still works.
"""

from __future__ import annotations

from collections.abc import Container

from sglang_hicache.cache.digest import StateDigest
from sglang_hicache.cache.evict import EvictionPolicy, VictimQueue
from sglang_hicache.cache.node import Node
from sglang_hicache.errors import IntegrityError

_DIGEST_DEVICE_LOCK = 16
_DIGEST_DEVICE_UNLOCK = 17
_DIGEST_HOST_LOCK = 18
_DIGEST_HOST_UNLOCK = 19
_DIGEST_SET_DEVICE = 20
_DIGEST_SET_HOST = 21
_DIGEST_DROP_DEVICE = 22
_DIGEST_DROP_HOST = 23


def is_device_evictable(node: Node) -> bool:
    """Its device pages may go: not locked, and no child would be left behind on the device."""
    return node.device_pages is not None and not node.device_children and not node.device_locks


def is_host_leaf_evictable(node: Node) -> bool:
    """Its host pages may go, and the node with them."""
    return (
        node.host_pages is not None
        and node.device_pages is None
        and not node.children
        and not node.host_locks
        and not node.device_locks
    )


def is_duplicate_evictable(node: Node) -> bool:
    """Its host pages may go because the device holds the same."""
    return node.host_pages is not None and node.device_pages is not None and not node.host_locks


class Residency:
    """Pages, locks and victims of both tiers over the nodes of one tree."""

    def __init__(self, page_size: int, digest: StateDigest, policy: EvictionPolicy) -> None:
        self.page_size = page_size
        self.policy = policy
        self._digest = digest
        self.root = Node(0, None, b"", b"", 0)
        self.root.keys = ()
        self._device_pages = 0
        self._device_pages_locked = 0
        self._host_pages = 0
        self._host_pages_locked = 0
        self._device_queue = VictimQueue(policy, is_device_evictable, bit=1)
        self._host_leaves = VictimQueue(policy, is_host_leaf_evictable, bit=2)
        self._duplicates = VictimQueue(policy, is_duplicate_evictable, bit=4)

    # ---------------------------------------------------------------------------------------- counters

    @property
    def device_tokens(self) -> int:
        return self._device_pages * self.page_size

    @property
    def device_tokens_evictable(self) -> int:
        """What evicting one victim after the other would free, with room on the host for what must move."""
        return (self._device_pages - self._device_pages_locked) * self.page_size

    @property
    def host_tokens(self) -> int:
        return self._host_pages * self.page_size

    @property
    def host_tokens_evictable(self) -> int:
        """Host copies without a host lock."""
        return (self._host_pages - self._host_pages_locked) * self.page_size

    # ------------------------------------------------------------------------------------------- locks

    def lock_device(self, node: Node) -> None:
        """Keep the device pages from the root to `node`.  Nodes inserted below later are not locked."""
        self._digest.mix(_DIGEST_DEVICE_LOCK, node.id)
        above: Node | None = node
        while above is not None:
            if not above.device_locks and above.device_pages is not None:
                self._device_pages_locked += above.page_count
            above.device_locks += 1
            above = above.parent

    def unlock_device(self, node: Node) -> None:
        """Give back one `lock_device` of this node."""
        self._digest.mix(_DIGEST_DEVICE_UNLOCK, node.id)
        above: Node | None = node
        while above is not None:
            if above.device_locks <= 0:
                raise IntegrityError(f"device lock of {above!r} was given back more often than taken")
            above.device_locks -= 1
            if not above.device_locks and above.device_pages is not None:
                self._device_pages_locked -= above.page_count
                if not above.device_children:
                    self._device_queue.push(above)
            elif is_host_leaf_evictable(above):
                self._host_leaves.push(above)
            above = above.parent

    def lock_host(self, node: Node) -> None:
        """Keep the host copies from the root to `node`, those that exist and those that will."""
        self._digest.mix(_DIGEST_HOST_LOCK, node.id)
        above: Node | None = node
        while above is not None:
            if not above.host_locks and above.host_pages is not None:
                self._host_pages_locked += above.page_count
            above.host_locks += 1
            above = above.parent

    def unlock_host(self, node: Node) -> None:
        """Give back one `lock_host` of this node."""
        self._digest.mix(_DIGEST_HOST_UNLOCK, node.id)
        above: Node | None = node
        while above is not None:
            if above.host_locks <= 0:
                raise IntegrityError(f"host lock of {above!r} was given back more often than taken")
            above.host_locks -= 1
            if not above.host_locks and above.host_pages is not None:
                self._host_pages_locked -= above.page_count
                self._offer_host(above)
            above = above.parent

    # ----------------------------------------------------------------------------------------- victims

    def device_victim(self, skip: Container[int] = ()) -> Node | None:
        """The node whose device pages go next, ids in `skip` passed over; None if nothing can go.

        A victim without a host copy may still have host-only children: then the caller gives it a host copy
        first, or drops the subtree.
        """
        return self._device_queue.best(skip)

    def host_victim(self, skip: Container[int] = (), duplicates_first: bool = False) -> Node | None:
        """The node whose host pages go next: host-only leaves and copies of what the device holds."""
        first, second = self._host_leaves, self._duplicates
        if duplicates_first:
            first, second = second, first
        return first.best(skip) or second.best(skip)

    def _offer_host(self, node: Node) -> None:
        if node.device_pages is None:
            if is_host_leaf_evictable(node):
                self._host_leaves.push(node)
        elif not node.host_locks:
            self._duplicates.push(node)

    def _hasten(self, node: Node) -> None:
        """For policies under which an access makes a node leave earlier."""
        self._device_queue.hasten(node)
        self._host_leaves.hasten(node)
        self._duplicates.hasten(node)

    # ----------------------------------------------------------------------------------- gain and lose

    def set_device(self, node: Node, pages: list[int]) -> None:
        """A node that was on the host only is on the device, too (a load-back)."""
        self._check_gain(node, node.device_pages, pages, "device")
        if node.host_pages is None:
            raise IntegrityError(f"{node!r} has been removed: it cannot be loaded back")
        self._digest.mix(_DIGEST_SET_DEVICE, node.id, *pages)
        self._gain_device(node, list(pages))

    def set_host(self, node: Node, pages: list[int]) -> None:
        """A node that was on the device only has a host copy, too."""
        self._check_gain(node, node.host_pages, pages, "host")
        if node.device_pages is None:
            raise IntegrityError(f"{node!r} has been removed: it cannot get a host copy")
        self._digest.mix(_DIGEST_SET_HOST, node.id, *pages)
        self._gain_host(node, list(pages))

    def _check_gain(self, node: Node, held: list[int] | None, pages: list[int], tier: str) -> None:
        if held is not None or len(pages) != node.page_count:
            raise IntegrityError(f"{node!r} cannot take {len(pages)} {tier} pages: it has {held}")

    def _gain_device(self, node: Node, pages: list[int]) -> None:
        parent = node.parent
        if parent is None or (parent.device_pages is None and parent is not self.root):
            raise IntegrityError(f"{node!r} cannot be on the device: its parent {parent!r} is not")
        node.device_pages = pages
        parent.device_children += 1
        self._device_pages += node.page_count
        if node.device_locks:
            self._device_pages_locked += node.page_count
        elif not node.device_children:
            self._device_queue.push(node)
        if node.host_pages is not None and not node.host_locks:
            self._duplicates.push(node)

    def _gain_host(self, node: Node, pages: list[int]) -> None:
        node.host_pages = pages
        self._host_pages += node.page_count
        if node.host_locks:
            self._host_pages_locked += node.page_count
        else:
            self._offer_host(node)

    def _lose_device(self, node: Node) -> list[int]:
        pages, parent = node.device_pages, node.parent
        if pages is None or parent is None or not is_device_evictable(node):
            raise IntegrityError(f"{node!r} cannot leave the device: locked, absent, or above one that stays")
        self._digest.mix(_DIGEST_DROP_DEVICE, node.id)
        node.device_pages = None
        parent.device_children -= 1
        self._device_pages -= node.page_count
        if is_device_evictable(parent):
            self._device_queue.push(parent)
        if node.host_pages is not None:
            self._offer_host(node)
        return pages

    def _lose_host(self, node: Node) -> list[int]:
        pages = node.host_pages
        if pages is None or node.host_locks:
            raise IntegrityError(f"{node!r} cannot lose its host copy: locked or absent")
        self._digest.mix(_DIGEST_DROP_HOST, node.id)
        node.host_pages = None
        self._host_pages -= node.page_count
        return pages
