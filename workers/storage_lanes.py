"""Lanes of the storage process: a thread, its line of ops, and the ops themselves, done batch by batch.

Two lanes run in a storage process, prefetch (look-ups and reads) and backup (writes and clears), so that a slow write
never delays a read.  The main thread submits and revokes; the lane's own thread alone calls the backend; both report
through a callable that may be called from any thread.  A lane never touches a socket.

Between two batches a lane reports the progress of the op, sees whether it was revoked, and lets waiting look-ups pass:
a request waits for a look-up for some 50 ms only, and a long read would make all of them miss.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from sglang_hicache import wire
from sglang_hicache.cache.pools import HostPool
from sglang_hicache.errors import StorageError
from sglang_hicache.storage.checked import CheckedStore

_logger = logging.getLogger(__name__)

#: Ops that may wait in one lane.  Above it the op is refused and settles at once; the controller offers it again.
QUEUE_LIMIT = 4096

#: A batch ends here: often enough for a revoke to bite within some 10 ms, seldom enough that reporting costs nothing,
#: and large enough that a backend which reads pages side by side gets several of the largest.
BATCH_BYTES = 32 * 1024 * 1024
BATCH_PAGES = 128

#: Names looked up in one call.
LOOKUP_NAMES = 512

Report = Callable[[wire.FromStorage], None]


class Op(ABC):
    """One piece of work in a lane.  Owned by the lane's thread while a step runs, else guarded by the lane's lock."""

    #: Passes ops that are not, between two batches.
    is_urgent = False

    def __init__(self, op_id: int | str) -> None:
        self.op_id = op_id
        self.is_settled = False
        #: Microseconds of all batches so far.
        self.took_us = 0

    @abstractmethod
    def step_blocking(self) -> None:
        """Do one batch; sets `is_settled` when there is no more to do."""

    def stop(self, reason: str) -> None:
        """There will be no further step."""
        self.is_settled = True
        self._note(reason)

    @abstractmethod
    def _note(self, reason: str) -> None:
        """Remember why the op stopped short."""

    @abstractmethod
    def message(self) -> wire.FromStorage | None:
        """What the rank should know now."""

    def after_blocking(self) -> None:  # noqa: B027 - most ops leave nothing to do
        """Called once, after the settled op was reported: touches no host memory."""


class PageOp(Op):
    """An op over a run of pages."""

    def __init__(self, store: CheckedStore, op_id: int, keys: list[bytes]) -> None:
        super().__init__(op_id)
        self._store = store
        self._keys = keys
        #: Whole pages, counted from the first one.  Grows only after the bytes are where they belong.
        self._pages = 0
        self._corrupt = 0
        self._reason = ""

    def message(self) -> wire.OpProgress:
        return wire.OpProgress(
            op_id=self.op_id, pages=self._pages, settled=self.is_settled, closed=self.is_settled,
            corrupt=self._corrupt, reason=self._reason, took_us=self.took_us,
        )  # fmt: skip

    def _note(self, reason: str) -> None:
        self._reason = reason

    def _advance(self, pages: int, wanted: int) -> None:
        """A batch of `wanted` pages gave `pages`."""
        self._pages += pages
        self.is_settled = pages < wanted or self._pages == len(self._keys)


class LookupOp(PageOp):
    """How many pages does the store have?"""

    is_urgent = True

    def step_blocking(self) -> None:
        keys = self._keys[self._pages : self._pages + LOOKUP_NAMES]
        self._advance(self._store.lookup_blocking(keys), len(keys))


class TransferOp(PageOp):
    """Pages between the store and the host pool."""

    def __init__(
        self, store: CheckedStore, op_id: int, keys: list[bytes], pool: HostPool, host_pages: list[int]
    ) -> None:
        super().__init__(store, op_id, keys)
        if len(keys) != len(host_pages):
            raise StorageError(f"op {op_id} has {len(keys)} keys for {len(host_pages)} host pages", "contract")
        self._pool = pool
        self._host_pages = host_pages
        self._batch_pages = max(1, min(BATCH_PAGES, BATCH_BYTES // pool.page_bytes))

    def _batch(self) -> tuple[list[bytes], list[memoryview], bytes]:
        """Keys and host memory of the next batch, and the key before them (b"" for the op's first page)."""
        batch = slice(self._pages, self._pages + self._batch_pages)
        payloads = [self._pool.page(page) for page in self._host_pages[batch]]
        return self._keys[batch], payloads, self._keys[self._pages - 1] if self._pages else b""


class ReadOp(TransferOp):
    """Storage to host memory.

    Pages are read from the first to the last, because progress counts from the first one and a request may start with
    what has come.  They are touched from the last to the first, so that in the order of use a parent is never older
    than its child, and after the op was closed, because nobody waits for that.
    """

    def __init__(self, store: CheckedStore, message: wire.ReadPages, pool: HostPool) -> None:
        super().__init__(store, message.op_id, message.keys, pool, message.host_pages)

    def step_blocking(self) -> None:
        keys, payloads, previous = self._batch()
        result = self._store.read_blocking(keys, payloads, previous)
        self._corrupt += result.corrupt
        self._reason = result.reason
        self._advance(result.pages, len(keys))

    def after_blocking(self) -> None:
        if self._pages:
            self._store.touch_blocking(self._keys[: self._pages])


class WriteOp(TransferOp):
    """Host memory to storage, parents first: a page counts once it, and all before it, can be found."""

    def __init__(self, store: CheckedStore, message: wire.WritePages, pool: HostPool) -> None:
        super().__init__(store, message.op_id, message.keys, pool, message.host_pages)
        self._parent = message.parent
        self._depth = message.depth
        self._tenant = message.tenant

    def step_blocking(self) -> None:
        keys, payloads, previous = self._batch()
        parent, depth = previous or self._parent, self._depth + self._pages
        result = self._store.write_blocking(keys, payloads, parent, depth, self._tenant)
        self._reason = result.reason
        self._advance(result.pages, len(keys))


class ClearOp(Op):
    """Delete the pages of the own namespace."""

    def __init__(self, store: CheckedStore, command_id: str) -> None:
        super().__init__(command_id)
        self._store = store
        self._reason = ""

    def step_blocking(self) -> None:
        _logger.info("cleared %d pages", self._store.clear_blocking())
        self.is_settled = True

    def message(self) -> wire.ClearDone | None:
        return wire.ClearDone(command_id=self.op_id, reason=self._reason) if self.is_settled else None

    def _note(self, reason: str) -> None:
        self._reason = reason


class Lane:
    """A thread and the ops that wait for it, in order of arrival."""

    def __init__(self, name: str, report: Report, on_end: Callable[[], None], queue_limit: int = QUEUE_LIMIT) -> None:
        self.name = name
        self._report = report
        self._on_end = on_end
        self._queue_limit = queue_limit
        self._changed = threading.Condition()
        self._ops: dict[int | str, Op] = {}
        #: The look-ups among them.
        self._urgent: dict[int | str, Op] = {}
        self._running: Op | None = None
        self._revoked: set[int | str] = set()
        self._is_stopping = False
        #: The thread will not touch anything again.
        self.has_ended = False
        self._thread = threading.Thread(target=self._serve, name=f"{name} lane", daemon=True)

    def __repr__(self) -> str:
        return f"<Lane {self.name} ops={len(self._ops)} running={self._running is not None}>"

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def submit(self, op: Op) -> bool:
        """Put an op in line; False if the line is full or the lane is stopping.  Main thread."""
        with self._changed:
            if self._is_stopping or len(self._ops) >= self._queue_limit:
                return False
            self._ops[op.op_id] = op
            if op.is_urgent:
                self._urgent[op.op_id] = op
            self._changed.notify()
            return True

    def revoke(self, op_id: int | str) -> None:
        """No further batch of this op.  It settles now, or after the batch that runs.  Main thread."""
        with self._changed:
            self._revoke(op_id)

    def stop(self) -> None:
        """Revoke everything; the thread ends after the batch that runs.  Main thread."""
        with self._changed:
            self._is_stopping = True
            for op_id in list(self._ops):
                self._revoke(op_id)
            self._changed.notify()

    def _revoke(self, op_id: int | str) -> None:
        op = self._ops.get(op_id)
        if op is None:
            # It was closed while the revoke was on its way.
            return
        if op is self._running:
            self._revoked.add(op_id)
        else:
            self._end(op, "revoked")

    def _end(self, op: Op, reason: str) -> None:
        op.stop(reason)
        self._remove(op)
        self._report_op(op)

    def _remove(self, op: Op) -> None:
        del self._ops[op.op_id]
        self._urgent.pop(op.op_id, None)

    def _serve(self) -> None:
        """The lane's thread."""
        while (op := self._next_blocking()) is not None:
            self._step_blocking(op)
        self.has_ended = True
        self._on_end()

    def _step_blocking(self, op: Op) -> None:
        """One batch of an op, and what it leads to."""
        began_ns = time.monotonic_ns()
        self._guarded_blocking(op, op.step_blocking)
        op.took_us += (time.monotonic_ns() - began_ns) // 1000
        with self._changed:
            self._running = None
            is_revoked = op.op_id in self._revoked
            self._revoked.discard(op.op_id)
            if op.is_settled:
                self._remove(op)
                self._report_op(op)
            elif is_revoked:
                self._end(op, "revoked")
            else:
                self._report_op(op)
        if op.is_settled:
            self._guarded_blocking(op, op.after_blocking)

    def _next_blocking(self) -> Op | None:
        """The op whose batch is next: a look-up if one waits, else the oldest; None when the lane was stopped."""
        with self._changed:
            while not self._ops:
                if self._is_stopping:
                    return None
                self._changed.wait()
            self._running = next(iter((self._urgent or self._ops).values()))
            return self._running

    def _report_op(self, op: Op) -> None:
        message = op.message()
        if message is not None:
            self._report(message)

    def _guarded_blocking(self, op: Op, call: Callable[[], None]) -> None:
        """One call into an op.  Whatever a backend throws is the failure of this op; the next one is served."""
        try:
            call()
        except StorageError as error:
            op.stop(f"{error.reason}: {error}")
        except Exception as error:
            _logger.exception("%s lane: an op failed", self.name, extra={"op": op.op_id})
            op.stop(f"defect: {type(error).__name__}: {error}")
