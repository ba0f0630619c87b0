"""What the server does by itself about a store that is sick: takes it out, tries it, brings it or another one back.

    evidence of the ops ─▶ trip: detach with the deadline of a forced one      (`auto_detach` ends here)
    the wait is over, or a standby is left ─▶ canary on every rank ─▶ attach
    a standby serves, the primary was well for `healthy_s` ─▶ switch back

The first of the stores is the primary: what a command has attached.  Its `fault_tolerance` goes for all of them.
Changes go through the storage slot (`changes.py`); there is at most one under way, and none while a command works on
the slot or the weights change.  What the slot does is never guessed from here: `advance` looks at the gate.
Called by `SchedulerCore.apply` and by the commands; replicated, on the plan's clock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from sglang_hicache import wire
from sglang_hicache.cache.breaker import Breaker, Trust, Turn
from sglang_hicache.cache.digest import StateDigest
from sglang_hicache.cache.op import OpKind
from sglang_hicache.cache.tiers import Tiers
from sglang_hicache.config import StorageConfig
from sglang_hicache.scheduler.changes import Changes
from sglang_hicache.scheduler.stores import Store, Stores
from sglang_hicache.storage.attachment_events import Answer, Verdict

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Canary:
    """A try of a backend that is not attached, on every rank, with pages that are nobody's."""

    number: int
    backend: str
    extra_config_json: str
    #: Seconds after which a rank that has not said anything has failed.
    deadline_s: float

    def __repr__(self) -> str:
        return f"Canary({self.number}, {self.backend!r})"  # without the config: it may hold a key


@dataclass(frozen=True, slots=True)
class _Try:
    """A canary that is under way."""

    number: int
    store: Store
    due_us: int


