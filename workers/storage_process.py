"""The process that owns a storage backend for one rank: `... storage_process rank 1 file`.

Started by `storage_client.py` and by nobody else.  It maps the rank's host pool and moves pages in place, so that a
backend that hangs, leaks or crashes takes this process with it and never the rank.  Torch is not imported: that would
cost seconds at every attach.

Who owns what: the main thread owns the sockets, the line to the parent and the end of the process.  Two lanes own the
calls into the backend once it is open; they hand their reports to the `Outbox`, which wakes the main thread.

How it ends: told to stop, or the rank closes its end of the pipe: batches that run are finished, the backend is closed,
exit 0.  The rank dies: the kernel kills this process at once.  It hangs: the rank kills the process group.

A dry run (`dry_run.py`) has neither the pool nor lanes: it says what it has found, and goes.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import msgspec

from sglang_hicache import wire
from sglang_hicache.cache.pools import HostPool
from sglang_hicache.config import LogConfig
from sglang_hicache.errors import ProtocolError, StorageError
from sglang_hicache.observe import learn_secrets, learn_variables, report_uncaught, start_logging, without_secrets
from sglang_hicache.sockets import Poller, Pull, Push, ipc_address
from sglang_hicache.storage import registry
from sglang_hicache.storage.backend import OpenContext, StorageBackend
from sglang_hicache.storage.checked import CheckedStore, Shared
from sglang_hicache.storage.diagnosis import diagnose
from sglang_hicache.storage.encryption import open_cipher_blocking
from sglang_hicache.storage.negative import NegativeCache
from sglang_hicache.storage.page_format import PageLayout, Part
from sglang_hicache.storage.settings import store_settings
from sglang_hicache.workers.dry_run import DryRun
from sglang_hicache.workers.storage_lanes import ClearOp, Lane, LookupOp, Op, ReadOp, WriteOp

_logger = logging.getLogger(__name__)

EXIT_OPEN_FAILED = 1
EXIT_PARENT_DIED = 3

#: The config arrives on standard input, which stays open: its end of file says that the rank lets go of us.
CONFIG_FD = 0

#: How long to wait before a full socket to the rank is tried again.  A rank that does not read is busy or dead.
_RETRY_MS = 5

#: Shortest time between two reports of the counters.
_STATS_EVERY_S = 1.0

#: The last report after something happened.  By then a store that several share has counted what the others did.
_LAST_STATS_S = 5.0

_PR_SET_PDEATHSIG = 1


class Bootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is told through the pipe, before any socket exists."""

    open: wire.OpenBackend
    #: Descriptor of the host pool, inherited under the same number; None: a dry run, which has no business there.
    host_fd: int | None
    run_dir: str
    parent_pid: int


def socket_names(opened: wire.OpenBackend) -> tuple[str, str]:
    """Names of the sockets to and from the storage process of one attachment, or of one dry run, whose numbers are
    others."""
    kind = "dry_run" if opened.is_dry_run else "storage"
    return f"{kind}_{opened.rank}_{opened.epoch}_to", f"{kind}_{opened.rank}_{opened.epoch}_from"


class Outbox:
    """Messages for the rank, put in by any thread and sent by the main thread, in order, none lost."""

    def __init__(self, push: Push) -> None:
        self._push = push
        self._messages: deque[wire.FromStorage] = deque()
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: wire.FromStorage) -> None:
        """Any thread."""
        self.add(message)
        self.wake()

    def add(self, message: wire.FromStorage) -> None:
        """Main thread, which is awake: nothing needs to wake it."""
        self._messages.append(message)

    def wake(self) -> None:
        """Make the main thread look.  Any thread."""
        os.eventfd_write(self.wake_fd, 1)

    def quieten(self) -> None:
        """The main thread is awake and will look."""
        os.eventfd_read(self.wake_fd)

    def flush(self) -> None:
        """Send what the socket takes.  Main thread."""
        while self._messages and self._push.send(self._messages[0]):
            self._messages.popleft()


class StatsClock:
    """When the counters are told: some time after they may have changed, and once more when the store has had time to
    look around, so that a status that nothing follows is right.  Then an idle process stays asleep."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._due_s: float | None = None
        self._is_last = False

    def activity(self) -> None:
        """The counters may have changed.  The first time counts: steady work must not put the report off for ever."""
        if self._due_s is None or self._is_last:
            self._due_s, self._is_last = self._now_s() + _STATS_EVERY_S, False

    def wait_ms(self) -> int | None:
        """How long the process may sleep; None: until something happens."""
        # Rounded up: waking a moment too early would only spin until it is time.
        return None if self._due_s is None else max(0, int((self._due_s - self._now_s()) * 1000) + 1)

    def is_due(self) -> bool:
        """It is time; asked once."""
        if self._due_s is None or self._now_s() < self._due_s:
            return False
        self._due_s = None if self._is_last else self._now_s() + _LAST_STATS_S
        self._is_last = not self._is_last
        return True


@dataclass(frozen=True, slots=True)
class OpenStore:
    """A backend that has passed its test, and what the lanes' stores have in common around it."""

    backend: StorageBackend
    shared: Shared

    def info(self) -> dict[str, str]:
        """What status pages show."""
        info = {name: without_secrets(value) for name, value in self.backend.info().items()}
        return info | ({"encryption": "aes-256-gcm"} if self.shared.cipher else {})

    def stats(self) -> dict[str, int]:
        """Counters of this process, as far as a message carries them: some disks say that they have no end."""
        found = self.backend.stats() | self.shared.counters.snapshot()
        return {name: min(number, wire.LARGEST_STAT) for name, number in found.items()}


