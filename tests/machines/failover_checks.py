"""What must hold of failover, breaker and evidence, as functions: they also have to notice mistakes made on purpose."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from sglang_hicache import wire
from sglang_hicache.cache.breaker import Trust
from sglang_hicache.cache.evidence import Evidence, Paces
from sglang_hicache.cache.op import Op, OpKind
from sglang_hicache.storage.attachment_events import State
from sglang_hicache.storage.fault_tolerance import FaultTolerance
from tests.machines.attachment_replicas import BrokenPromise, NoDigest, promise
from tests.machines.failover_rig import Rig, S, extra_config

# ----------------------------------------------------------------------------------------------- exploration

#: One wait and no memory of failures: so that there are not many different moments.
QUICK = {"backoff_initial_s": 1, "backoff_max_s": 1, "healthy_s": 2, "canary_timeout_s": 1}


def started(level: str, standbys: int = 2, **settings: object) -> Rig:
    """The primary serves."""
    rig = Rig()
    rig.attach(extra_config(level, standbys, **(QUICK | settings)))
    rig.outcome("commit", 1)
    promise(rig.serving == "primary", "the attach of a command was not committed")
    return rig


def moves(rig: Rig, commands: int, trips: int) -> Iterator[tuple[str, Rig]]:
    """Everything that can happen next, each in a world of its own."""

    def after(label: str, *call: object) -> tuple[str, Rig]:
        other = rig.fork()
        method, *arguments = call
        vars(Rig)[str(method)](other, *arguments)
        return label, other

    for place in rig.slot.places():
        epoch = place.epoch
        if place.state is State.ATTACHING:
            yield after("opens", "outcome", "commit", epoch)
            yield after("does not open", "outcome", "open_failed", epoch)
        elif place.state is State.ATTACHED and rig.failover.breaker.trips < trips:
            yield after("is lost", "outcome", "lost", epoch)
            yield after("is sick", "complain")
        elif place.state in (State.DETACHING, State.FAILED):
            yield after("is gone", "outcome", "reaped", epoch)
    if rig.canary:
        yield after("good canary", "canary_ends")
        yield after("bad canary", "canary_ends", "refused: no")
    if rig.next_us() is not None:
        yield after("time", "jump")
    if rig.commands < commands:
        yield after("detach", "detach")
        yield after("attach", "attach", extra_config("auto_reconnect", **QUICK))


def key(rig: Rig) -> tuple:
    """What can make a difference later."""
    failover, now_us = rig.failover, rig.now_us
    stores = failover._stores
    places = tuple((p.state, p.command_id.partition("-")[0]) for p in (rig.slot.current, rig.slot.candidate) if p)
    waits = tuple(
        (
            max(0, store.backoff.due_us - now_us), max(0, store.probe_us - now_us), store.tolerance,
            None if store.good_since_us is None else min(now_us - store.good_since_us, 3 * S),
        )
        for store in stores._all
    )  # fmt: skip
    return (
        rig.serving, rig.opening, rig.canary and rig.canary[1], places, failover.breaker.state, waits, rig.commands,
        rig.is_over, tuple(sorted(rig.proven)), failover._next and failover._next.name, failover.under_way(),
        stores._served_last and stores._served_last.name, failover.breaker.trips, tuple(rig.slot.waiters),
        max(0, (rig.slot.next_deadline_us() or 0) - now_us),
        tuple(max(0, at - now_us) for at in failover.canaries().values()),
    )  # fmt: skip


def recovers(rig: Rig) -> None:
    """From here on everything is well: whatever may serve, serves, the primary in the end."""
    level = rig.failover.status(0).level
    rig = rig.fork()
    for _ in range(200):
        places = [place for place in rig.slot.places() if place.state is not State.ATTACHED]
        if places:
            event = "commit" if places[0].state is State.ATTACHING else "reaped"
            rig.outcome(event, places[0].epoch)
        elif rig.canary:
            rig.canary_ends()
        elif rig.next_us() is not None:
            rig.jump()
        else:
            break
    else:
        promise(False, f"never comes to rest: {rig.failover!r}")
    if rig.is_over:
        promise(rig.serving == "" and rig.failover.breaker.state is Trust.OFF, "a command had detached")
    elif level in ("auto_reconnect", "failover"):
        promise(rig.serving == "primary", f"does not come back: {rig.failover!r}")


def explore(level: str, *, commands: int = 2, trips: int = 2, most: int = 4000) -> int:
    """Every run of a few trips and commands, in which canaries, opens and processes end well or badly."""
    seen, line = set(), deque([started(level, 1)])
    while line and len(seen) < most:
        rig = line.popleft()
        number = key(rig)
        if number in seen:
            continue
        seen.add(number)
        recovers(rig)
        line.extend(after for _, after in moves(rig, commands, trips))
    return len(seen)


def waits_for_the_weights() -> None:
    rig = started("auto_reconnect")
    rig.is_busy = True
    rig.outcome("lost", 1)
    rig.outcome("reaped", 1)
    rig.jump(rig.now_us + 100 * S)
    promise(rig.canary is None and rig.next_us() is None, "the leader is kept awake")
    rig.is_busy = False
    recovers(rig)


def a_late_canary_proves_nothing() -> None:
    """A command attaches another store in the plan that also brings the end of the old one's canary."""
    rig = started("auto_reconnect")
    rig.complain()
    rig.outcome("reaped", 1)
    rig.jump()
    number, _ = rig.canary or (0, "")
    rig.attach(extra_config("auto_reconnect", **QUICK))
    rig.outcome("commit", 2)
    rig.outcome("lost", 2)
    rig.outcome("reaped", 2)
    rig.jump()
    promise(rig.canary and rig.canary[0] != number, "no new canary")
    rig.failover.canary_ended(wire.CanaryOutcome(number))
    promise(rig.failover.breaker.state is Trust.HALF_OPEN and rig.failover.canaries(), "an old canary was believed")