class Failover:
    """One replica's."""

    def __init__(
        self, rank: int, tiers: Tiers, config: StorageConfig, is_busy: Callable[[], bool], digest: StateDigest
    ) -> None:
        self._rank = rank
        self._tiers = tiers
        #: Nothing may be attached just now: the weights change.
        self._is_busy = is_busy
        self._digest = digest
        self.breaker = Breaker()
        self._stores = Stores()
        #: What could not be attached at the start is tried again, whatever the level.
        self._keeps_trying = False
        self._try: _Try | None = None
        #: Its canary was good: attached as soon as nothing stands in the way.
        self._next: Store | None = None
        self._changes = Changes(tiers, config)
        self._numbers = 0
        #: Canaries that begin with this tick; the core takes them.
        self.started: list[Canary] = []
        self._counts = {"reconnect": 0, "failover": 0, "failback": 0}

    def __repr__(self) -> str:
        return f"<Failover {self._stores.limits.level} {self._stores.serving or 'nobody'} serves, {self.breaker!r}>"

    @property
    def _now_us(self) -> int:
        """Leader's clock of this plan."""
        return self._tiers.ops.now_us

    # -------------------------------------------------------------------------------- told by the commands

    def attach_ended(self, command: wire.AttachStorage, answer: Answer) -> None:
        """An attach or a switch that a command brought was committed, or has failed."""
        slot, config = self._tiers.slot, command.extra_config_json or "{}"
        if answer.verdict is Verdict.OK:
            self._stores.define(command.backend, config)
            self._forget()
            self._serves(self._stores.primary)
            self.breaker.take(Turn.STOP if self._stores.limits.level == "off" else Turn.WATCH, self._now_us)
        elif command.keeps_trying and slot.last_error and not self._stores:  # without an error somebody gave it up
            self._stores.define(command.backend, config)
            self._forget()
            self._keeps_trying = True
            self._stores.primary.refused(self._now_us)
            self.breaker.take(Turn.TRIP, self._now_us, slot.last_error)
            self._say(logging.WARNING, f"storage is not there at the start, and is tried again: {slot.last_error}")

    def detach_begins(self) -> None:
        """A command takes the storage out: nothing comes back by itself."""
        self._stores.clear()
        self._forget()
        self._tiers.evidence.rest()
        self.breaker.take(Turn.STOP, self._now_us)

    def _forget(self) -> None:
        """Whatever was going on does not matter any more."""
        self._try = self._next = self._changes.under_way = None
        self._keeps_trying = False
        self._digest.mix(72, 1, bool(self._stores))

    # ------------------------------------------------------------------------------ told by canaries and slot

    def canary_ended(self, outcome: wire.CanaryOutcome) -> None:
        """All ranks agree on how a canary ended."""
        tried = self._try
        if tried is None or tried.number != outcome.number:
            return  # a command has come in between, in this plan
        self._try, store, why = None, tried.store, outcome.failure
        if not why and store.was_slow(outcome.page_s):
            why = f"slow: a page took {outcome.page_s:.3f} s to be written and read"
        self._digest.mix(72, 3, outcome.number, not why)
        if why:
            self._refused(store, why)
        elif self._stores.serving is None:
            self._next = store
        else:
            if store.good_since_us is None:
                self._say(logging.INFO, f"{store} is well again; it is watched for a while before it is taken back")
            if store.was_good(self._now_us):
                self._next = store

    def _refused(self, store: Store, why: str) -> None:
        """It could not be used after all."""
        if self._stores.serving is None or store.good_since_us is not None:
            self._say(logging.INFO, f"{store} is not well: {why}")
        store.refused(self._now_us)
        if self._stores.serving is None:
            self.breaker.take(Turn.REFUSE, self._now_us)

    def slot_answered(self, answer: Answer) -> None:
        """The slot has finished with a change that began here (its id begins with `AUTOMATIC`)."""
        change = self._changes.ended(answer.command_id)
        if change is None:
            return
        self._digest.mix(72, 4, answer.verdict is Verdict.OK)
        if change.store is None:
            self._tiers.slot.last_error = self.breaker.reason  # how the drain ended is the smaller half of the story
        elif answer.verdict is Verdict.OK:
            self._committed(change.store, change.cause)
        else:
            self._refused(change.store, f"could not be attached: {answer.detail}")

    def _committed(self, store: Store, cause: str) -> None:
        if self.breaker.state is Trust.HALF_OPEN:
            self.breaker.take(Turn.COMMIT, self._now_us)
        self._counts[cause] += 1
        self._keeps_trying = False
        self._serves(store)
        if self._stores.limits.level == "off":
            self.breaker.take(Turn.STOP, self._now_us)
        self._say(logging.WARNING, f"{store} serves: {cause}")

    def _serves(self, store: Store) -> None:
        self._stores.serves(store, self._now_us)
        if self._stores.limits.level != "off":
            self._tiers.evidence.watch(self._tiers.slot.gate() or 0, self._stores.limits, store.paces)

    # ------------------------------------------------------------------------------------------ every plan

    def advance(self, now_us: int, forward_us: int) -> None:
        """After the outcomes and the commands of a plan: is what serves sick, and is something due?"""
        self.breaker.begin(now_us)
        tiers, serving = self._tiers, self._stores.serving
        recompute_us = tiers.gate.compute_us(tiers.page_size) or 0
        complaint = tiers.evidence.judge(now_us, forward_us, tiers.ops.count(OpKind.READ), recompute_us)
        if serving is not None and tiers.slot.gate() is None:
            self._trip(tiers.slot.last_error)
        elif serving is not None and complaint and not self._changes.is_held():
            self._take_out(complaint)
        if self._is_free():
            self._move_on()

    def _is_free(self) -> bool:
        """May something be begun now?  While a sick store drains, the next one is tried already."""
        is_bringing = self._try is not None or self._changes.is_bringing()
        return bool(self._stores) and not is_bringing and not self._changes.is_held() and not self._is_busy()

    def _take_out(self, complaint: str) -> None:
        """The gate closes now, on every rank; requests go on with what has arrived."""
        self._changes.under_way = None  # a switch that is opening ends with it
        self._trip(complaint)
        self._tiers.slot.last_error = complaint
        self._changes.take_out()

    def _trip(self, reason: str) -> None:
        """What serves is sick, or gone."""
        store = self._stores.lost(self._now_us)
        self._tiers.evidence.rest()
        if store is None or self._stores.limits.level == "off":
            return
        self.breaker.take(Turn.TRIP, self._now_us, reason)
        if self._try is not None or self._next is not None or self._changes.under_way is not None:
            self.breaker.take(Turn.TRY, self._now_us)  # the primary, on its way back
        self._digest.mix(72, 5, self.breaker.trips)
        wait_s = (store.backoff.due_us - self._now_us) / 1e6
        self._say(logging.WARNING, f"{store} is taken out, and left alone for {wait_s:.1f} s at least: {reason}")

    def _move_on(self) -> None:
        """Nothing is being tried or opened: begin what is due."""
        if self._next is not None:
            self._attach(self._next)
        elif self._stores.serving is None:
            due = [store for store in self._stores.tried(self._keeps_trying) if store.backoff.due_us <= self._now_us]
            if due:
                self.breaker.take(Turn.TRY, self._now_us)
                self._start(due[0])
        elif self._stores.watches_primary() and self._stores.primary.probe_us <= self._now_us:
            self._start(self._stores.primary)

    def _start(self, store: Store) -> None:
        """A canary."""
        self._numbers += 1
        timeout_s = store.limits.canary_timeout_s
        self._try = _Try(self._numbers, store, self._now_us + int(timeout_s * 1e6))
        self.started.append(Canary(self._numbers, store.backend, store.extra_config_json, timeout_s))
        self._digest.mix(72, 6, self._numbers)

    def _attach(self, store: Store) -> None:
        """It was well a moment ago."""
        is_switch = self._stores.serving is not None
        if self._changes.may_bring(is_switch=is_switch):
            self._next = None
            self._changes.bring(store, self._stores.cause(store), is_switch=is_switch)

    def _say(self, level: int, text: str) -> None:
        if self._rank == 0:
            log.log(level, "%s", text, extra={"epoch": self._tiers.slot.epoch})

    # --------------------------------------------------------------------------------------- asked by others

    def canaries(self) -> dict[int, int]:
        """Canaries under way: number -> leader's clock when its time is over.  The leader collects what ranks say."""
        return {} if self._try is None else {self._try.number: self._try.due_us}

    def next_deadline_us(self) -> int | None:
        """When something becomes due without any news: a canary, or, at once, what was held up until now."""
        if not self._is_free():
            return None
        if self._next is not None:
            is_switch = self._stores.serving is not None
            return self._now_us if self._changes.may_bring(is_switch=is_switch) else None
        if self._stores.serving is None:
            return min((store.backoff.due_us for store in self._stores.tried(self._keeps_trying)), default=None)
        return self._stores.primary.probe_us if self._stores.watches_primary() else None

    def under_way(self) -> str:
        """Which change the server makes by itself just now, in words; "" if it makes none."""
        return self._changes.in_words()

    def status(self, now_us: int) -> wire.BreakerStatus:
        """For people."""
        breaker, stores, due_us = self.breaker, self._stores, self.next_deadline_us()
        return wire.BreakerStatus(
            state=breaker.state.value,
            level=stores.limits.level,
            in_state_s=breaker.in_state_us(now_us) / 1e6,
            total_s={state.value: us / 1e6 for state, us in breaker.total_us(now_us).items()},
            trips=breaker.trips,
            reason=breaker.reason,
            serving=stores.serving.name if stores.serving else "",
            next_try_s=None if due_us is None else max(0, due_us - now_us) / 1e6,
            failovers=self._counts["failover"],
            failbacks=self._counts["failback"],
            out_s=breaker.out_us(now_us) / 1e6,
        )
