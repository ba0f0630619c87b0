"""Host -> storage: which nodes are offered to the store, parents first, and what becomes of every one of them.

A node is offered when it has a host copy and is not marked stored under the present tag (epoch, store generation):
when its copy has landed, when a request comes by, when its parent is stored.  Its parent is stored or waits, too, so
that what the store holds is prefix-closed.  Who is given up is *dirty*: offered again when a request touches it the
next time, or storage is attached anew.

    offered -> PARENT -> LINE -> WRITING -> stored          turns of a node: `backup_line.py`
                          ^         |
                        RETRY <-----'  stopped short: the node is divided, and the rest is tried again
    any of them -> lost, for a `Loss` -> offered again

`BackupLine` knows who waits, `backup_pace.py` when a write may start, `BackupWriter` writes, and `Books` counts.

Attaching offers what device and host hold already, as uploads: in the background, behind every fresh backup.

"Stored" is a hint: detach, switch, clear and a read that comes back short take it back.  A switch loses nobody: who
waited for the old store waits for the new one, behind what must lie before it there.  Replicated; changed only by
`apply`.
"""

from __future__ import annotations

from collections import deque

from sglang_hicache.cache.backup_books import Books
from sglang_hicache.cache.backup_line import BackupLine, Turn, Waiting
from sglang_hicache.cache.controller import CacheController
from sglang_hicache.cache.known_pages import KnownPages
from sglang_hicache.cache.loss import Loss
from sglang_hicache.cache.storage_ops import StorageOps
from sglang_hicache.cache.tree import Node, Watcher
from sglang_hicache.errors import IntegrityError

#: Nodes that may wait to be written; beyond it the oldest is dropped and counted (it is offered again when touched).
MAX_QUEUED = 16384


