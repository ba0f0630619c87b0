"""Integrity of tree and pools: every promise between them, recomputed from scratch.

Called by tests after each step and by a rank in debug mode; O(everything), so never on a normal tick, but for
`check_counts`, which compares counters.  It changes nothing and raises `IntegrityError` that says what is wrong and
where.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sglang_hicache.cache.node import Node
from sglang_hicache.cache.op import COPIES, OpTable
from sglang_hicache.cache.page import TOKEN_BYTES, flat_page_keys
from sglang_hicache.cache.pools import PageAllocator
from sglang_hicache.cache.residency import is_device_evictable, is_duplicate_evictable, is_host_leaf_evictable
from sglang_hicache.cache.tree import PrefixTree
from sglang_hicache.errors import IntegrityError
from sglang_hicache.storage.attachment import StorageSlot

_NO_HOLDERS: Mapping[str, Iterable[int]] = {}


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise IntegrityError(what)


def check_tree(tree: PrefixTree) -> None:
    """Structure, residency, locks, counters, queues and page keys of one tree."""
    totals = dict.fromkeys(("device", "device locked", "host", "host locked"), 0)
    _check_children(tree, tree.root)
    for node in tree.nodes():
        _check_shape(tree, node)
        _check_children(tree, node)
        _check_residency(tree, node)
        _check_queued(node)
        if node.device_pages is not None:
            totals["device"] += node.page_count
            totals["device locked"] += node.page_count if node.device_locks else 0
        if node.host_pages is not None:
            totals["host"] += node.page_count
            totals["host locked"] += node.page_count if node.host_locks else 0
    counted = {
        "device": tree.device_tokens // tree.page_size,
        "device locked": (tree.device_tokens - tree.device_tokens_evictable) // tree.page_size,
        "host": tree.host_tokens // tree.page_size,
        "host locked": (tree.host_tokens - tree.host_tokens_evictable) // tree.page_size,
    }
    _demand(totals == counted, f"{tree!r} counts {counted} pages but its nodes have {totals}")
    check_keys(tree)


def _check_shape(tree: PrefixTree, node: Node) -> None:
    page_bytes = tree.page_size * TOKEN_BYTES
    parent = node.parent
    if parent is None:
        raise IntegrityError(f"{node!r} has no parent")
    _demand(node.page_count > 0, f"{node!r} has no pages")
    _demand(len(node.key) == node.page_count * page_bytes, f"{node!r} has a key of {len(node.key)} bytes")
    _demand(node.depth_pages == parent.end_pages, f"{node!r} does not begin where {parent!r} ends")
    _demand(parent is tree.root or node.seed == parent.seed, f"{node!r} and {parent!r} differ in their tenant")
    _demand(node.last_access <= parent.last_access or parent is tree.root, f"{node!r} is younger than {parent!r}")
    for tier, pages in (("device", node.device_pages), ("host", node.host_pages)):
        _demand(pages is None or len(pages) == node.page_count, f"{node!r} has {pages} on {tier}")


def _check_children(tree: PrefixTree, node: Node) -> None:
    page_bytes = tree.page_size * TOKEN_BYTES
    for first, child in node.children.items():
        wanted = child.key[:page_bytes]
        _demand(first == (child.seed + wanted if node is tree.root else wanted), f"{child!r} is filed wrongly")
        _demand(child.parent is node, f"{child!r} is below {node!r} and names {child.parent!r} as its parent")
    on_device = sum(child.device_pages is not None for child in node.children.values())
    _demand(node.device_children == on_device, f"{node!r} counts {node.device_children} of {on_device} children")
    # At least: a lock that was taken below a node removed since still counts on the ancestors.
    device_locks = sum(child.device_locks for child in node.children.values())
    host_locks = sum(child.host_locks for child in node.children.values())
    _demand(node.device_locks >= device_locks, f"{node!r} does not carry the {device_locks} device locks below")
    _demand(node.host_locks >= host_locks, f"{node!r} does not carry the {host_locks} host locks below")


def _check_residency(tree: PrefixTree, node: Node) -> None:
    _demand(tree.holds(node), f"{node!r} is in the tree and on no tier")
    parent = node.parent
    if parent is None or parent is tree.root:
        return
    _demand(tree.holds(parent), f"{node!r} hangs in the air: {parent!r}")
    _demand(
        node.device_pages is None or parent.device_pages is not None,
        f"{node!r} is on the device and its parent {parent!r} is not",
    )


def _check_queued(node: Node) -> None:
    """Whoever may leave stands in the line: a node that is missing there is never evicted."""
    for is_evictable, bit in ((is_device_evictable, 1), (is_host_leaf_evictable, 2), (is_duplicate_evictable, 4)):
        _demand(not is_evictable(node) or bool(node.queued & bit), f"{node!r} can be evicted and is not queued ({bit})")


def check_residency(tree: PrefixTree) -> None:
    """Every prefix is whole: no node hangs below one that is nowhere, or on the device below one that is not."""
    for node in tree.nodes():
        _check_residency(tree, node)


def check_keys(tree: PrefixTree) -> None:
    """Page keys that were computed some time ago equal those computed now from the first token."""
    page_bytes = tree.page_size * TOKEN_BYTES
    last_keys: dict[int, bytes] = {}
    for node in tree.nodes():
        previous = node.seed if node.depth_pages == 0 or node.parent is None else last_keys[node.parent.id]
        keys = flat_page_keys(node.key, page_bytes, previous)
        last_keys[node.id] = keys[-1]
        _demand(node.keys is None or list(node.keys) == keys, f"{node!r} holds wrong page keys")


def check_unlocked(tree: PrefixTree) -> None:
    """No lock is held anywhere: true whenever the rank is idle."""
    for node in (tree.root, *tree.nodes()):
        _demand(not node.device_locks and not node.host_locks, f"{node!r} is locked on an idle rank")


def check_pools(
    tree: PrefixTree,
    device: PageAllocator,
    host: PageAllocator | None,
    device_holders: Mapping[str, Iterable[int]] = _NO_HOLDERS,
    host_holders: Mapping[str, Iterable[int]] = _NO_HOLDERS,
) -> None:
    """Every page that is handed out has exactly one owner: the tree or one of the named holders.

    Holders are what owns pages outside the tree: requests (their pages that are not the tree's), ops,
    quarantine.
    """
    nodes = list(tree.nodes())
    _check_pool(device, {"tree": [p for n in nodes for p in n.device_pages or ()], **device_holders})
    in_tree = [p for n in nodes for p in n.host_pages or ()]
    if host is not None:
        _check_pool(host, {"tree": in_tree, **host_holders})
    else:
        _demand(not in_tree, f"{len(in_tree)} host pages in the tree of a server without a host pool")


@dataclass(frozen=True, slots=True)
class Held:
    """What owners outside the tree hold of it and of the pools, counted."""

    #: Pages that belong to requests and ops.
    device_pages: int
    host_pages: int
    #: Locks taken and not given back.
    device_locks: int
    host_locks: int


def check_counts(tree: PrefixTree, device: PageAllocator, host: PageAllocator | None, held: Held) -> None:
    """`check_pools` and `check_unlocked` as far as counters can tell: O(1), for after every tick.

    Every lock counts on the root, too, so the root knows how many there are.
    """
    for pool, tokens, outside in (
        (device, tree.device_tokens, held.device_pages), (host, tree.host_tokens, held.host_pages)
    ):
        owned = tokens // tree.page_size + outside
        used = pool.used_count if pool is not None else 0
        _demand(owned == used, f"{pool!r}: {used} pages are used, {owned} have an owner")
    locks = tree.root.device_locks, tree.root.host_locks
    _demand(
        locks == (held.device_locks, held.host_locks),
        f"{locks} device and host locks in the tree, {held.device_locks} and {held.host_locks} have an owner",
    )


def check_in_flight(ops: OpTable, slot: StorageSlot) -> None:
    """The slot counts exactly the ops of the table: a drain ends with the last of them, not before and not never."""
    in_table = Counter(op.epoch for op in ops if op.kind not in COPIES)
    counted = {attachment.epoch: attachment.in_flight for attachment in slot.places() if attachment.in_flight}
    _demand(in_table == counted, f"{slot!r} counts {counted} ops by epoch, the table has {dict(in_table)}")


def _check_pool(pool: PageAllocator, holders: Mapping[str, Iterable[int]]) -> None:
    owner: dict[int, str] = {}
    for name, pages in holders.items():
        for page in pages:
            _demand(page not in owner, f"{pool!r}: page {page} belongs to {owner.get(page)} and to {name}")
            owner[page] = name
    used = pool.used_pages()
    _demand(len(used) == pool.used_count, f"{pool!r} counts {pool.used_count} used pages and marks {len(used)}")
    leaked = [page for page in used if page not in owner]
    _demand(not leaked, f"{pool!r}: nobody owns the pages {leaked[:10]} ({len(leaked)} in all)")
    freed = sorted(owner.keys() - set(used))
    _demand(not freed, f"{pool!r}: pages {freed[:10]} are in use by {owner.get(freed[0]) if freed else ''} but free")