class Supervisor:
    """The main thread: reads the rank's messages, feeds the lanes, sends what they report."""

    def __init__(self, opened: wire.OpenBackend, store: OpenStore, pool: HostPool, pull: Pull, outbox: Outbox):
        self._opened = opened
        self._store = store
        self._pool = pool
        self._pull = pull
        self._outbox = outbox
        self._stats_clock = StatsClock()
        self._is_stopping = False
        self._prefetch_store, self._backup_store = self._lane_stores()
        self._prefetch = Lane("prefetch", outbox.put, outbox.wake)
        self._backup = Lane("backup", outbox.put, outbox.wake)

    def run_blocking(self, parent_pid: int) -> None:
        """Serve until told to stop and both lanes are done."""
        poller = Poller()
        for thing in (self._pull, self._outbox.wake_fd, CONFIG_FD):
            poller.register(thing)
        self._prefetch.start()
        self._backup.start()
        self._tell_stats()
        self._stats_clock.activity()
        while not (self._prefetch.has_ended and self._backup.has_ended):
            self._serve_once_blocking(poller, parent_pid)
        self._tell_stats()  # while the backend is open: closing it may cost what it knows
        while self._outbox:
            self._serve_once_blocking(poller, parent_pid)

    def _serve_once_blocking(self, poller: Poller, parent_pid: int) -> None:
        """Sleep until something happens, and see to it."""
        ready = poller.wait(_RETRY_MS if self._outbox else self._stats_clock.wait_ms())
        if self._outbox.wake_fd in ready:
            self._outbox.quieten()
            self._stats_clock.activity()
        if CONFIG_FD in ready:
            exit_if_orphaned(parent_pid)
            poller.unregister(CONFIG_FD)
            self._stop()
        for message in self._pull.receive_all():
            self._handle(message)
        if self._stats_clock.is_due():
            self._tell_stats()
        self._outbox.flush()

    def _lane_stores(self) -> tuple[CheckedStore, CheckedStore]:
        layout = page_layout(self._opened)
        prefetch, backup = (CheckedStore(self._store.backend, layout, self._store.shared) for _ in range(2))
        return prefetch, backup

    def _use_namespace(self, namespace: str) -> None:
        """Ops that wait or run keep the stores that they were given, and with them the old name."""
        self._opened = msgspec.structs.replace(self._opened, namespace=namespace)
        backend, shared = self._store.backend, self._store.shared
        backend.use_namespace(namespace)
        self._store = OpenStore(backend, replace(shared, negative=shared.negative.fresh()))
        self._prefetch_store, self._backup_store = self._lane_stores()

    def _tell_stats(self) -> None:
        self._outbox.add(wire.BackendStats(epoch=self._opened.epoch, stats=self._store.stats()))

    def _stop(self) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            self._prefetch.stop()
            self._backup.stop()

    def _handle(self, message: wire.ToStorage) -> None:
        match message:
            case wire.StopBackend():
                self._stop()
            case wire.RevokeOp():
                self._prefetch.revoke(message.op_id)
                self._backup.revoke(message.op_id)
            case wire.ClearPages():
                if not self._backup.submit(ClearOp(self._backup_store, message.command_id)):
                    self._outbox.put(wire.ClearDone(command_id=message.command_id, reason="queue_full"))
            case wire.LookupPages():
                self._submit(self._prefetch, LookupOp(self._prefetch_store, message.op_id, message.keys))
            case wire.ReadPages() | wire.WritePages():
                self._transfer(message)
            case wire.UseNamespace():
                self._use_namespace(message.namespace)
            case _:
                raise ProtocolError(f"{type(message).__name__} after the backend was opened")

    def _transfer(self, message: wire.ReadPages | wire.WritePages) -> None:
        if isinstance(message, wire.WritePages) and not self._opened.writes:
            # The lowest rank that owns these heads writes them; for this rank they are as good as written.
            done = len(message.keys)
            self._outbox.put(wire.OpProgress(op_id=message.op_id, pages=done, settled=True, closed=True))
            return
        try:
            if isinstance(message, wire.WritePages):
                self._submit(self._backup, WriteOp(self._backup_store, message, self._pool))
            else:
                self._submit(self._prefetch, ReadOp(self._prefetch_store, message, self._pool))
        except StorageError as error:
            self._refuse(message.op_id, str(error))

    def _submit(self, lane: Lane, op: Op) -> None:
        if not lane.submit(op):
            self._refuse(op.op_id, "queue_full")

    def _refuse(self, op_id: int, reason: str) -> None:
        self._outbox.put(wire.OpProgress(op_id=op_id, pages=0, settled=True, closed=True, reason=reason))


