"""Host pages that a killed storage process, or its hardware, may still touch.

An op whose process could not be proven dead, or whose backend has I/O that outlives it, leaves its pages here
instead of in the free list.  They come back in the plan that carries every rank's proof, or never: a page handed
out too early is silent corruption, a page kept is only memory.  Replicated; changed only by `apply`.
"""

from __future__ import annotations

from collections.abc import Iterator

from sglang_hicache.cache.op import WRITES, Op


class Quarantine:
    """Ops of written-off epochs, with the pages and locks they still hold."""

    def __init__(self) -> None:
        self._ops: dict[int, list[Op]] = {}

    def __iter__(self) -> Iterator[Op]:
        return (op for ops in self._ops.values() for op in ops)

    @property
    def pages(self) -> int:
        """Host slots held: those of reads, and those of the tree that a write still reads and locks."""
        return sum(op.pages if op.kind in WRITES else len(op.host_pages) for op in self)

    def owned(self) -> list[int]:
        """Slots that neither the tree nor the free list accounts for."""
        return [page for op in self for page in op.host_pages]

    def hold(self, epoch: int, ops: list[Op]) -> None:
        self._ops.setdefault(epoch, []).extend(ops)

    def release(self, epoch: int) -> list[Op]:
        """Every rank has proven that nothing of this epoch runs any more."""
        return self._ops.pop(epoch, [])
