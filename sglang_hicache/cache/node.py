"""One node of the prefix tree: a run of whole pages that every sequence through it shares.

A node is plain data that the tree, its residency and its eviction queues keep consistent; nobody else
assigns its fields, except the controller for `hit_count` and the backup for `stored` and `lost`.  Scheduler
thread only.
"""

from __future__ import annotations

from collections.abc import Iterator

from sglang_hicache.cache.loss import Loss
from sglang_hicache.cache.page import flat_page_keys


class Node:
    """Pages [depth_pages, depth_pages + page_count) of the sequences below it."""

    __slots__ = (
        "children",
        "created",
        "depth_pages",
        "device_children",
        "device_locks",
        "device_pages",
        "hit_count",
        "host_locks",
        "host_pages",
        "id",
        "key",
        "keys",
        "landing",
        "last_access",
        "lost",
        "page_count",
        "parent",
        "priority",
        "queued",
        "seed",
        "stored",
    )

    def __init__(self, node_id: int, parent: Node | None, seed: bytes, key: bytes, page_count: int) -> None:
        #: A counter of the tree: the same on every rank, never reused.
        self.id = node_id
        #: None for the root only.  A removed node keeps it, so that a lock taken before can be given back.
        self.parent = parent
        #: By the first page of the child's key; at the root by the seed and that page.
        self.children: dict[bytes, Node] = {}
        #: Tenant of the sequences below; begins the hash chain.
        self.seed = seed
        #: Tokens as encoded by `encode_tokens`, a whole number of pages.
        self.key = key
        self.page_count = page_count
        #: Pages from the root to the start of this node.
        self.depth_pages = 0 if parent is None else parent.depth_pages + parent.page_count
        #: One page number per page, or None: not on this tier.  Both None: the node has been removed.
        self.device_pages: list[int] | None = None
        self.host_pages: list[int] | None = None
        #: Op that copies these pages to the host, 0: none.  Until it has ended on every rank, host pages that the node
        #: already has hold other bytes: only a load-back, which is queued behind the copy, may use them.
        self.landing = 0
        #: (epoch, store generation) in which every rank closed the write of these pages; a hint.
        self.stored: tuple[int, int] | None = None
        #: Why the store does not have these pages although it should; None: nobody has given them up.  Counted once,
        #: and taken back when they are stored after all.
        self.lost: Loss | None = None
        #: Requests that inserted this prefix, counted by the controller.
        self.hit_count = 0
        #: Ticks.  A parent's last access is never before its child's.
        self.last_access = 0
        self.created = 0
        #: Highest priority of the requests that inserted this prefix.
        self.priority = 0
        #: Each lock counts on the locked node and on all its ancestors.
        self.device_locks = 0
        self.host_locks = 0
        #: Children that are on the device.
        self.device_children = 0
        #: Bits of the eviction queues that hold an entry for this node.
        self.queued = 0
        #: Page keys once somebody asked for them.  They depend on nothing but tokens and seed, so they can be
        #: computed at any time and stay right for ever; a split divides them.
        self.keys: tuple[bytes, ...] | None = None

    @property
    def end_pages(self) -> int:
        """Pages from the root to the end of this node."""
        return self.depth_pages + self.page_count

    def page_keys(self) -> tuple[bytes, ...]:
        """Keys of this node's pages, chained from the first token of the sequence.

        The chain never starts in the middle: keys that skipped an uncomputed parent would claim a prefix
        that they do not cover, and another request would be given somebody else's pages.
        """
        if self.keys is not None:
            return self.keys
        missing: list[Node] = []
        node: Node | None = self
        while node is not None and node.keys is None:
            missing.append(node)
            node = node.parent
        # The root has no keys and passes on no digest: the chain of a tenant begins with its seed.
        previous = node.keys[-1] if node is not None and node.keys else self.seed
        while missing:
            node = missing.pop()
            node.keys = tuple(flat_page_keys(node.key, len(node.key) // node.page_count, previous))
            previous = node.keys[-1]
        return self.keys or ()

    def subtree(self) -> Iterator[Node]:
        """This node and everything below, parents first, children in the order in which they were added."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children.values()))

    def __repr__(self) -> str:
        tiers = "+".join(
            name for name, pages in (("device", self.device_pages), ("host", self.host_pages)) if pages is not None
        )
        locks = f" locks={self.device_locks}/{self.host_locks}" if self.device_locks or self.host_locks else ""
        return f"<Node {self.id} pages {self.depth_pages}..{self.end_pages} {tiers or 'nowhere'}{locks}>"