# -------------------------------------------------------------------------------------------------- flapping

INITIAL_S, LONGEST_S = 1, 60


def flapping(period_s: float, seconds: int, level: str = "auto_reconnect") -> Rig:
    """All stores are well and sick in turns, for a period each, under traffic that notices at once."""
    rig = started(level, 1, backoff_initial_s=INITIAL_S, backoff_max_s=LONGEST_S, healthy_s=30, canary_timeout_s=5)
    end_us, period_us = rig.now_us + seconds * S, int(period_s * S)
    for _ in range(20_000):
        if rig.now_us >= end_us:
            return rig
        is_sick = rig.now_us // period_us % 2 == 1
        places = [place for place in rig.slot.places() if place.state is not State.ATTACHED]
        if places:
            opened = "open_failed" if is_sick else "commit"
            rig.outcome(opened if places[0].state is State.ATTACHING else "reaped", places[0].epoch)
        elif rig.canary:
            rig.canary_ends("refused: no" if is_sick else "")
        elif rig.serving and is_sick:
            rig.complain()
        else:
            rig.jump(min(at for at in (rig.next_us(), (rig.now_us // period_us + 1) * period_us) if at is not None))
    raise BrokenPromise(f"it does not come to rest for a moment: {rig.failover!r}")


def flaps_are_few() -> None:
    """At most a few changes until the wait is the longest, each of them twice as late as the one before; then two for
    each longest wait."""
    seconds, doublings = 1200, LONGEST_S.bit_length() + 1
    for period_s in (0.3, 1, 3, 7, 20):
        changes = flapping(period_s, seconds).changes
        promise(len(changes) <= 2 * doublings + 2 * seconds / LONGEST_S, f"{len(changes)} changes at {period_s} s")
        late = [at for at in changes if at > seconds / 2 * S]
        promise(len(late) <= seconds / LONGEST_S + 2, f"still {len(late)} changes at {period_s} s")
        promise(len(changes) >= 3, f"it never came back at {period_s} s")


def flapping_stores_have_waits_of_their_own() -> None:
    """With a standby there are twice as many stores, and not more than twice as many changes."""
    changes = flapping(3, 1200, "failover").changes
    promise(len(changes) <= 2 * (2 * LONGEST_S.bit_length() + 2 + 2 * 1200 / LONGEST_S), f"{len(changes)} changes")


def the_primary_is_watched_before_it_is_taken_back() -> None:
    rig = started("failover", 1, healthy_s=30)
    rig.complain()
    rig.outcome("reaped", 1)
    rig.canary_ends()
    rig.outcome("commit", rig.slot.last_epoch)
    promise(rig.serving == "standby 1", "nobody took over")
    good_us = None
    for _ in range(100):
        if rig.opening:
            break
        if rig.canary:
            good_us = good_us or rig.now_us
            rig.canary_ends()
        else:
            rig.jump()
    promise(rig.opening == "primary" and rig.serving == "standby 1", "nobody may be missing in between")
    promise(rig.now_us - (good_us or 0) >= 30 * S, "the primary was taken back at once")


# --------------------------------------------------------------------------------------------------- evidence


class Watched:
    """A store, and ops of it that end one after another."""

    def __init__(self, **limits: object) -> None:
        self.paces = Paces()
        self.evidence = Evidence(NoDigest())
        self.evidence.watch(1, FaultTolerance(level="auto_detach", **limits), self.paces)
        self.now_us = 10 * S

    def ends(
        self, kind: OpKind = OpKind.READ, reason: str = "", *, pages: int = 4, took_s: float = 0.02,
        forward_s: float = 0.0, reads: int = 0, recompute_s: float = 0.0, count: int = 1,
    ) -> str:
        """Ops that begin now and end in one plan; what is wrong with the store."""
        began_us = self.now_us
        self.now_us += int(took_s * S)
        for _ in range(count):
            done = 0 if reason else pages
            self.evidence.op_ended(Op(1, kind, 1, pages, started_us=began_us, done=done, reason=reason))
        complaint = self.evidence.judge(self.now_us, int(forward_s * S), reads, int(recompute_s * S))
        self.now_us += S // 10
        return complaint

    def learn(self, kind: OpKind = OpKind.READ, **op: object) -> None:
        for _ in range(20):
            promise(not self.ends(kind, **op), "a store that is well is blamed")


def rows_of_failures_trip() -> None:
    for kind in (OpKind.LOOKUP, OpKind.READ, OpKind.WRITE):
        for reason in ("io", "refused", "contract", "corrupt", "defect", "other"):
            store = Watched()
            said = [store.ends(kind, reason) for _ in range(5)]
            promise(said[:4] == [""] * 4 and said[4].startswith("tripped_errors: 5 "), said)
    store = Watched()
    for _ in range(4):  # good look-ups say nothing of reads
        promise(not store.ends(reason="io") and not store.ends(OpKind.LOOKUP), "too early")
    promise(store.ends(reason="io"), "the reads of a store fail, and its look-ups hide it")


def a_success_ends_a_row() -> None:
    store = Watched(min_ops=1000)
    for number in range(40):
        promise(not store.ends(reason="" if number % 5 == 4 else "io"), "there was no row")


def what_is_no_failure_counts_as_none() -> None:
    for reason in ("no_space", "miss", "other_key", "revoked", "queue_full", "gone"):
        store = Watched(consecutive_errors=1, min_ops=1)
        promise(not any(store.ends(kind, reason) for kind in OpKind if kind > 3 for _ in range(30)), reason)


def shares_of_failures_trip() -> None:
    store = Watched(min_ops=20, error_ratio=0.5)
    said = [store.ends(reason="io" if number % 2 else "") for number in range(20)]
    promise(not any(said[:19]) and "10 of 20 operations failed" in said[19], said)


def the_window_forgets() -> None:
    store = Watched(min_ops=20, window_s=30)
    for number in range(18):
        store.ends(reason="io" if number % 2 else "")
    store.now_us += 31 * S
    promise(not any(store.ends(reason="io" if number % 4 == 0 else "") for number in range(20)), "old failures count")


def slowness_trips() -> None:
    store = Watched()
    store.learn()
    said = [store.ends(took_s=4) for _ in range(5)]
    promise(not any(said[:4]) and said[4].startswith("tripped_slow: 5 reads in a row were slow"), said)
    store = Watched(min_ops=20)
    store.learn()
    said = [store.ends(took_s=0.02 if number % 3 == 0 else 0.9) for number in range(60)]  # never five in a row
    promise(any(text.startswith("tripped_slow: ") for text in said), "two of three ops are slow, and nobody minds")


def slow_is_not_what_is_quick_enough() -> None:
    store = Watched(slow_min_s=0.05)
    store.learn(took_s=0.0004)
    promise(not any(store.ends(took_s=0.04) for _ in range(40)), "10 ms for a page were slow")


def slow_is_not_what_waits_for_a_forward() -> None:
    store = Watched()
    store.learn()
    promise(not any(store.ends(took_s=2, forward_s=1.99) for _ in range(40)), "a long prefill made a store look slow")
    store.ends(forward_s=1.99)
    promise(not any(store.ends(took_s=2, forward_s=1.99 * (n % 2)) for n in range(40)), "nor the one before")


def slow_is_not_a_look_up_behind_a_read() -> None:
    store = Watched()
    store.learn(OpKind.LOOKUP, took_s=0.001)
    promise(not any(store.ends(OpKind.LOOKUP, took_s=2, reads=1) for _ in range(40)), "it had to wait")


def one_moment_is_one_measurement() -> None:
    store = Watched()
    store.learn()
    promise(not store.ends(took_s=30, count=20), "a single hiccup, behind which twenty ops stood")


def slower_than_computing_is_slow_if_it_was_quicker() -> None:
    limits = {"slow_min_s": 0.001}
    store = Watched(**limits)
    store.learn()
    said = [store.ends(took_s=0.08, recompute_s=0.015) for _ in range(5)]  # a quarter of that before
    promise(said[4].startswith("tripped_slow: "), said)
    store = Watched(**limits)
    store.learn()
    promise(not any(store.ends(took_s=0.08, recompute_s=0.006) for _ in range(40)), "it never was quicker")


def a_slow_canary_does_not_close() -> None:
    rig = started("auto_reconnect", backoff_max_s=4)
    watched = Watched()
    watched.learn()
    watched.learn(OpKind.WRITE)
    rig.failover._stores.primary.paces = watched.paces
    rig.complain()
    rig.outcome("reaped", 1)
    tries = 0
    while not rig.opening and tries < 20:
        rig.jump()
        if rig.canary:
            rig.canary_ends(page_s=3.0)
            tries += 1
    promise(tries > 3, f"it closed after {tries} canaries that were good but slow")
    promise(tries < 20, "a store that is slower for good never comes back")
