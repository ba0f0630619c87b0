"""The prefix tree: which sequences of pages are cached, and on which tiers.

The scheduler core and the cache controller call it, on the scheduler thread.  It holds page numbers and never
page contents; it allocates and frees nothing: pages that the caller has to free are returned to it.  Whole
pages only.  Pure: no clock (time is the tick number), no thread, no randomness, so that every rank holds the
same tree.

Keys are flat bytes (`encode_tokens`), compared by slices at the speed of memcmp; a child is found by its
whole first page, so two children of a node always differ in their first page:

    root ── seed+page ──▶ [p0 p1 p2] ── page ──▶ [p3 p4]
                              └──────── page ──▶ [q3]             a request p0 p1 p2 q3 q4 matches 4 pages
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sglang_hicache.cache.digest import StateDigest
from sglang_hicache.cache.evict import EvictionPolicy
from sglang_hicache.cache.node import Node
from sglang_hicache.cache.page import KEY_BYTES, TOKEN_BYTES
from sglang_hicache.cache.residency import Residency
from sglang_hicache.errors import IntegrityError

__all__ = ["Insertion", "Match", "Node", "PrefixTree", "Watcher"]

_DIGEST_INSERT = 32
_DIGEST_INSERT_HOST = 33
_DIGEST_SPLIT = 34
_DIGEST_TOUCH = 35
_DIGEST_REMOVE = 36
_DIGEST_RESET = 37


@dataclass(slots=True)
class Match:
    """The longest cached prefix of a key.  Lengths in tokens, whole pages."""

    #: Deepest node of the part that is on the device; the root if there is none.
    device_node: Node
    #: Deepest node of the whole match.
    host_node: Node
    #: Pages of the device part, in order.  The caller's own list.
    device_pages: list[int]
    device_len: int
    #: What follows the device part and is on the host only.
    host_len: int


class Watcher:
    """Told what becomes of nodes; the backup keeps books of them.  Pages leave in many ways, and whoever had to
    remember to report each of them would forget one.  This one does not care."""

    def divided(self, upper: Node, lower: Node) -> None:
        """`lower` gave its first pages to the new node `upper`, which is its parent now."""

    def left_host(self, node: Node) -> None:
        """The host copy has been given up."""

    def removed(self, node: Node, had_host: bool) -> None:
        """No tier holds the node any more; `had_host`: the host did to the last.  It still names its parent."""


@dataclass(slots=True)
class Insertion:
    """What became of a request's pages."""

    #: The node that ends with the inserted key (the root for an empty key).
    node: Node
    #: Pages of the request whose place in the tree was taken by other pages: the caller frees them.
    duplicates: list[int]
    #: Nodes from below the root to `node`.
    path: list[Node]