def page_layout(opened: wire.OpenBackend) -> PageLayout:
    """What all pages of this rank have in common."""
    parts = (Part("kv", opened.page_bytes),)
    return PageLayout(opened.namespace, opened.head_start, opened.head_end, parts)


def open_store_blocking(opened: wire.OpenBackend, pool: HostPool) -> OpenStore:
    """Make the backend, open it, and see that it keeps what it is given.  Closed again if it does not."""
    _, settings = registry.validate_extra_config(opened.backend, opened.extra_config_json)
    common = store_settings(opened.extra_config_json)
    cipher = open_cipher_blocking(common.encryption)
    shared = Shared(cipher, NegativeCache(time.monotonic, common.negative_ttl_s))
    context = OpenContext(
        rank=opened.rank,
        namespace=opened.namespace,
        page_bytes=opened.page_bytes,
        tp_size=opened.tp_size,
        model_name=opened.model_name,
        host_memory=pool.buffer,
    )
    backend = registry.create(opened.backend, settings, context)
    with ExitStack() as undo:
        undo.callback(backend.close_blocking)
        backend.open_blocking()
        CheckedStore(backend, page_layout(opened), shared).self_test_blocking(opened.rank)
        undo.pop_all()
    return OpenStore(backend, shared)


def exit_if_orphaned(parent_pid: int) -> None:
    """Nobody is left to work for: end without another word, even if a lane hangs."""
    if os.getppid() != parent_pid:
        os._exit(EXIT_PARENT_DIED)


def _die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill us when the thread that started us dies, and see that it has not died already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    exit_if_orphaned(parent_pid)


def read_bootstrap(descriptor: int) -> Bootstrap:
    """The config: a length of 4 bytes, then as much msgpack, written before this process was started."""
    size = int.from_bytes(os.read(descriptor, 4), "little")
    return msgspec.msgpack.decode(os.read(descriptor, size), type=Bootstrap)


def serve_blocking(bootstrap: Bootstrap) -> int:
    """Open, serve, close; the exit status."""
    opened = bootstrap.open
    assert bootstrap.host_fd is not None, "only a dry run has no host pool"
    to_name, from_name = socket_names(opened)
    pull = Pull(ipc_address(bootstrap.run_dir, to_name), wire.ToStorage, bind=True)
    push = Push(ipc_address(bootstrap.run_dir, from_name), wire.FromStorage, bind=False)
    pool = HostPool.attach(bootstrap.host_fd, opened.host_pages, opened.page_bytes)
    try:
        try:
            store = open_store_blocking(opened, pool)
        except Exception as error:  # process edge: whatever a backend's library throws is the answer of this attach
            found = diagnose(error, opened.backend)
            _logger.warning("cannot attach: %s", found)
            push.send(wire.BackendOpenFailed(epoch=opened.epoch, reason=without_secrets(str(found))))
            _wait_until_let_go_blocking()
            return EXIT_OPEN_FAILED
        _logger.info("attached %r", store.backend, extra={"epoch": opened.epoch})
        outbox = Outbox(push)
        outbox.put(wire.BackendOpened(epoch=opened.epoch, info=store.info()))
        Supervisor(opened, store, pool, pull, outbox).run_blocking(bootstrap.parent_pid)
        _logger.info("detached: %s", store.stats())
        store.backend.close_blocking()
        return 0
    finally:
        pull.close()
        push.close()


def _wait_until_let_go_blocking() -> None:
    """The rank lets go when it has heard our last words.  If we went before a busy machine has sent them, nobody would
    know why the store cannot be used."""
    while os.read(CONFIG_FD, 1):
        continue


def dry_run_blocking(bootstrap: Bootstrap) -> int:
    """Try the backend out and say what was found; the exit status."""
    _, from_name = socket_names(bootstrap.open)
    push = Push(ipc_address(bootstrap.run_dir, from_name), wire.FromStorage, bind=False)
    dry_run = DryRun(bootstrap.open, lambda report: push.send(wire.DryRunDone(report=report, is_last=False)))
    try:
        push.send(wire.DryRunDone(report=dry_run.run_blocking()))
        _wait_until_let_go_blocking()
    finally:
        push.close()
    return 0


def main() -> int:
    """The process."""
    bootstrap = read_bootstrap(CONFIG_FD)
    _die_with_parent(bootstrap.parent_pid)
    opened = bootstrap.open
    learn_secrets(opened.extra_config_json)
    learn_variables(opened.environment)
    speaker = f"storage rank {opened.rank} {opened.backend}"
    start_logging(speaker, LogConfig(format=opened.log_format, level=opened.log_level))
    report_uncaught()
    return dry_run_blocking(bootstrap) if opened.is_dry_run else serve_blocking(bootstrap)


if __name__ == "__main__":
    sys.exit(main())
