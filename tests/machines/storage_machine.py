"""A rank with its tree, pools, ops, prefetcher and backups over a real store that a saboteur breaks, step by step.

Hypothesis chooses the steps and their order; every step is one thing that can happen to a server (`storage_world.py`
says what is real).  After each of them the counters must add up, and now and then everything is computed again from the
tokens (`storage_checks.py`).
"""

from __future__ import annotations

import logging
import operator
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from sglang_hicache import wire
from sglang_hicache.cache import backup
from sglang_hicache.cache.op import WRITES, OpKind
from sglang_hicache.config import PREFETCH_POLICIES, WRITE_POLICIES
from sglang_hicache.storage.faulty_settings import Fault
from sglang_hicache.storage.settings import MemorySettings
from sglang_hicache.workers import storage_lanes
from tests.machines.storage_checks import LOSING, Checks
from tests.machines.storage_world import Life, PlayedProcess, Server
from tests.ranks.world import server_config

#: Device and host pages: host larger, about as large, smaller, both tiny.
SIZES = ((24, 40), (16, 16), (40, 14), (10, 6))
EVICTIONS = ("lru", "lfu", "slru", "priority", "mru")
#: Room without an end, twice, the first time in a store that loses nothing; for some pages; for some pages and time.
STORES = (
    MemorySettings(), MemorySettings(max_size=0), MemorySettings(max_size=16_000),
    MemorySettings(max_size=16_000, ttl_s=5),
)
FAULTS = (
    ("open", "error"), ("close", "error"), ("exists", "error"), ("exists", "stale"), ("exists", "none"),
    ("exists", "disappear"), ("read", "error"), ("read", "flip"), ("read", "short"), ("read", "disappear"),
    ("read", "duplicate"), ("read", "none"), ("read", "wrong_type"), ("read", "short_list"), ("read", "exception"),
    ("read", "twice"), ("write", "error"), ("write", "no_space"), ("write", "flip"), ("write", "short"),
    ("write", "disappear"), ("write", "duplicate"), ("write", "exception"), ("write", "short_list"), ("write", "twice"),
    ("write", "no_space"), ("write", "no_space"), ("write", "error"), ("write", "error"), ("delete", "error"),
    ("set_aside", "error"), ("clear", "error"), ("clear", "exception"), ("touch", "error"),
)  # fmt: skip
#: Those that wait more often: under best_effort a read is cut off by the next tick.
PATIENCE = ("wait_complete", *PREFETCH_POLICIES)
#: Spawned, opened, committed, and one to spare.
MOMENTS_TO_ATTACH = 4
#: Longest wait for an op of some kind.
MOST_MOMENTS = 12
#: Steps between two checks of everything.
FULL_EVERY = 50
TIMES_US = (10, 1_000, 30_000, 250_000, 1_000_000, 6_000_000)


def prompt(family: int, length: int, branch: int, tail: int) -> list[int]:
    """Prompts of a few families, so that they share prefixes of every length and split nodes anywhere."""
    return [family * 10 + i % 7 for i in range(length)] + [100 + branch] * tail


prompts = st.builds(prompt, st.integers(0, 2), st.integers(1, 40), st.integers(0, 2), st.integers(0, 12))
fault = st.builds(
    lambda call, first, count, share: {call[0]: Fault(kind=call[1], first=first, count=count, share=share)},
    st.sampled_from(FAULTS), st.integers(0, 3), st.sampled_from((None, None, 1, 5)), st.sampled_from((1.0, 0.4)),
)
#: Nothing, or several things at once.
faults = st.lists(fault, max_size=3).map(lambda several: {call: f for each in several for call, f in each.items()})


#: Moves by name, each as often as it is likely, and what they are drawn from.
_LIKELY: list[str] = []
_ARGUMENTS: dict[str, st.SearchStrategy[dict[str, Any]]] = {}


def move(likely: int, **arguments: st.SearchStrategy[Any]) -> Callable[[Callable], Callable]:
    """Something that can happen.

    Not rules of the state machine, of which Hypothesis would disable a part in every run: runs without requests, or
    with nothing but deaths, are a waste here, where one thing needs many others to have happened before.
    """

    def register(function: Callable) -> Callable:
        _LIKELY.extend([function.__name__] * likely)
        _ARGUMENTS[function.__name__] = st.fixed_dictionaries(arguments)
        return function

    return register


