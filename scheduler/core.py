"""The deterministic heart of a rank: `apply(plan) -> effects`, then the forward, then `apply_results(ids)`.

A tick, in order:

    outcomes   what all ranks agree on: attachments, ops, clears, weights, canaries   tiers, commands, update, failover
    inputs     admin commands; then, once the failover has moved, requests, aborts    commands, here
    due        what waited and can go on now: commands, an update of the weights      commands, update
    choice     who computes what, with which pages                                    admission
    effects    messages, copies, the batch                                            for the loop
    results    sampled ids: tokens, stops, insertion into the tree                    results

Every rank applies the same plans and so holds the same state; nothing here reads a clock, a socket, a random
number or a rank (but to name itself in its answers).  `digest` changes with every change of state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sglang_hicache import wire
from sglang_hicache.cache.check import (
    Held,
    check_counts,
    check_in_flight,
    check_pools,
    check_tree,
    check_unlocked,
)
from sglang_hicache.cache.controller import Copy
from sglang_hicache.cache.digest import StateDigest
from sglang_hicache.cache.op import OpKind
from sglang_hicache.cache.page import namespace_seed
from sglang_hicache.cache.tiers import Tiers
from sglang_hicache.config import ServerConfig
from sglang_hicache.scheduler import batch as batches
from sglang_hicache.scheduler.admission import Admission, Share
from sglang_hicache.scheduler.commands import Commands
from sglang_hicache.scheduler.failover import Canary, Failover
from sglang_hicache.scheduler.news import News
from sglang_hicache.scheduler.pages import RequestPages
from sglang_hicache.scheduler.request import Request, RequestState, StopText
from sglang_hicache.scheduler.results import Results
from sglang_hicache.scheduler.served import Served
from sglang_hicache.scheduler.status import RankStatus
from sglang_hicache.scheduler.waiting import WaitingQueue
from sglang_hicache.scheduler.weights_update import Advance, WeightsInstruction, WeightsUpdate
from sglang_hicache.storage.attachment_events import AUTOMATIC, Kill, Spawn, Stop
from sglang_hicache.workers.batch import ForwardBatch


@dataclass(slots=True)
class Effects:
    """What one tick asks of this rank's hands, in the order in which the loop does it."""

    #: Before anything else: what is copied, computed and stored in this tick belongs to the weights after it.
    weights: list[WeightsInstruction] = field(default_factory=list)
    copies_out: list[Copy] = field(default_factory=list)
    copies_in: list[Copy] = field(default_factory=list)
    storage: list[Spawn | Stop | Kill] = field(default_factory=list)
    to_storage: list[tuple[int, wire.ToStorage]] = field(default_factory=list)
    canaries: list[Canary] = field(default_factory=list)
    #: All ranks have the same; the leader tells them.
    news: list[wire.StorageNews] = field(default_factory=list)
    answers: list[wire.CommandAnswer] = field(default_factory=list)
    #: Refusals and aborts; what the forward produces comes from `apply_results`.
    outputs: list[wire.RequestOutput] = field(default_factory=list)
    batch: ForwardBatch | None = None
    #: Leave the loop after this tick.
    stop: bool = False


def no_stop_text(_sampling: wire.SamplingParams, _prompt_ids: Sequence[int]) -> StopText | None:
    """For ranks without a tokenizer: requests with stop strings are not sent to them."""
    return None


