"""Witnesses of the storage machine: what was said on the line to the store, and what became of free host pages."""

from __future__ import annotations

from sglang_hicache import wire
from sglang_hicache.cache.pools import HostPool, PageAllocator


class FreePages:
    """Fills every free host page with poison: whoever reads one serves poison, and whoever writes one is found out."""

    def __init__(self, pool: HostPool, allocator: PageAllocator) -> None:
        self._pool = pool
        self._allocator = allocator
        self._poison = b"\xdb" * pool.page_bytes
        self._free: set[int] = set()
        self.changed()

    def check(self) -> None:
        """Copies, lanes and processes, those that were told to die among them, have left free pages alone."""
        for page in self._free:
            assert self._pool.page(page) == self._poison, f"host page {page} was written while it was free"

    def changed(self) -> None:
        """Pages may have changed hands."""
        free = set(range(self._allocator.total)).difference(self._allocator.used_pages())
        for page in free - self._free:
            self._pool.page(page)[:] = self._poison
        self._free = free


class Journal:
    """Everything that went over the line between a rank and its storage processes.

    Pages are counted as known to the store when it has said so, in the same attachment and since the last clear.
    """

    def __init__(self) -> None:
        self._clears = 0
        #: By op: (epoch, clears before it), and the keys that it moves.
        self._ops: dict[int, tuple[tuple[int, int], list[bytes]]] = {}
        self._known: dict[tuple[int, int], set[bytes]] = {}

    def sent(self, epoch: int, message: wire.ToStorage) -> None:
        """The rank asks for something."""
        match message:
            case wire.ClearPages():
                self._clears += 1
            case wire.ReadPages():
                self._moves(epoch, message)
            case wire.WritePages():
                self._moves(epoch, message)
                known = self._known.get((epoch, self._clears), set())
                assert (message.depth == 0) == (message.parent == b""), f"depth and parent disagree: {message}"
                assert not message.parent or message.parent in known, "a child is offered before its parent is stored"

    def _moves(self, epoch: int, message: wire.ReadPages | wire.WritePages) -> None:
        assert len(message.keys) == len(set(message.host_pages)) == len(message.host_pages) > 0
        assert message.op_id not in self._ops, f"op {message.op_id} was sent twice"
        self._ops[message.op_id] = (epoch, self._clears), message.keys

    def heard(self, message: wire.FromStorage) -> None:
        """The store answers."""
        if not isinstance(message, wire.OpProgress) or message.op_id not in self._ops:
            return
        tag, keys = self._ops[message.op_id]
        self._known.setdefault(tag, set()).update(keys[: message.pages])
