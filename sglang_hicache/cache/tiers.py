"""The three tiers of one rank put together, and the ends of their ops.

Builds tree, pools, controller, slot, prefetch and backup, and routes to them what a plan says: outcomes of ops and
of attachments.  Called by `SchedulerCore.apply` and by the commands; never blocks, never sends: what other
processes must do is collected in `effects`.  Replicated on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_hicache import wire
from sglang_hicache.cache.backup import BackupQueue
from sglang_hicache.cache.backup_pace import Limits
from sglang_hicache.cache.backup_writer import BackupWriter
from sglang_hicache.cache.controller import CacheController, Copy
from sglang_hicache.cache.cost_gate import CostGate
from sglang_hicache.cache.digest import StateDigest
from sglang_hicache.cache.evict import EvictionPolicy
from sglang_hicache.cache.evidence import Evidence
from sglang_hicache.cache.incidents import Incidents
from sglang_hicache.cache.loss import Loss
from sglang_hicache.cache.measures import Measures
from sglang_hicache.cache.op import COPIES, WRITES, Op, OpKind, OpPhase, OpTable
from sglang_hicache.cache.pools import PageAllocator
from sglang_hicache.cache.prefetch import Prefetcher
from sglang_hicache.cache.prefetch_waits import Waits
from sglang_hicache.cache.quarantine import Quarantine
from sglang_hicache.cache.storage_ops import StorageOps
from sglang_hicache.cache.tree import PrefixTree
from sglang_hicache.config import ServerConfig
from sglang_hicache.errors import IntegrityError
from sglang_hicache.storage.attachment import StorageSlot
from sglang_hicache.storage.attachment_events import (
    Answer,
    FreeOps,
    Instruction,
    Kill,
    QuarantineOps,
    ReleaseQuarantine,
    RevokeOps,
    Spawn,
    Stop,
)
from sglang_hicache.storage.settings import split_extra_config


@dataclass(slots=True)
class TierEffects:
    """What one tick asks of other hands."""

    #: For the storage driver, in order.
    storage: list[Spawn | Stop | Kill] = field(default_factory=list)
    #: (epoch, message) for the storage process of that epoch.
    to_storage: list[tuple[int, wire.ToStorage]] = field(default_factory=list)
    copies_out: list[Copy] = field(default_factory=list)
    copies_in: list[Copy] = field(default_factory=list)


class Tiers:
    """Device, host and storage of one replica."""

    def __init__(self, config: ServerConfig, digest: StateDigest) -> None:
        pool, cache = config.pool, config.cache
        self.page_size = pool.page_size
        self.ops = OpTable(digest)
        self.slot = StorageSlot(digest)
        self.quarantine = Quarantine()
        #: Whether what is attached is well.
        self.evidence = Evidence(digest)
        self.measures = Measures(pool.page_size * pool.token_bytes)
        self.controller = CacheController(
            cache,
            pool.page_size,
            PrefixTree(pool.page_size, digest, EvictionPolicy.named(cache.eviction_policy, cache.protected_threshold)),
            PageAllocator("device", pool.device_tokens // pool.page_size, digest, first=1),
            PageAllocator("host", pool.host_tokens // pool.page_size, digest) if cache.hierarchical else None,
            self.ops,
        )
        self.storage = StorageOps(self.slot, self.ops, config.storage.op_timeout_s)
        limits = Limits.of(config)
        timeout_s = config.storage.lookup_timeout_s
        self.gate = CostGate(digest, config.scheduler.chunked_prefill_size, int(timeout_s * 1e6))
        self.incidents = Incidents(self.gate, pool.page_size, config.storage.backend)
        self.backup = BackupQueue(self.controller, self.storage, self.incidents.known, pool.page_size)
        self.writer = BackupWriter(self.backup, self.controller, self.storage, limits)
        self.prefetcher = Prefetcher(
            self.controller, self.storage, self.backup, Waits(self.gate, pool.page_size, timeout_s), pool.page_size,
            cache.prefetch_policy,
        )
        self._driver: list[Spawn | Stop | Kill] = []
        self._answers: list[Answer] = []

    # -------------------------------------------------------------------------------- outcomes of a plan

    def begin_tick(self, now_us: int, forward_us: int) -> None:
        """Before anything of a plan is applied: its clock, and how long the forward before it took."""
        self.ops.now_us = self.slot.now_us = now_us
        self.prefetcher.begin_tick(now_us, forward_us)
        self.incidents.begin_tick(now_us)

    def storage_outcome(self, outcome: wire.StorageOutcome) -> None:
        self.carry_out(self.slot.handle(outcome))

    def op_outcome(self, outcome: wire.OpOutcome, tick: int, now_us: int) -> None:
        """All ranks agree on the pages of an op, or on its end."""
        op = self.ops.get(outcome.op_id)
        if op is None:
            raise IntegrityError(f"the plan of tick {tick} speaks of op {outcome.op_id}, which is not in flight")
        if op.kind in COPIES:
            self.measures.op_ended(op, now_us)
            self.backup.offer(self.controller.finish_copy(op))
            return
        op.reason, op.took_us = op.reason or outcome.reason, outcome.took_us
        if op.phase is not OpPhase.SETTLED:
            self.ops.settle(op, outcome.pages)
            if op.kind is OpKind.LOOKUP:
                self.prefetcher.lookup_settled(op, now_us)
            elif op.kind is OpKind.READ:
                self.prefetcher.read_settled(op, tick)
        if outcome.closed:
            attachment = self.slot.find(op.epoch)
            self.measures.op_ended(op, now_us, attachment.backend if attachment else "")
            self.evidence.op_ended(op)
            self._close(op, now_us)
            self.storage.lane_moved(op, now_us)

    def _close(self, op: Op, now_us: int) -> None:
        if op.kind in WRITES:
            self.writer.close(op, now_us)
        else:
            self.prefetcher.close(op)

    def carry_out(self, instructions: list[Instruction]) -> None:
        """Do what the attachment machine asks of the cache; keep the rest for the driver and the desk."""
        if self.backup.follow():
            self._attached()
        self.incidents.cleared(self.slot.generation)
        for instruction in instructions:
            match instruction:
                case Answer():
                    self._answers.append(instruction)
                case RevokeOps(epoch):
                    self._revoke(epoch)
                case FreeOps(epoch):
                    for op in self._take_ops(epoch):
                        self._give_back(op)
                case QuarantineOps(epoch):
                    self.quarantine.hold(epoch, self._take_ops(epoch))
                case ReleaseQuarantine(epoch):
                    for op in self.quarantine.release(epoch):
                        self._give_back(op)
                case Kill(epoch):
                    self._revoke(epoch)  # its requests go on with what has arrived
                    for op in self.ops.of_epoch(epoch):
                        op.deadline_us = 0  # the reap ends it; a deadline that has passed would keep the leader awake
                    self._driver.append(instruction)
                case Spawn() | Stop():
                    self._driver.append(instruction)

    def _attached(self) -> None:
        """Another store than before takes over, whoever asked for it."""
        current = self.slot.current
        if current is not None:
            self.prefetcher.settings, _ = split_extra_config(current.extra_config_json)
        self.writer.attached()

    def _revoke(self, epoch: int) -> None:
        self.prefetcher.stop_epoch(epoch)
        for op in self.ops.of_epoch(epoch):
            self.storage.revoke(op)

    def _take_ops(self, epoch: int) -> list[Op]:
        """Ops of an epoch that ended, out of the table; whoever waited for them goes on."""
        ops = self.ops.of_epoch(epoch)
        for op in ops:
            self.ops.remove(op)
            if op.kind in WRITES:
                self.writer.epoch_gone(op)
            else:
                self.prefetcher.epoch_gone(op)
        return ops

    def _give_back(self, op: Op) -> None:
        if op.kind in WRITES:
            self.writer.free(op)
        if op.host_pages and self.controller.host is not None:
            self.controller.host.free(op.host_pages)
            op.host_pages = []

    def flush(self) -> None:
        """Empty device and host.  What a written-off process may still read stays in quarantine."""
        self.backup.cache_ends(Loss.FLUSHED)
        self.controller.reset(keep_host_pages=frozenset(self.writer.before_flush()))

    def server_ends(self) -> None:
        """What is not stored, or being written, when the last detach begins never will be."""
        self.backup.ending = Loss.SHUTDOWN
        self.backup.cache_ends(Loss.SHUTDOWN)

    def stop_uploads(self) -> bool:
        """Uploads are no blockers, but nothing can be emptied under them.  False: some are still being written, and
        end soon."""
        return self.writer.stop_uploads([op for op in self.ops if op.kind is OpKind.UPLOAD])

    # ----------------------------------------------------------------------------------------- for the books

    def heard(self, news: list[wire.StorageNews]) -> None:
        """What has become of the slot in this tick."""
        for item in news:
            self.incidents.heard(item, self.slot.generation, self.slot.now_us)

    def prompt_complete(self, seed: bytes, tokens: list[int], prompt_tokens: int, cached_tokens: int) -> None:
        """A request has its first token; so many tokens of its prompt were not computed."""
        if self.incidents.is_open:  # asked here: while all is well no prompt is so much as copied
            prompt = tokens[:prompt_tokens]
            self.incidents.prompt_computed(seed, prompt, cached_tokens, self.prefetcher.threshold_pages)

    def attach_failed(self, backend: str, why: str) -> None:
        """An attach that somebody asked for did not come to be."""
        if self.controller.host is not None and self.slot.gate() is None:
            self.incidents.attach_failed(backend, why, self.slot.now_us)

    # --------------------------------------------------------------------------------------- the tick's end

    def take_effects(self) -> TierEffects:
        """Everything this tick asks for; a drain that ended with its last op is part of it."""
        messages, instructions = self.storage.take()
        while instructions:
            self.carry_out(instructions)
            more, instructions = self.storage.take()
            messages += more
        controller = self.controller
        effects = TierEffects(self._driver, messages, controller.copies_out, controller.copies_in)
        self._driver = []
        controller.copies_out, controller.copies_in = [], []
        return effects

    def take_answers(self) -> list[Answer]:
        """What the slot has answered, for the commands that asked."""
        answers, self._answers = self._answers, []
        return answers

    def has_unsent(self) -> bool:
        """Results of the last forward started copies or backups: only another tick hands them out."""
        controller = self.controller
        copies = controller.copies_out or controller.copies_in
        return bool(copies or self.storage.has_unsent() or self.writer.can_start())

    def blockers(self) -> dict[str, int]:
        """Obligations of the cache that are not settled, by name; empty when idle.  Uploads are none: they may go on
        for minutes, and whoever detaches meanwhile wants just that they end."""
        blockers = {f"{kind}-ops": count for kind, count in self.ops.counts().items() if kind != "upload"}
        if len(self.backup):
            blockers["queued-backups"] = len(self.backup)
        return blockers

    def next_deadline_us(self) -> int | None:
        """When the clock may change something by itself."""
        known = (
            self.prefetcher.next_deadline_us(), self.ops.next_deadline_us(), self.writer.next_deadline_us(),
            self.slot.next_deadline_us(),
        )
        return min((deadline for deadline in known if deadline is not None), default=None)