class SchedulerCore:
    """The replicated state of one rank."""

    def __init__(
        self,
        config: ServerConfig,
        rank: int,
        make_stop_text: Callable[[wire.SamplingParams, Sequence[int]], StopText | None] = no_stop_text,
    ) -> None:
        self._config = config
        self._make_stop_text = make_stop_text
        self._digest = StateDigest()
        #: Longest sequence that can ever be computed here, in tokens.
        self.longest_tokens = min(config.model.context_length, config.pool.device_tokens)
        self.tick = 0
        self.tiers = Tiers(config, self._digest)
        self.waiting = WaitingQueue(config.scheduler.schedule_policy)
        self._pages = RequestPages(
            self.tiers.controller, self.tiers.backup, config.pool.page_size, config.cache.reuse_prefixes
        )
        self.admission = Admission(config, self.waiting, self._pages, self.tiers.prefetcher, self.tiers.slot)
        served = Served(self.tiers)
        self._results = Results(config.model, self.admission, self._pages, self.longest_tokens, served)
        self.update = WeightsUpdate(rank, config.model, self.tiers, self.waiting, self.admission, self._digest)
        self.failover = Failover(
            rank, self.tiers, config.storage, lambda: bool(self.update.blockers()), self._digest
        )
        self.news = News(self.tiers.slot)
        self.status = RankStatus(rank, self.tiers, self.waiting, self.admission, served, self.failover)
        self.commands = Commands(rank, self.tiers, self.failover, self._load, config.cache.hierarchical)
        self._requests: dict[str, Request] = {}
        self._shares: list[Share] = []

    @property
    def digest(self) -> int:
        return self._digest.value

    # ------------------------------------------------------------------------------------------- apply

    def apply(self, plan: wire.TickPlan) -> Effects:
        """Take one plan.  The caller carries the effects out and, if there is a batch, calls `apply_results`."""
        self.tick = plan.number
        self.status.begin(plan)
        self.tiers.begin_tick(plan.now_us, plan.forward_us)
        effects = Effects()
        for outcome in plan.storage:
            self.tiers.storage_outcome(outcome)
        self._answer_slot()  # now: the write policy of an attach decides what its upload copies
        self.news.look()  # after each step that may move the slot: seen only once, two changes would look like one
        for op_outcome in plan.ops:
            with self.status.credited(op_outcome.op_id):
                self.tiers.op_outcome(op_outcome, self.tick, plan.now_us)
        for clear in plan.clears:
            self.commands.clear_ended(clear)
        for voted in plan.weights:
            self._weights_moved(self.update.voted(voted), plan.now_us, effects)
        for canary in plan.canaries:
            self.failover.canary_ended(canary)
        for command in plan.commands:
            if isinstance(command, wire.UpdateWeights):
                self.update.begin(command, plan.now_us)
            else:
                self.commands.start(command, plan.now_us)
            effects.stop |= isinstance(command, wire.Shutdown)
        self.news.look()
        self.failover.advance(plan.now_us, plan.forward_us)
        self.news.look()
        for request in plan.requests:
            self._receive(request, plan.now_us, effects)
        for rid in plan.aborts:  # after the requests: one that came and went within a tick has both in this plan
            self._abort(rid, effects)
        self.commands.look_again(plan.now_us)
        self._weights_moved(self.update.advance(plan.now_us), plan.now_us, effects)
        self._shares = self.admission.choose(self.tick, plan.now_us)
        self.tiers.writer.pump(plan.now_us)
        self._collect(effects)
        return effects

    def _collect(self, effects: Effects) -> None:
        tiers = self.tiers.take_effects()
        effects.storage, effects.to_storage = tiers.storage, tiers.to_storage
        effects.copies_out, effects.copies_in = tiers.copies_out, tiers.copies_in
        effects.canaries, self.failover.started = self.failover.started, []
        self._answer_slot()
        self.news.look()
        effects.news = self.news.take()
        self.tiers.heard(effects.news)
        update = self.update.take_effects()
        effects.weights = update.instructions
        effects.answers, self.commands.answers = self.commands.answers + update.answers, []
        effects.batch = batches.build(self._shares) if self._shares else None

    def _answer_slot(self) -> None:
        """What the storage slot has answered goes to whoever asked: a command, or the server itself."""
        for answer in self.tiers.take_answers():
            if answer.command_id.startswith(AUTOMATIC):
                self.failover.slot_answered(answer)
            else:
                self.commands.slot_answered(answer)

    def apply_results(self, token_ids: list[int]) -> list[wire.RequestOutput]:
        """Take the ids that the forward of this tick sampled, one per row that wanted one."""
        outputs, ended = self._results.apply(self._shares, token_ids, self.tick)
        self._shares = []
        for request in ended:
            del self._requests[request.rid]
        self._digest.mix(41, self.tick, *token_ids)
        return outputs

    # ---------------------------------------------------------------------------------------- requests

    def _receive(self, message: wire.NewRequest, now_us: int, effects: Effects) -> None:
        request = Request(
            rid=message.rid, prompt_tokens=len(message.token_ids), tokens=list(message.token_ids),
            sampling=message.sampling, seed=namespace_seed(message.extra_key, message.cache_salt),
            priority=message.priority, arrival=self.tick * 1_000_000 + len(self._requests),
        )
        if refusal := self._refusal(request):
            effects.outputs.append(request.output((), refusal))
            return
        if request.is_probe and self.admission.running:
            return  # whatever the running requests produce next proves health
        if message.sampling.stop:
            request.stop_text = self._make_stop_text(message.sampling, message.token_ids)
        self._requests[request.rid] = request
        self.waiting.add(request)
        self._digest.mix(42, request.prompt_tokens, request.priority)
        if not self.update.is_holding:
            self._prefetch(request, now_us)

    def _prefetch(self, request: Request, now_us: int) -> None:
        """Ask the store for what device and host lack of a waiting request's prompt."""
        key = self._pages.key(request)
        if key:
            self.tiers.prefetcher.start(
                request.rid, request.seed, key, self._pages.match(request), request.tokens, now_us
            )

    def _weights_moved(self, advance: Advance, now_us: int, effects: Effects) -> None:
        """An update of the weights has taken a step: stop what was fetched for the line, or fetch it anew."""
        if advance is Advance.HELD:
            self.tiers.prefetcher.stop_probe()
        if advance is Advance.HELD and self.update.aborts_requests:
            for rid in list(self._requests):
                self._abort(rid, effects, "aborted: the weights of the model change")
        elif advance is Advance.HELD:
            for request in self.waiting:
                self.tiers.prefetcher.forget(request.rid)
        elif advance is Advance.RELEASED:
            for request in self.waiting:
                self._prefetch(request, now_us)

    def _refusal(self, request: Request) -> wire.FinishReason | None:
        """Why a request can never run, or not now; None if it may wait in line."""
        why, status_code = "", 400
        if request.rid in self._requests:
            why = f"request id '{request.rid}' is in use: every running request needs its own"
        elif not request.tokens or len(request.tokens) >= self.longest_tokens:
            why = (
                f"the prompt has {len(request.tokens)} tokens: between 1 and {self.longest_tokens - 1} are allowed "
                "(--context-length and --max-total-tokens limit it)"
            )
        elif len(self.waiting) >= self._config.scheduler.max_queued_requests:
            why = f"{len(self.waiting)} requests are waiting, which is the limit: try again later"
            status_code = 503
        return wire.FinishReason(type="abort", message=why, status_code=status_code) if why else None

    def _abort(self, rid: str, effects: Effects, message: str = "aborted") -> None:
        """Free everything of a request at whatever stage it is; an unknown rid has ended meanwhile."""
        request = self._requests.pop(rid, None)
        if request is None:
            return
        if request.state is RequestState.WAITING:
            self.waiting.remove(request)
            self.tiers.prefetcher.forget(rid)
            request.move(RequestState.FINISHED)
        else:
            self._results.end(request, self.tick)
        self._digest.mix(43, request.prompt_tokens, request.output_len)
        effects.outputs.append(request.output((), wire.FinishReason(type="abort", message=message)))

    def _load(self) -> dict[str, int]:
        """What keeps this rank from being idle, beside its tiers."""
        return self.status.requests() | self.update.blockers()

    # ------------------------------------------------------------------------------------- asked by the loop

    def unanswered(self) -> set[str]:
        """Ids of the commands that have begun and wait for something but the storage slot."""
        staging = self.update.staging()
        return self.commands.unanswered() | ({staging} if staging else set())

    def has_work(self) -> bool:
        """The next tick would compute something without any news."""
        return bool(self.admission.running) or self.admission.will_admit() or self.tiers.has_unsent()

    def next_deadline_us(self) -> int | None:
        """When the leader's clock changes something by itself."""
        known = (
            self.tiers.next_deadline_us(), self.commands.next_deadline_us(), self.update.next_deadline_us(),
            self.failover.next_deadline_us(),
        )
        return min((deadline for deadline in known if deadline is not None), default=None)

    def check(self) -> None:
        """Every page has exactly one owner: free list, tree, request, op or quarantine.  Raises IntegrityError."""
        tiers, controller = self.tiers, self.tiers.controller
        check_tree(controller.tree)
        tiers.backup.check()
        check_pools(
            controller.tree, controller.device, controller.host,
            {r.rid: r.pages[r.locked_pages :] for r in self.admission.running},
            {repr(op): op.host_pages for op in tiers.ops} | {"quarantine": tiers.quarantine.owned()},
        )
        if not self._requests and not len(tiers.ops) and not tiers.quarantine.pages:
            check_unlocked(controller.tree)

    def check_counts(self) -> None:
        """`check` as far as counters can tell, and that the slot knows of every op: for after every tick."""
        tiers, running = self.tiers, self.admission.running
        check_in_flight(tiers.ops, tiers.slot)
        ops = [*tiers.ops, *tiers.quarantine]
        locking = [op.kind is OpKind.WRITE_THROUGH for op in ops if op.node is not None]
        check_counts(tiers.controller.tree, tiers.controller.device, tiers.controller.host, Held(
            device_pages=sum(len(r.pages) - r.locked_pages for r in running),
            host_pages=sum(len(op.host_pages) for op in ops),
            device_locks=sum(r.node is not None for r in running) + locking.count(True),
            host_locks=locking.count(False),
        ))
