"""The writes of the backup: which of those that wait is next, and what becomes of a write that failed.

What a write has done counts.  The rest is tried again, ever later, and given up after some attempts in a row; then it
is for the next request that touches it.  A store without room is not asked again and again: see `FullStore`.
Replicated; changed only by `apply`.
"""

from __future__ import annotations

from sglang_hicache import wire
from sglang_hicache.cache.backup import BackupQueue
from sglang_hicache.cache.backup_line import Turn, Waiting
from sglang_hicache.cache.backup_pace import (
    MAX_ATTEMPTS,
    MAX_UPLOADS,
    MAX_WRITES,
    FullStore,
    Limits,
    UploadPace,
    delay_us,
    has_room,
)
from sglang_hicache.cache.controller import CacheController
from sglang_hicache.cache.loss import Loss
from sglang_hicache.cache.node import Node
from sglang_hicache.cache.op import Op, OpKind
from sglang_hicache.cache.storage_ops import StorageOps
from sglang_hicache.errors import IntegrityError

#: Why a write stops at a page that could have been written all the same.
_NOT_THE_PAGE = (Loss.NO_SPACE, "revoked")


class BackupWriter:
    """Writes under way, and when the next may start."""

    def __init__(self, queue: BackupQueue, controller: CacheController, storage: StorageOps, limits: Limits) -> None:
        self._queue = queue
        self._line = queue.line
        self._controller = controller
        self._tree = controller.tree
        self._storage = storage
        self.limits = limits
        self.full = FullStore()
        self.pace = UploadPace(limits.upload_page_us)
        #: No upload is started in this tick: somebody waits for the cache to come to rest.
        self._holds_uploads = False
        #: Leader's clock when `pump` looked last.
        self._looked_us = 0
        #: Writes of lost attachments whose pages somebody may still read: their nodes stay locked.
        self._cut_off: dict[int, Op] = {}

    def can_start(self) -> bool:
        """A call of `pump` may start something."""
        return self._queue.has_news and not self._queue.is_held

    def is_moving(self) -> bool:
        """Fresh backups have their turn as soon as there is a place; else all of them wait for the clock, because the
        store has refused them or what lies before them, or is full."""
        return bool(self._line.fresh.line) and self.full.since_us is None

    def next_deadline_us(self) -> int | None:
        """When `pump` can start something although nothing has happened."""
        if self._storage.tag is None or self._queue.is_held:
            return None
        known = [self._line.next_due_us()]
        is_fresh_next = bool(self._line.fresh.line)
        has_upload = bool(self._line.uploads.line or self._queue.to_copy)
        if self.full.since_us is not None:
            known.append(self.full.probe_at_us if is_fresh_next or has_upload else None)
        elif has_upload and not is_fresh_next:
            known.append(self.pace.next_us)
        # What was due at the last look and was not started waits for something else than the time.
        return min((at for at in known if at is not None and at > self._looked_us), default=None)

    def attached(self) -> None:
        """Another store: what the last one said of its room is no longer true, and it lacks what is cached."""
        self.full.accepted()
        if self.limits.upload_page_us:
            self._queue.upload()

    # ----------------------------------------------------------------------------------------------- start

    def pump(self, now_us: int) -> None:
        """Start as many writes as may run."""
        if self._queue.is_held:
            return
        self._queue.has_news, self._looked_us = False, now_us
        for entry in self._line.due(now_us):
            self._queue.place(entry)
        while (entry := self._next(now_us)) is not None:
            self._write(entry, now_us)
        while self._queue.to_copy and self._may_upload(now_us):
            node = self._queue.to_copy.popleft()
            if self._controller.copy_if_free(node):
                self.pace.took(node.page_count, now_us)
        self._holds_uploads = False

    def _next(self, now_us: int) -> Waiting | None:
        """Who may be written now: fresh backups first, and of these the one that came first."""
        is_fresh_next = bool(self._line.fresh.line)
        if self._storage.count(OpKind.WRITE) >= MAX_WRITES or not (is_fresh_next or self._may_upload(now_us)):
            return None
        entry, in_flight = self._line.next(is_upload=not is_fresh_next), self._in_flight()
        if entry is None or not self.full.may_try(now_us, in_flight):
            return None
        node = entry.node
        if node.page_count > self.limits.op_pages:
            node = self._tree.split(node, self.limits.op_pages)
        if in_flight and not has_room(self._tree, node, self.limits.locked_pages):
            return None
        return self._line.get(node)

    def _may_upload(self, now_us: int) -> bool:
        if self._line.fresh.line or self._holds_uploads:
            return False
        return self._storage.count(OpKind.UPLOAD) < MAX_UPLOADS and now_us >= self.pace.next_us

    def _in_flight(self) -> int:
        return self._storage.count(OpKind.WRITE) + self._storage.count(OpKind.UPLOAD)

    def _write(self, entry: Waiting, now_us: int) -> None:
        node, kind = entry.node, OpKind.UPLOAD if entry.is_upload else OpKind.WRITE
        op = self._storage.admit(kind, node.page_count, now_us)
        if op is None:
            raise IntegrityError(f"storage is on, fewer than {MAX_WRITES} writes run, and it takes none of {node!r}")
        op.node = node
        self._line.move(entry, Turn.WRITING)
        self.full.started(op.id)
        if entry.is_upload:
            self.pace.took(node.page_count, now_us)
        self._tree.lock_host(node)
        self._storage.send(op, wire.WritePages(
            op_id=op.id, keys=self._tree.keys_of(node), host_pages=list(node.host_pages or ()),
            parent=self._tree.parent_key(node), depth=node.depth_pages, tenant=node.seed,
        ))

    # ------------------------------------------------------------------------------------------------- end

    def close(self, op: Op, now_us: int) -> None:
        """Every rank has let go of the pages: what is stored counts, the rest is tried again."""
        self._storage.close(op)
        self._unlock(op)
        self._queue.books.failed(op.pages - op.done)
        tag, present, is_present = (op.epoch, op.generation), self._storage.tag, self._storage.is_present(op)
        was_cleared = is_present and present != tag
        end = 0
        for part in self._parts(op):
            end += part.page_count
            entry = self._line.get(part)
            if entry is None:
                continue
            if end <= op.done and not was_cleared:
                self._queue.written(entry, tag)
            elif present is None:
                self._queue.lose(part, self._queue.ending)
            elif not is_present or was_cleared or end - part.page_count > op.done or op.reason in _NOT_THE_PAGE:
                self._queue.place(entry)  # nothing is wrong with these pages
            else:
                self._retry(entry, op, now_us)
        if not is_present:
            return
        if op.done == op.pages:
            self.full.accepted()
        elif op.reason == Loss.NO_SPACE and self.full.refused(op.id, now_us):
            self._queue.give_up_all(Loss.NO_SPACE)

    def _parts(self, op: Op) -> list[Node]:
        """The nodes that a write has covered, divided where it stopped."""
        if op.node is None:
            raise IntegrityError(f"{op!r} writes no node")
        at = 0
        for part in self._tree.span(op.node, op.pages):
            if at < op.done < at + part.page_count:
                self._tree.split(part, op.done - at)
                break
            at += part.page_count
        return self._tree.span(op.node, op.pages)

    def _retry(self, entry: Waiting, op: Op, now_us: int) -> None:
        """The first page of `entry` is the one that failed."""
        entry.failures = 1 if op.done else entry.failures + 1
        if entry.failures >= MAX_ATTEMPTS:
            self._queue.lose(entry.node, Loss.of_failure(op.reason))
        else:
            self._line.move(entry, Turn.RETRY, now_us + delay_us(entry.failures))

    def stop_uploads(self, ops: list[Op]) -> bool:
        """Somebody waits for the cache to come to rest, and has waited for everything else.  True: no upload is being
        written any more."""
        self._holds_uploads = True
        for op in ops:
            self._storage.revoke(op)
        return not ops

    # ------------------------------------------------------------------------- writes of a lost attachment

    def epoch_gone(self, op: Op) -> None:
        """The write went with its attachment; its pages stay locked until `free`."""
        self._cut_off[op.id] = op
        for part in self._tree.span(op.node, op.pages) if op.node is not None else ():
            entry = self._line.get(part)
            if entry is not None and self._storage.tag is None:
                self._queue.lose(part, self._queue.ending)
            elif entry is not None:
                self._queue.place(entry)

    def free(self, op: Op) -> None:
        """Nobody reads the pages any more."""
        if self._cut_off.pop(op.id, None) is not None:
            self._unlock(op)

    def before_flush(self) -> list[int]:
        """Writes in quarantine take their pages out of the tree, which forgets them: the pages are returned."""
        taken: dict[int, None] = {}
        for op in self._cut_off.values():
            self._unlock(op)
            for part in self._tree.span(op.node, op.pages) if op.node is not None else ():
                # Two writes may share pages: the first keeps them.
                fresh = [page for page in part.host_pages or () if page not in taken]
                op.host_pages += fresh
                taken |= dict.fromkeys(fresh)
            op.node = None
        self._cut_off.clear()
        return list(taken)

    def _unlock(self, op: Op) -> None:
        if op.node is not None:
            self._tree.unlock_host(op.node)
