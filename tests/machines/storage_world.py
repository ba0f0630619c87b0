"""One rank at work over real bytes, played step by step: what the storage machine drives.

Real: core, leader, driver, supervisor, lanes, checked store, saboteur, host pool, and a worker that knows which bytes
belong where.  Played: the clock, the copy stream (`finish_copy`), and the life of a storage process, which is an object
here, so that it opens, works, hangs and dies exactly when a step says so.  Its memory outlives it, as a disk would.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping

from sglang_hicache import wire
from sglang_hicache.cache.page import namespace_seed
from sglang_hicache.cache.pools import HostPool
from sglang_hicache.config import ServerConfig
from sglang_hicache.errors import StorageError
from sglang_hicache.scheduler.core import SchedulerCore
from sglang_hicache.scheduler.storage_driver import StorageDriver
from sglang_hicache.scheduler.tick import Leader
from sglang_hicache.sockets import Poller
from sglang_hicache.storage.attachment_events import Spawn
from sglang_hicache.storage.backend import OpenContext
from sglang_hicache.storage.checked import CheckedStore, Shared
from sglang_hicache.storage.faulty import FaultyBackend, SabotageError
from sglang_hicache.storage.faulty_settings import Fault, FaultySettings
from sglang_hicache.storage.memory import MemoryBackend
from sglang_hicache.storage.negative import NegativeCache
from sglang_hicache.storage.settings import MemorySettings
from sglang_hicache.workers.storage_process import OpenStore, Supervisor, page_layout
from sglang_hicache.workers.synthetic import SyntheticWorker
from tests.machines.storage_witnesses import FreePages, Journal
from tests.ranks.world import PAGE

NAMESPACE = "5a" * 32
ATTACH = {"prefetch_threshold": PAGE, "prefetch_timeout_base": 0.02, "negative_ttl_s": 0.5}
#: Tenants: neither key nor salt, one, the other.
TENANTS = ((None, None), ("a", None), (None, "b"))


class KeptMemory(MemoryBackend):
    """A store that outlives the process that opened it."""

    def close_blocking(self) -> None:
        """The pages stay."""


class Life(enum.Enum):
    OPENING = "opening"
    OPEN = "open"
    #: Alive, and does nothing.
    HUNG = "hung"
    STOPPING = "stopping"
    #: Told to die; until it has, a batch may still run.
    KILLED = "killed"
    GONE = "gone"


class PlayedProcess:
    """One storage process: to the driver what a `StorageClient` is, with the real supervisor and lanes inside."""

    pid = 1

    def __init__(self, server: Server, epoch: int) -> None:
        self.life = Life.OPENING
        self.backend = FaultyBackend(FaultySettings(inner="memory", faults=server.faults), [server.memory])
        self._server = server
        self._said: list[wire.FromStorage] = []
        self._opened = wire.OpenBackend(
            rank=0, epoch=epoch, backend="memory", extra_config_json="{}", namespace=NAMESPACE, head_start=0,
            head_end=1, writes=True, page_bytes=server.pool.page_bytes, host_pages=server.pool.pages,
        )
        self._supervisor: Supervisor | None = None
        self._status = 0
        #: Its end of the line is full, until it works again.
        self.is_deaf = False

    # ------------------------------------------------------------------------- as the driver sees it

    def fds(self) -> list[int]:
        return []

    def send(self, message: wire.ToStorage) -> bool:
        if self._supervisor is None or self.is_deaf:
            return False
        self._supervisor._handle(message)
        return True

    def receive(self) -> list[wire.FromStorage]:
        said, self._said = self._said, []
        for message in said:
            self._server.journal.heard(message)
        return said

    def stop(self) -> None:
        self.life = Life.STOPPING
        if not self.send(wire.StopBackend()):
            self.die()

    def kill(self) -> None:
        if self.life is not Life.GONE:
            self.life = Life.KILLED

    def exited(self) -> bool:
        return self.life is Life.GONE

    def reap(self) -> int:
        return self._status

    def close(self) -> None:
        pass

    # ----------------------------------------------------------------------- as the supervisor sees it

    def put(self, message: wire.FromStorage) -> None:
        self._said.append(message)

    def wake(self) -> None:
        pass

    # ------------------------------------------------------------------------------------- its life

    def open(self) -> None:
        """Open the backend and test it, as the process does before it says a word."""
        shared = Shared(negative=NegativeCache(lambda: self._server.now_us / 1e6, ATTACH["negative_ttl_s"]))
        try:
            self.backend.open_blocking()
            CheckedStore(self.backend, page_layout(self._opened), shared).self_test_blocking(0)
        except (StorageError, SabotageError) as error:
            self.put(wire.BackendOpenFailed(epoch=self._opened.epoch, reason=str(error)))
            self.die(status=1)
            return
        store = OpenStore(self.backend, shared)
        self._supervisor = Supervisor(self._opened, store, self._server.pool, None, self)
        self.put(wire.BackendOpened(epoch=self._opened.epoch, info=store.info()))
        self.life = Life.OPEN

    def step(self, name: str) -> bool:
        """A lane begins its next batch, or ends the one that it has begun; False if nothing is to do.

        Between the two anything may happen: the op may be revoked, the process told to go or to die.
        """
        if self.life is Life.OPENING:
            self.open()
            return True
        if self.life is Life.HUNG or self._supervisor is None:
            return False
        self.is_deaf = False
        lanes = {"prefetch": self._supervisor._prefetch, "backup": self._supervisor._backup}
        lane = lanes[name]
        if lane._running is not None:
            lane._step_blocking(lane._running)
        elif lane._ops:
            lane._next_blocking()
        elif self.life is Life.STOPPING and not any(each._ops for each in lanes.values()):
            self.die()
        else:
            return False
        return True

    def die(self, status: int = 0) -> None:
        """It is gone: what it was told to do and has not done, nobody does."""
        self.life, self._status, self._supervisor = Life.GONE, status, None


class Server:
    """One rank with everything below it."""

    def __init__(self, config: ServerConfig, store: MemorySettings) -> None:
        self.config = config
        self.now_us = 1
        self.worker = SyntheticWorker(holds_copies=True)
        self.worker.load_blocking(PAGE)
        self.pool = HostPool(config.pool.host_tokens // PAGE, self.worker.layout.page_bytes)
        self.worker.allocate(config.pool.device_tokens // PAGE + 1, self.pool)
        self.core = SchedulerCore(config, 0)
        self.leader = Leader(config, 1)
        self.driver = StorageDriver(self._launch, Poller())
        self.journal = Journal()
        self.free_pages = FreePages(self.pool, self.core.tiers.controller.host)
        context = OpenContext(rank=0, namespace=NAMESPACE, page_bytes=self.pool.page_bytes)
        self.memory = KeptMemory(store, context, lambda: self.now_us / 1e6)
        self.faults: dict[str, Fault] = {}
        self.processes: dict[int, PlayedProcess] = {}
        #: Prompts and seeds of their tenants, and what was produced so far.
        self.prompts: dict[str, tuple[list[int], bytes]] = {}
        self.tenants: dict[str, int] = {}
        self.texts: dict[str, list[int]] = {}
        self.ends: dict[str, wire.FinishReason] = {}
        self.answers: dict[str, wire.CommandAnswer] = {}
        self._commands = 0

    def close(self) -> None:
        self.worker.close()
        self.processes.clear()
        self.pool.close()

    # ------------------------------------------------------------------------------------------ inputs

    def submit(self, tokens: list[int], tenant: int = 0, max_new_tokens: int = 3, priority: int = 0) -> str:
        rid = f"r{len(self.prompts)}"
        extra_key, salt = TENANTS[tenant]
        self.prompts[rid] = tokens, namespace_seed(extra_key, salt)
        self.tenants[rid], self.texts[rid] = tenant, []
        sampling = wire.SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, ignore_eos=True)
        self.leader.add_request(wire.NewRequest(
            rid=rid, token_ids=tokens, sampling=sampling, extra_key=extra_key, cache_salt=salt, priority=priority
        ))
        return rid

    def command(self, kind: type, deadline_s: float = 3.0, **fields: object) -> str:
        self._commands += 1
        command_id = f"c{self._commands}"
        self.leader.add_command(kind(id=command_id, deadline_s=deadline_s, **fields), self.now_us)
        return command_id

    def attach(self, prefetch_policy: str, write_policy: str) -> str:
        return self.command(
            wire.AttachStorage, backend="memory", extra_config_json=json.dumps(ATTACH),
            prefetch_policy=prefetch_policy, write_policy=write_policy,
        )

    def sabotage(self, faults: Mapping[str, Fault]) -> None:
        """From now on the store fails like this."""
        self.faults = dict(faults)
        for process in self.processes.values():
            process.backend.sabotage(faults)

    # -------------------------------------------------------------------------------------------- time

    def tick(self) -> bool:
        """One look at everything that has arrived; True if there was a plan."""
        self.driver.poll(self.now_us)
        self.driver.copies_finished(self.worker.finished_copies())
        facts = self.driver.take_facts()
        self.leader.add_own_facts(list(facts.ops.values()), facts.storage, facts.clears)
        plan = self.leader.next_plan(self.now_us, self.core)
        if plan is None:
            return False
        self.free_pages.check()
        effects = self.core.apply(plan)
        for copy in effects.copies_out:
            self.worker.copy_out(copy.op_id, copy.device_pages, copy.host_pages)
        for copy in effects.copies_in:
            self.worker.copy_in(copy.op_id, copy.device_pages, copy.host_pages)
        for instruction in effects.storage:
            self.driver.carry_out(instruction, self.now_us)
        for epoch, message in effects.to_storage:
            self.journal.sent(epoch, message)
            self.driver.send(epoch, message)
        self.answers |= {answer.id: answer for answer in effects.answers}
        self._take(effects.outputs)
        if effects.batch is not None:
            self._take(self.core.apply_results(self.worker.forward_blocking(effects.batch)))
        self.leader.applied(self.core.digest)
        self.free_pages.changed()
        return True

    def _launch(self, spawn: Spawn) -> PlayedProcess:
        self.processes[spawn.epoch] = PlayedProcess(self, spawn.epoch)
        return self.processes[spawn.epoch]

    def _take(self, outputs: list[wire.RequestOutput]) -> None:
        for output in outputs:
            self.texts[output.rid] += output.token_ids
            if output.finish is not None:
                assert output.rid not in self.ends, f"{output.rid} ended twice"
                self.ends[output.rid] = output.finish

    def alive(self) -> list[PlayedProcess]:
        return [process for process in self.processes.values() if process.life is not Life.GONE]

    def finish_copy(self) -> bool:
        """The oldest copy on the stream ends."""
        held = self.worker.held_copies()
        if held:
            self.worker.finish_copy(held[0])
        return bool(held)

    def flow(self, steps: int = 3) -> bool:
        """A moment in which everything gets on a little; False if nothing could.

        With an odd number of steps a moment ends in the middle of a batch as often as not.
        """
        busy = self.tick()
        busy |= self.finish_copy()
        for process in self.alive():
            for lane in ("prefetch", "backup") * steps:
                busy |= process.step(lane)
        return busy

    def rest(self, limit: int = 4000) -> None:
        """Let everything that is under way come to its end: killed processes die, hung ones go on."""
        for _ in range(limit):
            for process in self.alive():
                if process.life is Life.KILLED:
                    process.die(-9)
                elif process.life is Life.HUNG:
                    process.life = Life.OPEN
            if self.flow():
                self.now_us += 1000
                continue
            known = [self.leader.wake_at_us(self.core), self.driver.wake_at_us()]
            wake_us = min((at for at in known if at is not None), default=None)
            if wake_us is None:
                return
            self.now_us = max(self.now_us + 1, wake_us)
        raise AssertionError(f"never comes to rest: {self.core.commands.blockers()}")