class PrefixTree(Residency):
    """Every cached prefix of every tenant, on both tiers."""

    def __init__(self, page_size: int, digest: StateDigest, policy: EvictionPolicy) -> None:
        super().__init__(page_size, digest, policy)
        self._page_bytes = page_size * TOKEN_BYTES
        self._last_id = 0
        self.watcher = Watcher()

    # -------------------------------------------------------------------------------- match and insert

    def match(self, seed: bytes, key: bytes) -> Match:
        """The longest cached prefix of `key`, whole pages.

        May split a node so that the match ends with one; does not change the order of eviction (`touch`).
        """
        path = self._walk(seed, key)
        device_node = host_node = self.root
        device_pages: list[int] = []
        for node in path:
            if node.device_pages is None:
                break
            device_pages += node.device_pages
            device_node = node
        if path:
            host_node = path[-1]
        matched_pages = host_node.depth_pages + host_node.page_count
        device_len = len(device_pages) * self.page_size
        return Match(device_node, host_node, device_pages, device_len, matched_pages * self.page_size - device_len)

    def touch(self, node: Node, tick: int) -> None:
        """`node`, and with it its prefix, was used in this tick."""
        self._digest.mix(_DIGEST_TOUCH, node.id, tick)
        hastens = self.policy.access_hastens
        above: Node | None = node
        # An ancestor was used whenever a descendant was, so the first one with this tick ends the way.
        while above is not None and above.last_access < tick:
            above.last_access = tick
            if hastens:
                self._hasten(above)
            above = above.parent

    def insert(self, seed: bytes, key: bytes, device_pages: list[int], tick: int, priority: int = 0) -> Insertion:
        """The whole of `key` is on the device now, one page number per page from the root on.

        Where the tree already holds a page on the device it keeps its own, and the request's page, if it is
        another one, comes back as a duplicate.  A node on the way that was on the host only is now on both.
        """
        if len(device_pages) * self._page_bytes != len(key):
            raise IntegrityError(f"{len(device_pages)} pages for a key of {len(key)} bytes")
        path = self._walk(seed, key)
        duplicates: list[int] = []
        at = 0
        for node in path:
            pages = device_pages[at : at + node.page_count]
            at += node.page_count
            if node.device_pages is None:
                self._gain_device(node, pages)
            elif pages != node.device_pages:
                duplicates += [mine for mine, held in zip(pages, node.device_pages) if mine != held]
            if node.priority < priority:
                node.priority = priority
        bottom = path[-1] if path else self.root
        self.touch(bottom, tick)
        if at < len(device_pages):
            leaf = self._add(bottom, seed, key[at * self._page_bytes :], tick, priority)
            self._gain_device(leaf, device_pages[at:])
            path.append(leaf)
            bottom = leaf
        self._digest.mix(_DIGEST_INSERT, bottom.id, at, len(device_pages), priority)
        return Insertion(bottom, duplicates, path)

    def insert_host(
        self, seed: bytes, key: bytes, start_page: int, host_pages: list[int], tick: int, priority: int = 0
    ) -> tuple[Node | None, list[int]]:
        """Pages [start_page, start_page + len(host_pages)) of `key` are on the host now (a prefetch).

        Returns the node that ends with them and the pages that the tree did not take.  If the prefix before
        `start_page` is gone, that is (None, all of them): a node cannot hang in the air.
        """
        end_page = start_page + len(host_pages)
        key = key[: end_page * self._page_bytes]
        if len(key) != end_page * self._page_bytes:
            raise IntegrityError(f"host pages up to page {end_page} for a key of {len(key)} bytes")
        path = self._walk(seed, key)
        bottom = path[-1] if path else self.root
        held = bottom.depth_pages + bottom.page_count
        if held < start_page:
            return None, host_pages
        self.touch(bottom, tick)
        fresh = host_pages[held - start_page :]
        if fresh:
            bottom = self._add(bottom, seed, key[held * self._page_bytes :], tick, priority)
            self._gain_host(bottom, fresh)
        self._digest.mix(_DIGEST_INSERT_HOST, bottom.id, start_page, *fresh)
        return bottom, host_pages[: held - start_page]

    # ------------------------------------------------------------------------------------------ remove

    def drop_device(self, node: Node) -> list[int]:
        """Take the node off the device; it is removed if the host does not hold it.  The caller frees."""
        if node.host_pages is None and node.children:
            raise IntegrityError(f"{node!r} cannot leave the device: it would leave its children in the air")
        pages = self._lose_device(node)
        if node.host_pages is None:
            self._remove(node, had_host=False)
        return pages

    def clear_host(self, node: Node) -> list[int]:
        """Take the node off the host; it is removed if the device does not hold it.  The caller frees."""
        if node.device_pages is None and (node.children or node.device_locks):
            raise IntegrityError(f"{node!r} cannot leave the host: it has children or a device lock")
        pages = self._lose_host(node)
        self.watcher.left_host(node)
        if node.device_pages is None:
            self._remove(node, had_host=True)
        return pages

    def drop_subtree(self, node: Node) -> tuple[list[int], list[int]]:
        """Remove the node and everything below, which nobody may have locked: (device pages, host pages)."""
        doomed = list(node.subtree())
        for below in doomed:
            if below.device_locks or below.host_locks:
                raise IntegrityError(f"{node!r} cannot be dropped: {below!r} is locked")
        device_pages: list[int] = []
        host_pages: list[int] = []
        for below in reversed(doomed):
            had_host = below.host_pages is not None
            if had_host:
                host_pages += self._lose_host(below)
                self.watcher.left_host(below)
            if below.device_pages is not None:
                device_pages += self._lose_device(below)
            self._remove(below, had_host)
        return device_pages, host_pages

    def reset(self) -> tuple[list[int], list[int]]:
        """Forget everything: (device pages, host pages).  Nothing may be locked."""
        if self.root.device_locks or self.root.host_locks:
            raise IntegrityError(
                f"the tree cannot be emptied: {self.root.device_locks} device and {self.root.host_locks} host locks"
            )
        device_pages: list[int] = []
        host_pages: list[int] = []
        for node in self.nodes():
            device_pages += node.device_pages or ()
            host_pages += node.host_pages or ()
            node.device_pages = node.host_pages = None
        self.root.children.clear()
        self.root.device_children = 0
        self._device_pages = self._host_pages = 0
        for queue in (self._device_queue, self._host_leaves, self._duplicates):
            queue.clear()
        self._digest.mix(_DIGEST_RESET, len(device_pages), len(host_pages))
        return device_pages, host_pages

    # ------------------------------------------------------------------------------------------ look up

    def span(self, node: Node, pages: int) -> list[Node]:
        """The nodes that cover the last `pages` pages up to the end of `node`, top first.

        An op remembers (bottom node, pages): splits since then only divide the span, because the lower half
        of a split keeps its identity.
        """
        nodes: list[Node] = []
        above: Node | None = node
        left = pages
        while left > 0 and above is not None and above is not self.root:
            nodes.append(above)
            left -= above.page_count
            above = above.parent
        if left:
            raise IntegrityError(f"no span of {pages} pages ends with {node!r}")
        nodes.reverse()
        return nodes

    def subtree(self, node: Node) -> Iterator[Node]:
        """The node and everything below, parents first, in an order that is the same on every rank."""
        return node.subtree()

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root, in the order of `subtree`."""
        walk = self.root.subtree()
        next(walk)
        return walk

    def is_root(self, node: Node | None) -> bool:
        return node is self.root

    def holds(self, node: Node) -> bool:
        """The node has not been removed."""
        return node is self.root or node.device_pages is not None or node.host_pages is not None

    def keys_of(self, node: Node) -> list[bytes]:
        """Page keys of the node, in a list of the caller's own."""
        return list(node.page_keys())

    def parent_key(self, node: Node) -> bytes:
        """Key of the page before the node, b"" where there is none."""
        if node.depth_pages == 0 or node.parent is None:
            return b""
        return node.parent.page_keys()[-1]

    def last_key(self, node: Node, seed: bytes) -> bytes:
        """What the key of the page after `node` is chained to: its last key, at the root the seed."""
        return seed if node is self.root else node.page_keys()[-1]

    def holder(self, seed: bytes, key: bytes, page: int) -> Node | None:
        """The node that holds page `page` of `key`, None if the tree does not.  Like a match it may split a node."""
        path = self._walk(seed, key[: (page + 1) * self._page_bytes])
        return path[-1] if path and path[-1].end_pages == page + 1 else None

    # ---------------------------------------------------------------------------------------- structure

    def _walk(self, seed: bytes, key: bytes) -> list[Node]:
        """Nodes from below the root that together are the longest cached prefix of `key`."""
        page_bytes = self._page_bytes
        path: list[Node] = []
        if len(key) < page_bytes:
            # Not only shorter: at the root, a seed with less than a page behind it could equal another page.
            return path
        child = self.root.children.get(seed + key[:page_bytes])
        at = 0
        while child is not None:
            if not key.startswith(child.key, at):
                path.append(self.split(child, _common_pages(child.key, key, at, page_bytes)))
                break
            path.append(child)
            at += len(child.key)
            child = child.children.get(key[at : at + page_bytes])
        return path

    def split(self, node: Node, pages: int) -> Node:
        """Put the first `pages` pages of the node into a new node above it, and return that.

        The lower half keeps its identity and so do the locks and ops that hold it.  Every lock of the node
        holds its ancestors too, hence the upper half starts with the same counts.
        """
        parent = node.parent
        if parent is None or not 0 < pages < node.page_count:
            raise IntegrityError(f"{node!r} cannot be split after {pages} pages")
        cut = pages * self._page_bytes
        self._last_id += 1
        upper = Node(self._last_id, parent, node.seed, node.key[:cut], pages)
        upper.stored, upper.lost, upper.landing = node.stored, node.lost, node.landing
        upper.hit_count, upper.priority = node.hit_count, node.priority
        upper.last_access, upper.created = node.last_access, node.created
        upper.device_locks, upper.host_locks = node.device_locks, node.host_locks
        parent.children[self._child_key(parent, node)] = upper
        node.parent = upper
        node.key = node.key[cut:]
        node.page_count -= pages
        node.depth_pages += pages
        upper.children[node.key[: self._page_bytes]] = node
        if node.keys is not None:
            upper.keys, node.keys = node.keys[:pages], node.keys[pages:]
        if node.device_pages is not None:
            upper.device_pages, node.device_pages = node.device_pages[:pages], node.device_pages[pages:]
            upper.device_children = 1
        if node.host_pages is not None:
            upper.host_pages, node.host_pages = node.host_pages[:pages], node.host_pages[pages:]
            self._offer_host(upper)
        self.watcher.divided(upper, node)
        self._digest.mix(_DIGEST_SPLIT, node.id, upper.id, pages)
        return upper

    def _add(self, parent: Node, seed: bytes, key: bytes, tick: int, priority: int) -> Node:
        """A new leaf, on no tier yet: the caller gives it pages at once."""
        if parent is self.root and len(seed) not in (0, KEY_BYTES):
            raise IntegrityError(f"a seed of {len(seed)} bytes: children of the root would be ambiguous")
        self._last_id += 1
        node = Node(self._last_id, parent, seed, key, len(key) // self._page_bytes)
        node.last_access = node.created = tick
        node.priority = priority
        parent.children[self._child_key(parent, node)] = node
        return node

    def _remove(self, node: Node, had_host: bool) -> None:
        parent = node.parent
        if parent is None:
            raise IntegrityError("the root of the tree cannot be removed")
        self.watcher.removed(node, had_host)
        del parent.children[self._child_key(parent, node)]
        self._digest.mix(_DIGEST_REMOVE, node.id)
        if parent.host_pages is not None:
            self._offer_host(parent)

    def _child_key(self, parent: Node, node: Node) -> bytes:
        first_page = node.key[: self._page_bytes]
        return node.seed + first_page if parent is self.root else first_page

    def __repr__(self) -> str:
        return (
            f"<PrefixTree {self._device_pages} device pages ({self._device_pages_locked} locked)"
            f" {self._host_pages} host pages ({self._host_pages_locked} locked)>"
        )


def _common_pages(node_key: bytes, key: bytes, at: int, page_bytes: int) -> int:
    """Whole pages that `node_key` and `key[at:]` share, at least one: bisection, each step one memcmp."""
    same = 1
    most = min(len(node_key), len(key) - at) // page_bytes
    while same < most:
        middle = (same + most + 1) // 2
        if key.startswith(node_key[same * page_bytes : middle * page_bytes], at + same * page_bytes):
            same = middle
        else:
            most = middle - 1
    return same
