"""Who waits to be written to the store, behind whom, and who is next.

The books of `BackupQueue`, which alone calls it.  A node enters when it is offered and leaves when it is stored or
given up.  Its parent is stored, or waits itself; only nodes of the first sort stand in line, so whatever is taken
from the line can be written.  There are two lines: fresh backups, and uploads of what was cached before the storage
was attached.  Replicated: dicts in order of arrival, no clock but the plan's.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum

from sglang_hicache.cache.node import Node


class Turn(Enum):
    """What a waiting node waits for."""

    PARENT = "its parent waits, too"
    LINE = "its turn"
    RETRY = "the time of its next attempt"
    WRITING = "the end of its write"


@dataclass(slots=True, eq=False)
class Waiting:
    """One node that is to be written."""

    node: Node
    #: Cached before the storage was attached: gives way to everything else, and a detach does not wait for it.
    is_upload: bool
    turn: Turn = Turn.PARENT
    #: Attempts that failed in a row.
    failures: int = 0
    #: Leader's clock of the next attempt, for RETRY.
    due_us: int = 0


class _Lot:
    """Fresh backups, or uploads."""

    def __init__(self) -> None:
        #: Everybody, in order of arrival.
        self.all: dict[int, Waiting] = {}
        #: Those whose turn is LINE.  Ordered by links: for the first of a plain dict every tick would step over the
        #: places of all that have left before it, and an upload may be as long as the host pool is large.
        self.line: OrderedDict[int, Waiting] = OrderedDict()
        #: Those whose turn is WRITING.
        self.writing = 0
        self.pages = 0


class BackupLine:
    """All nodes that wait, by node id."""

    def __init__(self) -> None:
        self.fresh = _Lot()
        self.uploads = _Lot()
        #: (time, node id); entries of nodes that left or moved on are passed over.
        self._retries: list[tuple[int, int]] = []

    def __len__(self) -> int:
        """Fresh backups that no write has taken yet."""
        return len(self.fresh.all) - self.fresh.writing

    def __contains__(self, node: Node) -> bool:
        return node.id in self.fresh.all or node.id in self.uploads.all

    def get(self, node: Node) -> Waiting | None:
        return self.fresh.all.get(node.id) or self.uploads.all.get(node.id)

    def entries(self) -> list[Waiting]:
        """Everybody, uploads last."""
        return [*self.fresh.all.values(), *self.uploads.all.values()]

    def oldest(self) -> Waiting | None:
        """The fresh backup that came first, of those not being written."""
        return next((entry for entry in self.fresh.all.values() if entry.turn is not Turn.WRITING), None)

    def next(self, is_upload: bool) -> Waiting | None:
        """Who is next in a line."""
        return next(iter(self._lot(is_upload).line.values()), None)

    def retrying(self) -> int:
        """Nodes that wait for another attempt; for people."""
        return sum(entry.turn is Turn.RETRY for entry in self.entries())

    def next_due_us(self) -> int | None:
        """When the next retry is due."""
        while self._retries and not self._is_current(*self._retries[0]):
            heapq.heappop(self._retries)
        return self._retries[0][0] if self._retries else None

    # ------------------------------------------------------------------------------------------- changes

    def add(self, node: Node, is_upload: bool) -> Waiting:
        entry = Waiting(node, is_upload)
        lot = self._lot(is_upload)
        lot.all[node.id] = entry
        lot.pages += node.page_count
        return entry

    def remove(self, node: Node) -> Waiting | None:
        entry = self.get(node)
        if entry is not None:
            self.move(entry, Turn.PARENT)
            lot = self._lot(entry.is_upload)
            del lot.all[node.id]
            lot.pages -= node.page_count
        return entry

    def move(self, entry: Waiting, turn: Turn, due_us: int = 0) -> None:
        """`entry` waits for something else now."""
        lot, node_id = self._lot(entry.is_upload), entry.node.id
        lot.line.pop(node_id, None)
        lot.writing += (turn is Turn.WRITING) - (entry.turn is Turn.WRITING)
        entry.turn, entry.due_us = turn, due_us
        if turn is Turn.LINE:
            lot.line[node_id] = entry
        elif turn is Turn.RETRY:
            heapq.heappush(self._retries, (due_us, node_id))

    def promote(self, node: Node) -> bool:
        """A request came by: uploads from here up, which must be stored before, are fresh backups from now on."""
        first = node if node.id in self.uploads.all else node.parent
        above = first
        while above is not None and (entry := self.uploads.all.get(above.id)) is not None:
            if entry.turn is not Turn.WRITING:
                turn, due_us = entry.turn, entry.due_us
                self.remove(above)
                entry.is_upload = False
                self.fresh.all[above.id] = entry
                self.fresh.pages += above.page_count
                self.move(entry, turn, due_us)
            above = above.parent
        return above is not first

    def divide(self, upper: Node, lower: Node) -> None:
        """A node that waits was split: its upper half goes first, with the failures of both."""
        entry = self.get(lower)
        if entry is None:
            return
        lot = self._lot(entry.is_upload)
        half = Waiting(upper, entry.is_upload, failures=entry.failures)
        lot.all[upper.id] = half
        self.move(half, entry.turn, entry.due_us)
        if entry.turn is not Turn.WRITING:
            entry.failures = 0
            self.move(entry, Turn.PARENT)

    def due(self, now_us: int) -> list[Waiting]:
        """Those whose next attempt is due."""
        found = []
        while (due_us := self.next_due_us()) is not None and due_us <= now_us:
            _, node_id = heapq.heappop(self._retries)
            found.append(self.fresh.all.get(node_id) or self.uploads.all[node_id])
        return found

    def _lot(self, is_upload: bool) -> _Lot:
        return self.uploads if is_upload else self.fresh

    def _is_current(self, due_us: int, node_id: int) -> bool:
        entry = self.fresh.all.get(node_id) or self.uploads.all.get(node_id)
        return entry is not None and entry.turn is Turn.RETRY and entry.due_us == due_us
