"""Host -> storage: which nodes are offered to the store, parents first.

A node is offered when it has a host copy and is not yet marked stored under the present tag (epoch, store
generation); it is written only after its parent is so marked, so what the store holds is prefix-closed and no page
is written that no look-up could reach.  "Stored" is a hint: detach, switch and clear change the tag, and the next
request that touches a node offers it again.  Replicated; changed only by `apply`.
"""

from __future__ import annotations

from collections import Counter

from sglang_hicache import wire
from sglang_hicache.cache.controller import CacheController
from sglang_hicache.cache.op import Op, OpKind
from sglang_hicache.cache.storage_ops import StorageOps
from sglang_hicache.cache.tree import Node
from sglang_hicache.errors import IntegrityError

#: Nodes that may wait to be written; beyond it the oldest is dropped and counted (it is offered again when touched).
MAX_QUEUED = 16384
#: Writes in flight: enough to keep the lane busy while answers travel, few enough to drain fast.
MAX_WRITES = 16


class BackupQueue:
    """Nodes that wait for their turn, and the writes under way."""

    def __init__(self, controller: CacheController, storage: StorageOps, page_size: int) -> None:
        self._controller = controller
        self._storage = storage
        self._page_size = page_size
        self._queue: dict[int, Node] = {}
        #: By node id: writes under way, and writes of lost attachments that still hold their pages.
        self._writing: dict[int, Op] = {}
        #: In tokens.
        self.counters: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._queue)

    def offer(self, nodes: list[Node]) -> None:
        """Nodes that have, or may have, a host copy: queue those that the store lacks."""
        tag = self._storage.tag
        if tag is None:
            return
        for node in nodes:
            if node.host_pages is not None and node.stored != tag and node.id not in self._writing:
                self._queue[node.id] = node
        while len(self._queue) > MAX_QUEUED:
            dropped = self._queue.pop(next(iter(self._queue)))
            self.counters["queue_full"] += dropped.page_count * self._page_size

    def can_start(self) -> bool:
        """A call of `pump` would start something, or empty the queue."""
        return bool(self._queue) and self._storage.count(OpKind.WRITE) < MAX_WRITES

    def pump(self, now_us: int) -> None:
        """Start as many writes as may run."""
        tag = self._storage.tag
        if tag is None:
            self._queue.clear()  # the tag is gone with its attachment; touched nodes are offered to the next one
            return
        while self.can_start():
            node = self._queue.pop(next(iter(self._queue)))
            first = self._first_missing(node, tag)
            if first is not None:
                self._write(first, now_us)

    def _first_missing(self, node: Node, tag: tuple[int, int]) -> Node | None:
        """The highest node on the way to this one that the store lacks; None if nothing can be written now."""
        tree = self._controller.tree
        if node.host_pages is None or node.landing or node.stored == tag:
            return None
        first = node
        while not tree.is_root(first.parent) and first.parent.stored != tag:
            first = first.parent
            if first.id in self._writing:
                return None  # its end offers the children
            if first.landing:
                return None  # so does the end of its copy
            if first.host_pages is None:
                self.counters["ancestor_not_on_host"] += node.page_count * self._page_size
                return None
        return None if first.id in self._writing else first

    def _write(self, node: Node, now_us: int) -> None:
        op = self._storage.admit(OpKind.WRITE, node.page_count, now_us)
        if op is None:
            raise IntegrityError(f"storage is on, fewer than {MAX_WRITES} writes run, and it takes none of {node!r}")
        op.node = node
        self._queue.pop(node.id, None)
        self._writing[node.id] = op
        tree = self._controller.tree
        tree.lock_host(node)
        self._storage.send(op, wire.WritePages(
            op_id=op.id, keys=tree.keys_of(node), host_pages=list(node.host_pages or ()),
            parent=tree.parent_key(node), depth=node.depth_pages,
        ))

    def close(self, op: Op) -> None:
        """Every rank has let go of the pages: mark what is stored, offer the children."""
        node = self._end(op)
        self._storage.close(op)
        self.counters["backuped"] += op.done * self._page_size
        self.counters["failed"] += (op.pages - op.done) * self._page_size
        tag = (op.epoch, op.generation)
        if node is None or not self._storage.is_stored(tag):
            return
        covered = 0
        for part in self._controller.tree.span(node, op.pages):
            covered += part.page_count
            if covered > op.done:
                return
            part.stored = tag
            self.offer(list(part.children.values()))

    def epoch_gone(self, op: Op) -> None:
        """The op went with its attachment."""
        self._end(op)
        self.counters["detached"] += op.pages * self._page_size

    def before_flush(self) -> list[int]:
        """Writes in quarantine take their pages out of the tree, which forgets them: the pages are returned."""
        taken: dict[int, None] = {}
        for op in list(self._writing.values()):
            node = self._end(op)
            for part in self._controller.tree.span(node, op.pages) if node is not None else ():
                # Two writes share pages if a node was split under the first one: the first keeps them.
                fresh = [page for page in part.host_pages or () if page not in taken]
                op.host_pages += fresh
                taken |= dict.fromkeys(fresh)
            op.node = None
        return list(taken)

    def _end(self, op: Op) -> Node | None:
        node = op.node
        if node is not None:
            self._writing.pop(node.id, None)
            self._controller.tree.unlock_host(node)
        return node
