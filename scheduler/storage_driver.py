"""The rank's hands on its storage processes: instructions and messages in, facts out.

Owned by the loop of one rank, on the scheduler thread.  There is one `StorageClient` per epoch that is not reaped yet
(during a drain or a kill there may be two).  The driver decides nothing: what it sees becomes facts, the leader judges
them, and a plan brings them back to all ranks.  It never waits.

    process says                    fact of this rank
    opened / open failed            opened (rank's own description of the backend) / open_failed
    progress of an op               pages so far, settled, closed
    clear done                      clear
    counters                        none: kept for the status
    it ends, unasked                lost, then reaped
    it ends, asked                  reaped
    0.5 s after SIGKILL it lives    reap_timeout; reaped follows if it ever ends

An op that could not be handed over (a full socket, a process that is gone) is settled and closed at zero pages here:
nobody will ever touch it.  An op that was handed over is closed by the process itself, or by the reap.
"""

from __future__ import annotations

import logging
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from sglang_hicache import wire
from sglang_hicache.errors import STOP_CODES, ProtocolError, UserError
from sglang_hicache.observe import Counters, is_level
from sglang_hicache.sockets import Poller, Pull
from sglang_hicache.storage import registry
from sglang_hicache.storage.attachment_events import Kill, Spawn, Stop
from sglang_hicache.storage.diagnosis import diagnose
from sglang_hicache.workers.storage_client import StorageClient

log = logging.getLogger(__name__)

#: A process that has not ended this long after SIGKILL is in uninterruptible I/O; the leader must hear of it.
REAP_TIMEOUT_US = 500_000

#: Microseconds for which the last words of a process that has exited by itself, and not by a signal, are waited for.
LAST_WORDS_US = 500_000

#: A failure of the same kind is news again when there was none for so long.
RELAPSE_US = 600_000_000

#: Codes of ops that no process has seen.
QUEUE_FULL, GONE = "queue_full", "gone"

#: Why an op may stop short although nothing is wrong with the store.
_HARMLESS = ("revoked", QUEUE_FULL)

#: Pages of a copy that has finished: more than any op has, so that it never lowers the minimum over ranks.
ALL_PAGES = 1 << 30

Launch = Callable[[Spawn], StorageClient]


@dataclass(slots=True)
class Facts:
    """What this rank has seen since it last told the leader."""

    ops: dict[int, wire.OpFact] = field(default_factory=dict)
    storage: list[wire.StorageFact] = field(default_factory=list)
    clears: list[wire.ClearFact] = field(default_factory=list)
    weights: list[wire.WeightsFact] = field(default_factory=list)
    canaries: list[wire.CanaryFact] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.ops or self.storage or self.clears or self.weights or self.canaries)


@dataclass(slots=True)
class _Process:
    """One epoch's process on this rank."""

    client: StorageClient
    #: Name of its backend.
    backend: str
    #: After its end, hardware may still write: only a fence could prove that it does not, and there is none yet.
    late_io: bool
    info: dict[str, str] = field(default_factory=dict)
    #: What it has counted, as it last told.
    stats: dict[str, int] = field(default_factory=dict)
    #: Why the latest of its ops that failed did; "" while none has.
    failure: str = ""
    #: By kind of failure: clock of the latest.  Of two that take turns each is told once.
    failed_us: dict[str, int] = field(default_factory=dict)
    #: Why its end is expected; "" while it is not.
    told: str = ""
    #: Clock at which patience with a killed process ends; None: not killed, or already told.
    reap_by_us: int | None = None
    #: What the poller wakes for.
    watched: list[Pull | int] = field(default_factory=list)
    #: Once it has ended: exit status, and the clock until which its last words are waited for.
    status: int | None = None
    hear_until_us: int | None = None
    #: What did not fit into the socket and must not be lost: without its revokes a drain would wait for ops that
    #: nobody wants, and without its namespace the process would mistake the pages.  Nothing overtakes it.
    unsent: list[wire.RevokeOp | wire.UseNamespace] = field(default_factory=list)

    def counted(self) -> dict[str, int]:
        """Its stats without those that may fall."""
        return {name: n for name, n in self.stats.items() if not is_level(name)}


