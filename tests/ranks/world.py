"""A server of N scheduler cores in one process, under a scripted world: delays, failures, a small memory.

Every rank is the real `SchedulerCore`; the leader is the real `Leader`.  Workers and storage processes are played:
a worker keeps per page a digest of the tokens it holds and refuses to compute on a page that holds anything else,
so a page that is reused, published or loaded too early shows as wrong bytes.  Which thing happens next is drawn
from one seed, so every failure repeats itself.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import deque
from collections.abc import Callable

from sglang_hicache import wire
from sglang_hicache.config import (
    CacheConfig,
    HttpConfig,
    ModelConfig,
    PoolConfig,
    SchedulerConfig,
    ServerConfig,
    StorageConfig,
)
from sglang_hicache.scheduler.core import SchedulerCore
from sglang_hicache.scheduler.failover import Canary
from sglang_hicache.scheduler.tick import Leader
from sglang_hicache.scheduler.weights_update import CommitWeights, DropWeights, StageWeights
from sglang_hicache.storage.attachment_events import Kill, Spawn, Stop
from sglang_hicache.workers.batch import ForwardBatch

PAGE = 4
#: A follower this far behind catches up before the leader goes on (in a server the forward sees to that).
MOST_PLANS_BEHIND = 6


def server_config(ranks: int = 2, device_pages: int = 24, host_pages: int = 40, **cache: object) -> ServerConfig:
    """A tiny server."""
    storage = StorageConfig(op_timeout_s=5.0, drain_timeout_s=2.0, lookup_timeout_s=0.2)
    return ServerConfig(
        model=ModelConfig(
            path="", tokenizer_path="", served_name="m", dtype="float32", context_length=4096, eos_token_ids=(7,)
        ),
        pool=PoolConfig(page_size=PAGE, device_tokens=device_pages * PAGE, host_tokens=host_pages * PAGE),
        cache=CacheConfig(hierarchical=True, **cache),
        storage=storage,
        scheduler=SchedulerConfig(max_running_requests=4, chunked_prefill_size=24, check_digests=True),
        http=HttpConfig(),
        tp_size=ranks,
        run_dir="",
    )


def page_digest(before: str, tokens: list[int]) -> str:
    return hashlib.sha256(f"{before}{tokens}".encode()).hexdigest()[:12]


class PlayedWorker:
    """Computes nothing, remembers what every page holds."""

    def __init__(self, device_pages: int, host_pages: int) -> None:
        #: What it computes with: the first thing that every page says.
        self.weights = ""
        self.device: list[tuple[str | int, ...] | None] = [None] * (device_pages + 1)
        self.host: list[tuple[str | int, ...] | None] = [None] * host_pages
        #: By op: what its copy out will put where.  On the device's stream it is done, in host memory it is not.
        self._landing: dict[int, dict[int, tuple[str | int, ...] | None]] = {}

    def copy_out(self, op_id: int, device_pages: list[int], host_pages: list[int]) -> None:
        pairs = zip(device_pages, host_pages, strict=True)
        self._landing[op_id] = {host: self.device[device] for device, host in pairs}
        for host in host_pages:
            self.host[host] = None

    def copy_in(self, device_pages: list[int], host_pages: list[int]) -> None:
        under_way = {host: content for pages in self._landing.values() for host, content in pages.items()}
        for device, host in zip(device_pages, host_pages, strict=True):
            self.device[device] = under_way.get(host, self.host[host])

    def finish_copy(self, op_id: int) -> None:
        for host, content in self._landing.pop(op_id, {}).items():
            self.host[host] = content

    def forward(self, batch: ForwardBatch, whole: dict[int, list[int]]) -> list[int]:
        """`whole[i]`: all tokens of row i up to the end of its share, for the check of its cached pages."""
        sampled = []
        for i, row in enumerate(batch.rows):
            tokens = whole[i]
            assert tokens[row.prefix_len :] == row.token_ids
            for page, at in zip(row.pages, range(0, row.prefix_len, PAGE)):
                want = (self.weights, *tokens[: min(at + PAGE, row.prefix_len)])
                held = self.device[page]
                assert held is not None and held[: len(want)] == want, (
                    f"page {page} holds {held}, tokens {at}.. want {want}"
                )
            for page, at in zip(row.pages, range(0, len(tokens), PAGE)):
                if at + PAGE > row.prefix_len:
                    self.device[page] = (self.weights, *tokens[: at + PAGE])
            if row.sampling is not None:
                sampled.append(next_token(tokens, self.weights))
        return sampled


def next_token(tokens: list[int], weights: str = "") -> int:
    """The model: some function of the whole text and its weights."""
    return int(page_digest(weights, tokens), 16) % 50 + 8


#: What a store holds: by rank and key.
Store = dict[tuple[int, bytes], tuple[str | int, ...]]


def store_name(spawn: Spawn | Canary) -> str:
    """The backend, and, of a file store, its folder: only what has the same name has the same pages."""
    return spawn.backend + json.loads(spawn.extra_config_json).get("file_storage_path", "")


class PlayedStorage:
    """One storage process of one rank and epoch."""

    def __init__(self, rank: SimRank, spawn: Spawn, store: dict, faults: random.Random, fault_rate: float) -> None:
        self.rank, self.epoch, self.store = rank, spawn.epoch, store
        self.faults, self.fault_rate = faults, fault_rate
        self.name = store_name(spawn)
        self.state = "opening"
        #: What it puts before every key: as the rank's weights are called.
        self.namespace = rank.worker.weights
        self.queue: deque[wire.ToStorage] = deque()
        self.revoked: set[int] = set()
        self.progress: dict[int, int] = {}

    def bad(self) -> bool:
        return self.faults.random() < self.fault_rate

    def tell(self, kind: str, detail: str = "") -> None:
        self.rank.storage_facts.append(wire.StorageFact(kind, self.epoch, detail))

    def end(self) -> None:
        self.state = "gone"
        self.tell("reaped")
        self.tell("quiet")

    def step(self) -> None:
        """One thing happens in this process."""
        if self.state == "opening":
            self.state = "open"
            if self.bad() or self.rank.is_sick(self.name):
                self.tell("open_failed", "no such host")
                self.end()
            else:
                self.tell("opened")
        elif self.state == "killed":
            if self.bad():
                self.tell("reap_timeout", "uninterruptible")
                self.state = "unkillable"
            else:
                self.end()
        elif self.state == "unkillable":
            self.end()
        elif self.state == "open" and self.bad() and self.bad():
            self.tell("lost", "segfault")
            self.end()
        elif self.state in ("open", "stopping"):  # "held": alive, and does nothing
            if self.queue:
                self.work(self.queue[0])
            elif self.state == "stopping":
                self.end()

    def fact(self, op_id: int, pages: int, ended: bool, reason: str = "") -> None:
        self.rank.op_facts.append(wire.OpFact(op_id, pages, ended, ended, reason))
        if ended:
            self.queue.popleft()

    def key(self, key: bytes) -> tuple[int, bytes]:
        return self.rank.number, self.namespace.encode() + key

    def work(self, message: wire.ToStorage) -> None:
        if isinstance(message, wire.RevokeOp):
            self.revoked.add(message.op_id)
            self.queue.popleft()
        elif isinstance(message, wire.UseNamespace):
            self.namespace = message.namespace
            self.queue.popleft()
        elif isinstance(message, wire.LookupPages):
            n = 0
            while n < len(message.keys) and self.key(message.keys[n]) in self.store:
                n += 1
            is_sick = self.rank.is_sick(self.name)
            self.fact(message.op_id, 0 if self.bad() or is_sick else n, True, "io" if is_sick else "")
        elif isinstance(message, wire.ClearPages):
            for key in [k for k in self.store if k[0] == self.rank.number]:
                del self.store[key]
                self.rank.world.cleared[self.name, key] = self.epoch
            self.queue.popleft()
            self.rank.clear_facts.append(wire.ClearFact(message.command_id, "busy" if self.bad() else ""))
        else:
            self.move(message)

    def refuses(self, message: wire.ReadPages | wire.WritePages, at: int) -> str:
        """The code with which this page fails, "" if it does not.  Tests put their own here."""
        if self.rank.is_sick(self.name):
            return "io"
        return self.faults.choice(("io", "io", "no_space", "queue_full")) if self.bad() else ""

    def move(self, message: wire.ReadPages | wire.WritePages) -> None:
        """One page of a read or a write, or its end."""
        done = self.progress.get(message.op_id, 0)
        host = self.rank.worker.host
        reason = "revoked" if message.op_id in self.revoked else ""
        if not reason and done < len(message.keys):
            reason = self.refuses(message, done)
        stop = bool(reason) or done == len(message.keys)
        if not stop and isinstance(message, wire.ReadPages):
            content = self.store.get(self.key(message.keys[done]))
            stop = content is None
            if not stop:
                host[message.host_pages[done]] = content
        elif not stop:
            content = host[message.host_pages[done]]
            assert content is not None, "a page is written to storage before its copy has filled it"
            assert content[0] == self.namespace, "a page is stored under the name of other weights"
            held = self.store.setdefault(self.key(message.keys[done]), content)
            assert held == content, "two contents under one key"
            before = message.keys[done - 1] if done else message.parent
            # What two processes share in a switch to the same store, one may clear under the writes of the other.
            cleared = self.rank.world.cleared.get((self.name, self.key(before)), self.epoch) != self.epoch
            is_known = message.depth + done == 0 or self.key(before) in self.store or cleared
            assert is_known, "a page is stored behind a hole"
        self.progress[message.op_id] = done + (not stop)
        self.fact(message.op_id, self.progress[message.op_id], stop, reason)


class SimRank:
    """One core with its played hands."""

    def __init__(self, world: World, number: int) -> None:
        config = world.config
        self.world, self.number = world, number
        self.core = SchedulerCore(config, number)
        self.worker = PlayedWorker(config.pool.device_tokens // PAGE, config.pool.host_tokens // PAGE)
        self.inbox: deque[wire.TickPlan] = deque()
        self.storage: dict[int, PlayedStorage] = {}
        self.copies: list[int] = []
        self.op_facts: list[wire.OpFact] = []
        self.storage_facts: list[wire.StorageFact] = []
        self.clear_facts: list[wire.ClearFact] = []
        self.weights_facts: list[wire.WeightsFact] = []
        self.canary_facts: list[wire.CanaryFact] = []
        #: Canaries that have not ended.
        self.canaries: list[Canary] = []
        self.news: list[wire.StorageNews] = []
        #: Weights that are being read.
        self.staging: wire.UpdateWeights | None = None
        self.outputs: list[wire.RequestOutput] = []
        self.answers: list[wire.CommandAnswer] = []
        self.digests: dict[int, int] = {}
        #: That the forward of the latest plan computed.
        self.batch_tokens = 0

    def apply(self, plan: wire.TickPlan) -> None:
        core, worker = self.core, self.worker
        effects = core.apply(plan)
        for weights in effects.weights:
            self.change_weights(weights)
        for copy in effects.copies_out:
            worker.copy_out(copy.op_id, copy.device_pages, copy.host_pages)
            self.copies.append(copy.op_id)
        for copy in effects.copies_in:
            worker.copy_in(copy.device_pages, copy.host_pages)
            self.copies.append(copy.op_id)
        for instruction in effects.storage:
            self.drive(instruction)
        for epoch, message in effects.to_storage:
            self.send(epoch, message)
        self.canaries += effects.canaries
        self.outputs += effects.outputs
        self.answers += effects.answers
        self.news += effects.news
        self.batch_tokens = sum(len(row.token_ids) for row in effects.batch.rows) if effects.batch is not None else 0
        if effects.batch is not None:
            whole = {i: s.request.tokens[: s.request.computed + s.tokens] for i, s in enumerate(core._shares)}
            self.outputs += core.apply_results(worker.forward(effects.batch, whole))
        self.digests[plan.number] = core.digest
        if self.world.check_each_tick:
            core.check()
        self.world.watch(self)

    def change_weights(self, instruction: StageWeights | CommitWeights | DropWeights) -> None:
        self.staging = instruction.command if isinstance(instruction, StageWeights) else None
        if isinstance(instruction, CommitWeights):
            self.worker.weights = instruction.weights_digest
            for epoch, process in self.storage.items():
                assert process.state != "opening", "a process that cannot hear yet is told its namespace"
                self.send(epoch, wire.UseNamespace(namespace=instruction.weights_digest))

    def end_staging(self, reason: str = "") -> None:
        if self.staging is not None:
            self.weights_facts.append(wire.WeightsFact(self.staging.id, reason))
            self.staging = None

    def drive(self, instruction: Spawn | Stop | Kill) -> None:
        epoch = instruction.epoch
        if isinstance(instruction, Spawn):
            world = self.world
            store = world.stores.setdefault(store_name(instruction), {})
            self.storage[epoch] = PlayedStorage(self, instruction, store, world.random, world.fault_rate)
        elif self.storage[epoch].state != "gone":
            self.storage[epoch].state = "stopping" if isinstance(instruction, Stop) else "killed"

    def send(self, epoch: int, message: wire.ToStorage) -> None:
        process = self.storage[epoch]
        if process.state in ("open", "stopping", "held"):
            process.queue.append(message)
        elif isinstance(message, wire.ClearPages):
            self.clear_facts.append(wire.ClearFact(message.command_id, "storage process is gone"))
        elif not isinstance(message, wire.RevokeOp | wire.UseNamespace):
            self.op_facts.append(wire.OpFact(message.op_id, 0, True, True))

    def is_sick(self, name: str) -> bool:
        """Does this store fail whatever this rank asks of it?"""
        return bool({(name, self.number), (name, None)} & self.world.sick)

    def end_canary(self) -> None:
        if self.canaries:
            canary = self.canaries.pop(0)
            is_bad = self.is_sick(store_name(canary)) or self.world.random.random() < self.world.fault_rate
            self.canary_facts.append(wire.CanaryFact(canary.number, "refused: no" if is_bad else "", 0.001))

    def finish_copy(self) -> None:
        op_id = self.copies.pop(self.world.random.randrange(len(self.copies)))
        self.worker.finish_copy(op_id)
        self.op_facts.append(wire.OpFact(op_id, 1 << 30, True, True))

    def take_facts(self) -> tuple[list, list, list, list, list]:
        facts = self.op_facts, self.storage_facts, self.clear_facts, self.weights_facts, self.canary_facts
        self.op_facts, self.storage_facts, self.clear_facts, self.weights_facts = [], [], [], []
        self.canary_facts = []
        return facts

    def has_facts(self) -> bool:
        return bool(
            self.op_facts or self.storage_facts or self.clear_facts or self.weights_facts or self.canary_facts
        )


class World:
    """N ranks, the leader, and what happens to them."""

    def __init__(
        self, seed: int, ranks: int = 2, fault_rate: float = 0.02, check_each_tick: bool = True,
        config: ServerConfig | None = None,
    ) -> None:
        self.random = random.Random(seed)
        self.config = config or server_config(ranks)
        self.fault_rate = fault_rate
        self.check_each_tick = check_each_tick
        #: Called for each rank after each of its plans.
        self.watch: Callable[[SimRank], None] = lambda rank: None
        #: By store and key: who has cleared it last.
        self.cleared: dict[tuple[str, tuple[int, bytes]], int] = {}
        #: By the name of the store: they outlive attachments.
        self.stores: dict[str, Store] = {}
        #: Those that fail, by name, on one rank or (None) on all.
        self.sick: set[tuple[str, int | None]] = set()
        self.ranks = [SimRank(self, number) for number in range(ranks)]
        self.leader = Leader(self.config, ranks)
        self.reports: list[deque[wire.RankReport]] = [deque() for _ in range(ranks)]
        self.now_us = 1
        #: What a forward takes for each of its tokens; 0: no forward takes any time, and so the rate stays unknown.
        self.us_per_token = 0
        self.plans: list[wire.TickPlan] = []
        self.submitted: dict[str, wire.NewRequest] = {}
        self.commands: list[str] = []
        #: All that were ever asked for.
        self.weights = [""]

    @property
    def store(self) -> Store:
        """What the memory store holds: the one that most tests attach."""
        return self.stores.setdefault("memory", {})

    @store.setter
    def store(self, pages: Store) -> None:
        self.stores["memory"] = pages

    # ------------------------------------------------------------------------------------------- inputs

    def submit(self, tokens: list[int], max_new_tokens: int = 6, **fields: object) -> str:
        rid = f"r{len(self.submitted)}"
        sampling = wire.SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
        self.submitted[rid] = wire.NewRequest(rid=rid, token_ids=tokens, sampling=sampling, **fields)
        self.leader.add_request(self.submitted[rid])
        return rid

    def command(self, kind: type, **fields: object) -> str:
        command_id = f"c{len(self.commands)}"
        self.commands.append(command_id)
        if kind is wire.UpdateWeights:
            fields = {"model_path": "", **fields}
            self.weights.append(str(fields["weights_digest"]))
        self.leader.add_command(kind(id=command_id, deadline_s=fields.pop("deadline_s", 3.0), **fields), self.now_us)
        return command_id

    def some_tokens(self) -> list[int]:
        """Prompts of a few families, so that they share prefixes of every length."""
        family = self.random.randrange(3)
        length = self.random.randrange(1, 60)
        tokens = [family * 10 + i % 7 for i in range(length)]
        if self.random.random() < 0.5:
            tokens += [100 + self.random.randrange(3) for _ in range(self.random.randrange(20))]
        return tokens

    # --------------------------------------------------------------------------------------------- time

    def lead(self) -> bool:
        """The leader looks at its mailbox; True if there was a plan."""
        leader = self.ranks[0]
        plan = self.leader.next_plan(self.now_us, leader.core)
        if plan is None:
            return False
        self.plans.append(plan)
        for rank in self.ranks[1:]:
            rank.inbox.append(plan)
        leader.apply(plan)
        forward_us = leader.batch_tokens * self.us_per_token
        self.now_us += forward_us
        self.leader.applied(leader.core.digest, forward_us)
        return True

    def follow(self, rank: SimRank) -> None:
        plan = rank.inbox.popleft()
        rank.apply(plan)
        self.report(rank, plan.number)

    def report(self, rank: SimRank, applied: int) -> None:
        ops, storage, clears, weights, canaries = rank.take_facts()
        self.reports[rank.number].append(wire.RankReport(
            rank=rank.number, applied=applied, digest=rank.digests.get(applied, 0), ops=ops, storage=storage,
            clears=clears, weights=weights, canaries=canaries,
        ))

    def deliver(self, rank: SimRank) -> None:
        """What this rank knows reaches the leader."""
        if rank.number == 0:
            self.leader.add_own_facts(*rank.take_facts())
            return
        if rank.has_facts():
            self.report(rank, max(rank.digests, default=0))
        while self.reports[rank.number]:
            self.leader.add_report(self.reports[rank.number].popleft())

    def happen(self) -> None:
        """One random thing of the environment."""
        rank = self.random.choice(self.ranks)
        if rank.staging is not None and self.random.random() < 0.05:
            rank.end_staging("disk" if self.random.random() < 20 * self.fault_rate else "")
        draw = self.random.random()
        if draw < 0.35:
            behind = max(len(r.inbox) for r in self.ranks)
            if behind < MOST_PLANS_BEHIND:
                self.lead()
        elif draw < 0.6 and rank.inbox:
            self.follow(rank)
        elif draw < 0.7 and rank.copies:
            rank.finish_copy()
        elif draw < 0.85:
            rank.end_canary()
            for process in list(rank.storage.values()):
                process.step()
        else:
            self.deliver(rank)
        self.now_us += self.random.choice((10, 100, 1000, 5000))

    def settle(self, limit: int = 20_000) -> None:
        """Let everything that is under way come to its end, fairly and without new faults."""
        self.fault_rate = 0.0
        self.sick.clear()
        for rank in self.ranks:
            for process in rank.storage.values():
                process.fault_rate = 0.0
        for _ in range(limit):
            busy = self.lead()
            for rank in self.ranks:
                while rank.inbox:
                    self.follow(rank)
                    busy = True
                while rank.copies:
                    rank.finish_copy()
                for process in list(rank.storage.values()):
                    process.step()
                rank.end_staging()
                rank.end_canary()
                busy |= rank.has_facts() or bool(self.reports[rank.number])
                self.deliver(rank)
            wake_us = self.leader.wake_at_us(self.ranks[0].core)
            if busy:
                self.now_us += 1000
            elif wake_us is not None:
                self.now_us = max(self.now_us, wake_us)
            elif all(not p.queue for r in self.ranks for p in r.storage.values() if p.state == "open"):
                return
        raise AssertionError(f"never came to rest: {self.ranks[0].core.commands.blockers()}")

    # ------------------------------------------------------------------------------------------- promises

    def check(self) -> None:
        """Call at rest."""
        first = self.ranks[0]
        for rank in self.ranks:
            rank.core.check()
            assert rank.digests == first.digests, f"rank {rank.number} differs from the leader"
            assert rank.core.tiers.slot.face() is first.core.tiers.slot.face()
            assert not rank.core.commands.blockers(), rank.core.commands.blockers()
            assert not rank.core.tiers.backup.line.entries(), "somebody waits to be written for ever"
            assert not rank.core.tiers.quarantine.pages
            answered = [a.id for a in rank.answers]
            assert sorted(answered) == sorted(self.commands), "a command was not answered exactly once"
            ends = [o.rid for o in rank.outputs if o.finish is not None]
            assert sorted(ends) == sorted(self.submitted), "a request did not end exactly once"
            alive = [e for e, p in rank.storage.items() if p.state != "gone"]
            assert alive == ([rank.core.tiers.slot.epoch] if rank.core.tiers.slot.gate() else [])
        for rid, text in self.texts().items():
            prompt = self.submitted[rid].token_ids
            assert any(
                all(token == next_token([*prompt, *text[:i]], weights) for i, token in enumerate(text))
                for weights in self.weights
            ), f"{rid} has another text than without a cache, or one of several weights"

    def texts(self) -> dict[str, list[int]]:
        texts: dict[str, list[int]] = {rid: [] for rid in self.submitted}
        for output in self.ranks[0].outputs:
            texts[output.rid] += output.token_ids
        return texts

    def answer(self, command_id: str) -> wire.CommandAnswer:
        return next(a for a in self.ranks[0].answers if a.id == command_id)