class StorageMachine(RuleBasedStateMachine):
    """What can happen."""

    #: What all runs together have counted, and the number of their steps.
    seen: Counter[str] = Counter()

    server: Server

    @initialize(
        sizes=st.sampled_from(SIZES), eviction=st.sampled_from(EVICTIONS), write=st.sampled_from(WRITE_POLICIES),
        prefetch=st.sampled_from(PATIENCE), faults=faults, store=st.sampled_from(STORES),
    )
    def start(
        self, sizes: tuple[int, int], eviction: str, write: str, prefetch: str, faults: dict[str, Fault],
        store: MemorySettings,
    ) -> None:
        self.steps = 0
        self.server = Server(server_config(1, *sizes, write_policy=write, eviction_policy=eviction), store)
        self.checks = Checks(self.server)
        #: A store that may fail, but keeps what it has: the tests of every other promise are stricter there.
        self.is_honest = store is STORES[0]
        self.checks.has_holes = not self.is_honest
        self._attach(prefetch, write)
        self.sabotage(faults)

    # ----------------------------------------------------------------------------------- requests

    @move(2, tokens=prompts, tenant=st.sampled_from((0, 0, 1, 2)), new=st.integers(1, 24), priority=st.integers(0, 2))
    def request(self, tokens: list[int], tenant: int, new: int, priority: int) -> None:
        self.server.submit(tokens, tenant, new, priority)

    @move(1, tokens=st.lists(prompts, min_size=2, max_size=4), new=st.integers(1, 16))
    def requests(self, tokens: list[list[int]], new: int) -> None:
        for each in tokens:
            self.server.submit(each, 0, new)

    @move(2, which=st.integers(0, 15), more=st.integers(0, 9))
    def request_again(self, which: int, more: int) -> None:
        """The next turn of a conversation: an old prompt, what was answered, and some more."""
        rids = list(self.server.prompts)[-16:]
        if rids:
            rid = rids[which % len(rids)]
            tokens = (self.server.prompts[rid][0] + self.server.texts[rid])[:60] + [99] * more
            self.server.submit(tokens, self.server.tenants[rid])

    @move(2, which=st.integers(0, 3), kind=st.sampled_from(("abort", "revoke")))
    def give_up(self, which: int, kind: str) -> None:
        """A client leaves, or an op is not wanted any more."""
        server = self.server
        if kind == "abort":
            for rid in [rid for rid in server.prompts if rid not in server.ends][which : which + 1]:
                server.leader.add_abort(rid)
        else:
            for op in [op for op in server.core.tiers.ops if op.epoch][which : which + 1]:
                server.core.tiers.storage.revoke(op)

    # --------------------------------------------------------------------------------------- time

    @move(3, times=st.integers(1, 4))
    def ticks(self, times: int) -> None:
        for _ in range(times):
            self.server.tick()

    @move(3, times=st.integers(1, 6))
    def flow(self, times: int) -> None:
        for _ in range(times):
            self.server.flow()
            self.server.now_us += 500

    @move(2, us=st.sampled_from(TIMES_US))
    def time_passes(self, us: int) -> None:
        self.server.now_us += us

    @move(2, count=st.integers(1, 3))
    def copies_end(self, count: int) -> None:
        for _ in range(count):
            self.server.finish_copy()

    @move(4, lane=st.sampled_from(("prefetch", "backup")), batches=st.integers(1, 6))
    def a_lane_works(self, lane: str, batches: int) -> None:
        for process in self.server.alive():
            for _ in range(batches):
                process.step(lane)

    # ----------------------------------------------------------------------------------- operators

    @move(1, prefetch=st.sampled_from(PATIENCE), write=st.sampled_from(WRITE_POLICIES), anew=st.booleans())
    def attach(self, prefetch: str, write: str, anew: bool) -> None:
        """What device and host hold is uploaded; where storage was attached before, only the policies change."""
        self.server.rest()
        self.checks.at_rest()
        if anew:
            self.server.command(wire.DetachStorage)
            self.server.rest()
        self._attach(prefetch, write)

    @move(
        3, prefetch=st.sampled_from(PATIENCE), write=st.sampled_from(WRITE_POLICIES),
        again=st.lists(st.integers(0, 15), min_size=1, max_size=3), times=st.integers(0, 5),
    )
    def start_cold(self, prefetch: str, write: str, again: list[int], times: int) -> None:
        """Device and host forget everything, the store nothing, as after a restart; and somebody comes back."""
        self.server.rest()
        self.server.command(wire.FlushCache)
        self._attach(prefetch, write)
        for which in again:
            self.request_again(which, 1)
        self.flow(times)

    def _attach(self, prefetch: str, write: str) -> None:
        """The store is in order as long as it is tested, and not after."""
        faults = self.server.faults
        self.server.sabotage({})
        self.server.attach(prefetch, write)
        self.flow(MOMENTS_TO_ATTACH)
        self.server.sabotage(faults)

    @move(
        2, kind=st.sampled_from(("attach", "detach", "drain", "drain", "clear", "flush", "policy")),
        policy=st.integers(0, 2),
    )
    def command(self, kind: str, policy: int) -> None:
        """At any moment, allowed or not."""
        match kind:
            case "attach":
                self.server.attach(PREFETCH_POLICIES[policy], WRITE_POLICIES[policy])
            case "detach":
                self.server.command(wire.DetachStorage)
            case "drain":
                self.server.command(wire.DetachStorage, flush_timeout_s=(0.0, 0.05, 5.0)[policy])
            case "clear":
                self.server.command(wire.ClearStorage)
            case "flush":
                self.server.command(wire.FlushCache, timeout_s=(0.0, 0.5, 5.0)[policy])
            case "policy":
                self.server.core.tiers.controller.write_policy = WRITE_POLICIES[policy]

    # ------------------------------------------------------------------------------ pressure, faults

    @move(2, pages=st.sampled_from((1, 4, 12, 100)), tier=st.sampled_from(("device", "host")))
    def pressure(self, pages: int, tier: str) -> None:
        """Somebody needs room, and gives it back at once."""
        controller = self.server.core.tiers.controller
        pool = controller.device if tier == "device" else controller.host
        taken = (controller.allocate_device if tier == "device" else controller.allocate_host)(min(pages, pool.total))
        pool.free(taken or [])
        self.server.free_pages.changed()

    @move(1, faults=faults)
    def sabotage(self, faults: dict[str, Fault]) -> None:
        kinds = {call: fault for call, fault in faults.items() if not (self.is_honest and fault.kind in LOSING)}
        self.server.sabotage(kinds)

    @move(
        2, kind=st.sampled_from(("page lost", "pages rot", "deaf", "hung", "immortal", "dies", "fails")),
        which=st.integers(0, 99),
    )
    def trouble(self, kind: str, which: int) -> None:
        """Somebody else deletes or damages pages, or a storage process is in a bad way."""
        names, objects = list(self.server.memory._objects), self.server.memory._objects
        if kind == "page lost" and names and not self.is_honest:
            self.server.memory.delete_blocking([names[which % len(names)]])
        elif kind == "pages rot" and not self.is_honest:
            for name in names[which % 3 :: 3]:
                page = bytearray(objects[name])
                page[which * 5 % len(page)] ^= 1
                objects[name] = bytes(page)
        for process in self.server.alive():
            process.is_deaf |= kind == "deaf"
            if kind == "hung" and process.life is Life.OPEN:
                process.life = Life.HUNG
            elif kind in ("dies", "fails"):
                process.die(-9 if kind == "dies" else 1)
            elif kind == "immortal" and process.life is Life.OPEN:
                self._write_off(process)

    @move(
        4, kind=st.sampled_from((OpKind.READ, OpKind.READ, OpKind.LOOKUP, OpKind.WRITE, OpKind.UPLOAD, OpKind.DEMOTE)),
        what=st.sampled_from(("deaf", "hung", "immortal", "dies", "drain", "clear", "abort", "revoke")),
        batches=st.integers(0, 3), which=st.integers(0, 15),
    )
    def trouble_in_the_middle(self, kind: OpKind, what: str, batches: int, which: int) -> None:
        """The same just while an op of some kind is under way: what many steps must meet to do by chance."""
        ops, policy = self.server.core.tiers.ops, self.server.core.tiers.controller.write_policy
        if kind in (OpKind.LOOKUP, OpKind.READ):
            self.start_cold("wait_complete", policy, [which], times=0)
        elif kind is OpKind.UPLOAD:
            self.attach("timeout", policy, anew=True)
        for _ in range(MOST_MOMENTS):
            if ops.count(kind):
                break
            self.server.flow(1)
        self.a_lane_works("backup" if kind in WRITES else "prefetch", batches)
        if what == "revoke":
            for op in [op for op in ops if op.kind is kind and op.epoch]:
                self.server.core.tiers.storage.revoke(op)
        elif what == "abort":
            self.give_up(0, what)
        elif what in ("drain", "clear"):
            self.command(what, 0)
        else:
            self.trouble(what, 0)

    def _write_off(self, process: PlayedProcess) -> None:
        """It hangs in a batch, it is killed and does not die: its pages go to quarantine, and then the batch ends."""
        process.life = Life.HUNG
        for us in (6_000_000, 1_000_000):
            self.server.now_us += us
            self.ticks(3)
            for lane in ("prefetch", "backup"):
                process.step(lane)

    # --------------------------------------------------------------------------------------- steps

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """One of the moves."""
        name = data.draw(st.sampled_from(_LIKELY), "move")
        operator.methodcaller(name, **data.draw(_ARGUMENTS[name], "with"))(self)

    # ------------------------------------------------------------------------------------- promises

    @invariant()
    def promises(self) -> None:
        self.steps += 1
        tiers = self.server.core.tiers
        now = {
            "steps": True, "uploading": tiers.ops.count(OpKind.UPLOAD), "store full": tiers.writer.full.since_us,
            "quarantined": tiers.slot.quarantined, f"slot {tiers.slot.face().value}": True,
        }
        self.seen.update(name for name, is_so in now.items() if is_so)
        self.checks.quick()
        if self.steps % FULL_EVERY == 0:
            self.checks.full()

    def teardown(self) -> None:
        """The end of a run: everything comes to rest and is checked once more, unless something is wrong already."""
        try:
            if sys.exc_info()[0] is None:
                self.server.sabotage({})
                self.server.rest()
                self.checks.quick()
                self.checks.full()
                self.checks.at_rest()
                self._count()
        finally:
            self.server.close()

    def _count(self) -> None:
        tiers = self.server.core.tiers
        for room in (tiers.prefetcher, tiers.controller, tiers.backup.books):
            self.seen.update(room.counters)
        self.seen.update({f"lost {reason}": tokens for reason, tokens in tiers.backup.books.lost.items()})
        self.seen.update(f"answer {answer.success}" for answer in self.server.answers.values())
        self.seen["epochs"] += tiers.slot.last_epoch
        self.seen.update(self.server.memory.stats())


def play(
    runs: int, steps: int, phases: Sequence[Phase] = (Phase.generate, Phase.shrink), **options: object
) -> Counter[str]:
    """That many runs; what they counted.

    Ops have several batches, so that they are cut off in the middle, and lines are short, so that they overflow.  The
    log is off: every fault would be told there.
    """
    StorageMachine.seen = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage_lanes, "BATCH_PAGES", 2)
        patch.setattr(storage_lanes, "LOOKUP_NAMES", 3)
        patch.setattr(backup, "MAX_QUEUED", 3)
        # Switched by `disable` alone: loggers remember what it said, and only it makes them forget.
        logging.disable(logging.CRITICAL)
        try:
            run_state_machine_as_test(StorageMachine, settings=hypothesis.settings(
                max_examples=runs, stateful_step_count=steps, deadline=None, database=None,
                suppress_health_check=list(HealthCheck), phases=phases, **options,
            ))
        finally:
            logging.disable(logging.NOTSET)
    return StorageMachine.seen