class StorageDriver:
    """All storage processes of one rank."""

    def __init__(self, launch: Launch, poller: Poller) -> None:
        self._launch = launch
        self._poller = poller
        self._processes: dict[int, _Process] = {}
        self._facts = Facts()
        self.counters = Counters()
        #: By backend: what the processes that are gone have counted.
        self._past: dict[str, Counter[str]] = {}
        #: Clock of the latest poll.
        self._now_us = 0

    # ------------------------------------------------------------------------------------------- from the core

    def carry_out(self, instruction: Spawn | Stop | Kill, now_us: int) -> None:
        """Start a storage process, ask it to go, or kill it."""
        if isinstance(instruction, Spawn):
            self._spawn(instruction)
            return
        process = self._processes.get(instruction.epoch)
        if process is None:
            return  # it ended by itself, and the fact is on its way to the leader
        if isinstance(instruction, Stop):
            process.told = process.told or "stopped"
            process.client.stop()
        else:
            process.told = "killed"
            process.reap_by_us = now_us + REAP_TIMEOUT_US
            process.client.kill()

    def _spawn(self, spawn: Spawn) -> None:
        epoch = spawn.epoch
        try:
            _, settings = registry.validate_extra_config(spawn.backend, spawn.extra_config_json)
            late_io = registry.late_io(spawn.backend, settings)
            process = _Process(self._launch(spawn), spawn.backend, late_io)
        except (OSError, UserError) as error:
            found = diagnose(error, spawn.backend)
            log.warning("cannot start the storage process: %s", found, extra={"epoch": epoch})
            self._tell("open_failed", epoch, f"{found.code}: cannot start the storage process: {found.text}")
            self._tell("reaped", epoch)
            self._tell("quiet", epoch)
            return
        self._processes[epoch] = process
        process.watched = process.client.fds()
        for thing in process.watched:
            self._poller.register(thing)

    def send(self, epoch: int, message: wire.ToStorage) -> None:
        """Hand a message to the process of an epoch."""
        process = self._processes.get(epoch)
        if process is not None and not process.unsent and process.client.send(message):
            return
        reason = GONE if process is None else QUEUE_FULL
        match message:
            case wire.ClearPages():
                why = "the storage process is gone" if process is None else reason
                self._facts.clears.append(wire.ClearFact(message.command_id, why))
            case wire.LookupPages() | wire.ReadPages() | wire.WritePages():
                self.counters.add(f"storage_stopped_{reason}")
                log.debug("not handed to storage: %s", reason, extra={"op": message.op_id, "epoch": epoch})
                self._facts.ops[message.op_id] = wire.OpFact(message.op_id, 0, True, True, reason)
            case wire.RevokeOp() | wire.UseNamespace() if process is not None:
                process.unsent.append(message)

    def use_namespace(self, namespace: str) -> None:
        """Whatever is handed over from now on is about pages of this namespace."""
        for epoch in self._processes:
            self.send(epoch, wire.UseNamespace(namespace=namespace))

    # ------------------------------------------------------------------------------------ from the processes

    def poll(self, now_us: int) -> None:
        """Take what the processes have said and whether they live."""
        self._now_us = now_us
        for epoch, process in list(self._processes.items()):
            self._hear(epoch, process)
            if process.client.exited():
                self._hear(epoch, process)  # its last words may have come after the first look
                if self._is_heard_out(process, now_us):
                    self._ended(epoch, process)
            elif process.reap_by_us is not None and now_us >= process.reap_by_us:
                process.reap_by_us = None
                self._tell("reap_timeout", epoch, f"pid {process.client.pid} is in uninterruptible I/O")
            while process.unsent and process.client.send(process.unsent[0]):
                process.unsent.pop(0)

    def _hear(self, epoch: int, process: _Process) -> None:
        try:
            messages = process.client.receive()
        except ProtocolError as error:
            # Nothing that it says can be trusted any more; its end is reported like any other.
            log.error("killing the storage process: %s", error, extra={"epoch": epoch})
            process.client.kill()
            return
        for message in messages:
            self._heard(epoch, process, message)

    def _heard(self, epoch: int, process: _Process, message: wire.FromStorage) -> None:
        match message:
            case wire.BackendOpened():
                process.info = message.info
                self._tell("opened", epoch, "\n".join(f"{name}={value}" for name, value in message.info.items()))
            case wire.BackendOpenFailed():
                process.told = "could not open"
                process.client.stop()  # it waits for that
                self._tell("open_failed", epoch, message.reason)
            case wire.OpProgress():
                code = message.reason.partition(":")[0]
                self._facts.ops[message.op_id] = wire.OpFact(
                    message.op_id, message.pages, message.settled, message.closed, code, message.took_us
                )
                if message.corrupt:
                    self.counters.add("storage_corrupt_pages", message.corrupt)
                if message.reason:
                    self._stopped_short(epoch, process, message)
            case wire.ClearDone():
                self._facts.clears.append(wire.ClearFact(message.command_id, message.reason))
            case wire.BackendStats():
                process.stats = message.stats

    def _stopped_short(self, epoch: int, process: _Process, message: wire.OpProgress) -> None:
        """Serving goes on without the store, so that only the log and the status can tell that it fails: one line for
        each kind of failure, not one for each op of a full disk; but a line again for the next night's full disk."""
        kind, reason = message.reason.partition(":")[0], message.reason
        kind = kind if kind in STOP_CODES else "other"
        self.counters.add(f"storage_stopped_{kind}")
        is_news = False
        if kind not in _HARMLESS:
            before_us = process.failed_us.get(kind)
            is_news = before_us is None or self._now_us - before_us > RELAPSE_US
            process.failure = reason
            process.failed_us[kind] = self._now_us
        level = logging.WARNING if is_news else logging.DEBUG
        log.log(level, "storage failed: %s", reason, extra={"op": message.op_id, "epoch": epoch})

    def _is_heard_out(self, process: _Process, now_us: int) -> bool:
        """Is nothing more to come?  A process that cannot open says why and exits; on a busy machine the exit is seen
        before the words, which a thread of the socket library has yet to fetch.  Without them nobody knows why."""
        process.status = process.client.reap()
        if process.told or process.status is None or process.status < 0:
            return True
        if process.hear_until_us is None:
            process.hear_until_us = now_us + LAST_WORDS_US
            for thing in [thing for thing in process.watched if isinstance(thing, int)]:
                self._poller.unregister(thing)  # the end has been seen; it would wake the loop again and again
                process.watched.remove(thing)
        return now_us >= process.hear_until_us

    def _ended(self, epoch: int, process: _Process) -> None:
        status = process.status
        for thing in process.watched:
            self._poller.unregister(thing)
        process.client.close()
        self._past.setdefault(process.backend, Counter()).update(process.counted())
        del self._processes[epoch]
        how = f"killed by signal {-status}" if status is not None and status < 0 else f"exit code {status}"
        if not process.told:
            log.error("the storage process has ended by itself: %s", how, extra={"epoch": epoch})
            code = "killed" if status == -signal.SIGKILL else "crashed"
            self._tell("lost", epoch, f"{code}: the storage process has ended by itself ({how})")
        else:
            # Told to stop, it closes its backend and exits with 0: anything else is an end that nobody asked for.
            level = logging.WARNING if process.told == "stopped" and status else logging.INFO
            log.log(level, "the storage process is gone: %s, %s", process.told, how, extra={"epoch": epoch})
        self._tell("reaped", epoch)
        if not process.late_io:
            self._tell("quiet", epoch)

    def _tell(self, kind: wire.StorageFactKind, epoch: int, detail: str = "") -> None:
        self._facts.storage.append(wire.StorageFact(kind, epoch, detail))

    # ------------------------------------------------------------------------------------------- for the loop

    def weights_read(self, command_id: str, reason: str) -> None:
        """This rank's vote on new weights: "" or why it cannot take them."""
        self._facts.weights.append(wire.WeightsFact(command_id, reason))

    def canary_ended(self, number: int, report: wire.DryRunReport) -> None:
        """This rank has tried a backend that is not attached."""
        reason = f"{report.code}: {report.reason}" if report.failed_step else ""
        page_s = report.write_page_s + report.read_page_s
        self._facts.canaries.append(wire.CanaryFact(number, reason, page_s))

    def copies_finished(self, op_ids: list[int]) -> None:
        """Copies between device and host ask nobody else: what is finished is settled and closed."""
        for op_id in op_ids:
            self._facts.ops[op_id] = wire.OpFact(op_id, ALL_PAGES, True, True)

    def take_facts(self) -> Facts:
        """What there is to report; the caller reports it."""
        facts, self._facts = self._facts, Facts()
        return facts

    def wake_at_us(self) -> int | None:
        """When the driver must look although nothing has arrived."""
        times = [time for p in self._processes.values() for time in (p.reap_by_us, p.hear_until_us) if time is not None]
        return min(times, default=None)

    def info(self, epoch: int) -> dict[str, str]:
        """What the backend of an epoch says of itself."""
        process = self._processes.get(epoch)
        return dict(process.info) if process is not None else {}

    def stats(self, epoch: int) -> dict[str, int]:
        """What the process of an epoch has counted, as it last told."""
        process = self._processes.get(epoch)
        return dict(process.stats) if process is not None else {}

    def totals(self) -> dict[str, Counter[str]]:
        """By backend: what all its processes have counted, those that are gone included."""
        totals = {backend: Counter(past) for backend, past in self._past.items()}
        for process in self._processes.values():
            totals.setdefault(process.backend, Counter()).update(process.counted())
        return totals

    def failure(self, epoch: int) -> tuple[str, int]:
        """Why the latest op of an epoch that failed did, "" if none has - the store is attached, and yet of no use -
        and the clock of that."""
        process = self._processes.get(epoch)
        return (process.failure, max(process.failed_us.values(), default=0)) if process is not None else ("", 0)

    def close(self) -> None:
        """At the very end: nothing of what is left may outlive the rank."""
        for process in self._processes.values():
            process.client.kill()
            process.client.close()
        self._processes.clear()