class BackupQueue(Watcher):
    """Nodes that wait to be written."""

    def __init__(
        self, controller: CacheController, storage: StorageOps, known: KnownPages, page_size: int
    ) -> None:
        self._controller = controller
        self._tree = controller.tree
        self._storage = storage
        self.known = known
        #: What is stored now is marked with this: (epoch, store generation); None: storage is off.
        self.tag: tuple[int, int] | None = None
        self.line = BackupLine()
        self.books = Books(page_size)
        #: Nodes on the device only: an upload copies those to the host that the policy wants there, while there is
        #: room.
        self.to_copy: deque[Node] = deque()
        #: Pages of the latest upload when it began.
        self.upload_pages = 0
        #: Why a node that waits when the attachment ends is lost.
        self.ending = Loss.DETACHED
        #: Somebody came since `BackupWriter` looked.
        self.has_news = False
        #: Nothing is started: the weights are about to change.
        self.is_held = False
        self._tree.watcher = self

    def __len__(self) -> int:
        """Fresh backups that wait.  Uploads are nobody's obligation: a detach drops them."""
        return len(self.line)

    def uploads_left(self) -> int:
        """Pages that the upload has still to write."""
        return self.line.uploads.pages + sum(node.page_count for node in self.to_copy)

    # ---------------------------------------------------------------------------------------- who is offered

    def follow(self) -> bool:
        """Storage may have been attached, detached or cleared.  True: another one than before is attached."""
        tag = self._storage.tag
        if tag == self.tag:
            return False
        before, self.tag = self.tag, tag
        if tag is None:
            self.give_up_all(self.ending)
            return False
        is_another = before is None or before[0] != tag[0]
        if is_another:
            self.to_copy.clear()
            self.books.attached()
        self._offer_parents_again(is_another)
        return is_another

    def offer(self, nodes: list[Node]) -> None:
        """A request came by these nodes, or their copies have landed; parents first."""
        for node in nodes:
            self._offer(node, is_upload=False)
        while len(self.line) > MAX_QUEUED and (oldest := self.line.oldest()) is not None:
            self.lose(oldest.node, Loss.QUEUE_FULL)

    def _offer(self, node: Node, is_upload: bool) -> None:
        """Let a node wait, if the store lacks it and its parent is stored or waits, too."""
        if self.tag is None or node.host_pages is None or node.landing or node.stored == self.tag:
            return
        entry = self.line.get(node)
        if entry is None and self._may_follow(node):  # if not, its parent will offer it
            self.books.offered(node)
            self.place(self.line.add(node, is_upload))
            self.has_news = True
        if not is_upload and self.line.promote(node):
            self.has_news = True

    def upload(self) -> None:
        """Offer everything that device or host hold already, parents first."""
        for node in self._tree.nodes():
            self._offer(node, is_upload=True)
            if node.host_pages is None:
                self.to_copy.append(node)
        self.has_news |= bool(self.to_copy)
        self.upload_pages = self.uploads_left()

    def _offer_parents_again(self, is_another: bool) -> None:
        """The store was cleared, or another one has taken over.  Nothing is written again but what is touched, and what
        must lie before it."""
        for entry in self.line.entries():
            if self.line.get(entry.node) is not entry:
                continue  # lost meanwhile, behind another that was
            above, path = entry.node.parent, []
            while above is not None and not self._tree.is_root(above) and above not in self.line:
                path.append(above)
                above = above.parent
            for node in reversed(path):
                self._offer(node, entry.is_upload)
            if is_another:
                entry.failures = 0  # they were those of the store before
            if entry.turn is Turn.LINE or (is_another and entry.turn is Turn.RETRY):
                self.place(entry)

    def _may_follow(self, node: Node) -> bool:
        """Its parent is stored, or will be before it."""
        parent = node.parent
        return parent is not None and (self._is_stored(parent) or parent in self.line)

    def _is_stored(self, node: Node) -> bool:
        return self._tree.is_root(node) or node.stored == self.tag

    def place(self, entry: Waiting) -> None:
        """Into the line, or behind its parent; nowhere if the store could not be asked for it."""
        parent = entry.node.parent
        if parent is not None and self._is_stored(parent):
            self.line.move(entry, Turn.LINE)
        elif self._may_follow(entry.node):
            self.line.move(entry, Turn.PARENT)
        else:
            self.lose(entry.node, Loss.PARENT_LOST)

    # --------------------------------------------------------------------------------------- what is stored

    def written(self, entry: Waiting, tag: tuple[int, int]) -> None:
        """It is stored, and its children may follow."""
        node = entry.node
        self.line.remove(node)
        self.books.written(node)
        node.stored = tag
        if tag == self.tag:
            self.known.add(self._tree.keys_of(node))
        self._offer(node, entry.is_upload)  # the store that has it may be another one than the present
        self._release(node, entry.is_upload)

    def found(self, node: Node, tag: tuple[int, int]) -> None:
        """A read has brought these pages from the store."""
        entry = self.line.get(node)
        if tag != self.tag or (entry is not None and entry.turn is Turn.WRITING):
            return
        if entry is not None or node.lost is not None:
            self.line.remove(node)
            self.books.found(node)
        node.stored = tag
        self._release(node, is_upload=False)

    def not_there(self, seed: bytes, key: bytes, page: int) -> None:
        """The store lacks this page of `key`: a node that is believed to be stored is offered again, or whatever lies
        behind it stays out of reach for ever."""
        node = self._tree.holder(seed, key, page)
        if node is None or self.tag is None or node.stored != self.tag:
            return
        node.stored = None
        self._offer(node, is_upload=False)
        self._release(node, is_upload=False)

    def _release(self, node: Node, is_upload: bool) -> None:
        """The children of a node that was stored, or turned out not to be."""
        for child in node.children.values():
            entry = self.line.get(child)
            if entry is not None:
                if entry.turn in (Turn.PARENT, Turn.LINE):
                    self.place(entry)
            elif not self._was_stored(child):
                self._offer(child, is_upload)

    def _was_stored(self, node: Node) -> bool:
        """In this attachment.  If the store was cleared since, that was somebody's wish: the page is not lost, and it
        is not written again before somebody touches it."""
        return node.stored is not None and self.tag is not None and node.stored[0] == self.tag[0]

    # -------------------------------------------------------------------------------------- what is given up

    def lose(self, node: Node, reason: Loss) -> None:
        """Give up a node that waits, and those that wait behind it."""
        stack = [(node, reason)]
        while stack:
            node, why = stack.pop()
            if self.line.remove(node) is None:
                continue
            self.books.given_up(node, why)
            for child in node.children.values():
                entry = self.line.get(child)
                if entry is not None and entry.turn is not Turn.WRITING:  # that one may still be stored
                    stack.append((child, Loss.PARENT_LOST))

    def give_up_all(self, reason: Loss) -> None:
        """Nobody that waits will have a turn.  What is being written has had it."""
        self.to_copy.clear()
        for entry in self.line.entries():
            if entry.turn is not Turn.WRITING and self.line.remove(entry.node) is not None:
                self.books.given_up(entry.node, reason)

    def cache_ends(self, reason: Loss) -> None:
        """Device and host are emptied, or the server ends: whatever is not stored now never will be."""
        self.give_up_all(reason)
        for node in self._tree.nodes():
            self._never_offered(node, reason, node.host_pages is not None)

    def _never_offered(self, node: Node, reason: Loss, had_host: bool) -> None:
        """A node goes, or all do, and this one never had its turn."""
        if self.tag is None or node.lost is not None or node in self.line or self._was_stored(node):
            return
        by_policy = not had_host and self._controller.is_below_threshold(node)
        self.books.offered(node)
        self.books.given_up(node, Loss.POLICY if by_policy else reason)

    # ------------------------------------------------------------------------------------- told by the tree

    def divided(self, upper: Node, lower: Node) -> None:
        self.line.divide(upper, lower)

    def left_host(self, node: Node) -> None:
        self.lose(node, Loss.EVICTED_BEFORE_BACKUP)

    def removed(self, node: Node, had_host: bool) -> None:
        parent = node.parent
        reason = Loss.EVICTED_BEFORE_BACKUP if had_host else Loss.HOST_PRESSURE
        if had_host and parent is not None and not self._is_stored(parent) and parent not in self.line:
            reason = Loss.PARENT_LOST
        self._never_offered(node, reason, had_host)

    # -------------------------------------------------------------------------------------------- integrity

    def check(self) -> None:
        """Books that add up, and nobody in line whose parent the store lacks.  Raises IntegrityError."""
        entries = self.line.entries()
        complaint = self.books.balance([entry.node for entry in entries])
        for entry in entries:
            node, parent = entry.node, entry.node.parent
            if node.host_pages is None:
                complaint = f"{node!r} waits to be written and is not on the host"
            elif parent is None or (entry.turn is Turn.LINE and not self._is_stored(parent)):
                complaint = f"{node!r} is in line before {parent!r} is stored"
            elif entry.turn is Turn.PARENT and parent not in self.line:
                complaint = f"{node!r} waits for {parent!r}, which does not wait"
        if complaint:
            raise IntegrityError(complaint)
