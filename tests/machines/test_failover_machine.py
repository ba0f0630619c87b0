"""Breaker, evidence and failover keep their promises in every run; every classic mistake breaks one.

A mutant is one mistake.  If no check noticed it, the checks would be too weak to rely on.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from sglang_hicache import wire
from sglang_hicache.cache import evidence
from sglang_hicache.cache.breaker import TABLE, Backoff, Breaker, Never, Trust, Turn
from sglang_hicache.cache.evidence import Evidence, Paces
from sglang_hicache.cache.op import Op
from sglang_hicache.errors import IntegrityError
from sglang_hicache.scheduler.failover import Failover
from sglang_hicache.scheduler.stores import Store, Stores
from sglang_hicache.scheduler.tick import Ledger
from sglang_hicache.storage.fault_tolerance import FaultTolerance
from tests.machines import failover_checks as checks
from tests.machines.failover_rig import S
from tests.ranks import test_failover as simulated

Check = Callable[[], object]


def explored(level: str) -> Check:
    return lambda: checks.explore(level, commands=2, trips=2, most=700)


CHECKS: tuple[Check, ...] = (
    checks.waits_for_the_weights,
    checks.a_late_canary_proves_nothing,
    checks.flaps_are_few,
    checks.flapping_stores_have_waits_of_their_own,
    checks.the_primary_is_watched_before_it_is_taken_back,
    checks.rows_of_failures_trip,
    checks.a_success_ends_a_row,
    checks.what_is_no_failure_counts_as_none,
    checks.shares_of_failures_trip,
    checks.the_window_forgets,
    checks.slowness_trips,
    checks.slow_is_not_what_is_quick_enough,
    checks.slow_is_not_what_waits_for_a_forward,
    checks.slow_is_not_a_look_up_behind_a_read,
    checks.one_moment_is_one_measurement,
    checks.slower_than_computing_is_slow_if_it_was_quicker,
    checks.a_slow_canary_does_not_close,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_promise_is_kept(check: Check) -> None:
    check()


@pytest.mark.parametrize(
    ("level", "commands", "trips"),
    [("off", 2, 1), ("auto_detach", 2, 2), ("auto_reconnect", 2, 2), ("failover", 2, 1)],
)
def test_every_run_keeps_the_promises(level: str, commands: int, trips: int) -> None:
    most = 1000
    assert 30 < checks.explore(level, commands=commands, trips=trips, most=most) < most, "it was not played to the end"


@pytest.mark.long
@pytest.mark.parametrize("level", ["auto_detach", "auto_reconnect", "failover"])
def test_every_run_keeps_the_promises_long(level: str) -> None:
    checks.explore(level, commands=3, trips=3, most=30_000)


# ------------------------------------------------------------------------------------------------- the table


def test_every_state_meets_everything() -> None:
    assert TABLE.keys() == {(state, turn) for state in Trust for turn in Turn}
    assert all(cell for cell in TABLE.values() if isinstance(cell, Never)), "a cell that cannot come says why"
    for state in Trust:
        told = wire.BreakerStatus(state=state.value)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=wire.BreakerStatus) == told


@pytest.mark.parametrize(("state", "turn"), [cell for cell, after in TABLE.items() if isinstance(after, Never)])
def test_what_cannot_come_is_a_defect(state: Trust, turn: Turn) -> None:
    breaker = Breaker()
    breaker.state = state
    with pytest.raises(IntegrityError, match=f"breaker: {turn} met {state}: "):
        breaker.take(turn, 0)


def test_time_in_each_state_is_kept() -> None:
    breaker = Breaker()
    breaker.begin(100 * S)
    for turn, at_s in (
        (Turn.WATCH, 101), (Turn.TRIP, 111), (Turn.TRY, 113), (Turn.REFUSE, 114), (Turn.TRY, 118), (Turn.COMMIT, 119)
    ):  # fmt: skip
        breaker.take(turn, at_s * S, "crashed: why")
    assert {state: us // S for state, us in breaker.total_us(130 * S).items()} == {
        Trust.OFF: 1, Trust.CLOSED: 21, Trust.OPEN: 6, Trust.HALF_OPEN: 2
    }  # fmt: skip
    assert breaker.in_state_us(130 * S) == 11 * S and breaker.out_us(130 * S) == 0
    assert (breaker.trips, breaker.reason) == (1, "crashed: why")


def test_waits_double_up_to_the_longest() -> None:
    backoff = Backoff(FaultTolerance(backoff_initial_s=1, backoff_max_s=10))
    waits = []
    for _ in range(60):
        backoff.failed(5 * S)
        waits.append((backoff.due_us - 5 * S) // S)
    assert waits[:6] == [1, 2, 4, 8, 10, 10] and waits[-1] == 10 and backoff.is_longest
    backoff.forget()
    assert backoff.wait_us == S


# -------------------------------------------------------------------------------------------------- mistakes

Patch = Callable[[pytest.MonkeyPatch], None]


def method(owner: type, name: str, wrong: Callable) -> Patch:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, wrong)


def cell(state: Trust, turn: Turn, wrong: Trust) -> Patch:
    return lambda monkeypatch: monkeypatch.setitem(TABLE, (state, turn), wrong)


def _attach_without_a_canary(failover: Failover, store: Store) -> None:
    failover._next = store
    failover._attach(store)


def _failed_without_growing(backoff: Backoff, now_us: int) -> None:
    backoff.due_us = now_us + backoff.wait_us


SERVES, COUNT = Stores.serves, evidence._count
CANARY_ENDED = Failover.canary_ended


def _trusted_at_once(stores: Stores, store: Store, now_us: int) -> None:
    SERVES(stores, store, now_us)
    store.backoff.forget()


def _detach_forgets_nothing(failover: Failover) -> None:
    failover.breaker.take(Turn.STOP, failover._now_us)
    failover._stores.serving = None


def _take_out_only_says_so(failover: Failover, complaint: str) -> None:
    failover._trip(complaint)


def _nothing(*_: object) -> None:
    pass


def _any_canary_counts(failover: Failover, outcome: wire.CanaryOutcome) -> None:
    tried = failover._try
    if tried is not None:
        failover._try, failover._next = None, tried.store


def _bad_canary_counts(failover: Failover, outcome: wire.CanaryOutcome) -> None:
    CANARY_ENDED(failover, wire.CanaryOutcome(outcome.number))


def _harmful(reason: str) -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(evidence, "HARMLESS", evidence.HARMLESS - {reason})
        monkeypatch.setattr(evidence, "UNASKED", ())

    return patch


def _rows_in_common(watch: evidence._Watch, part: evidence._Part, op: Op) -> None:
    COUNT(watch, part, op)
    if not op.reason:
        for row in watch.rows.values():
            row.failures = 0


def _never_forgets(watch: evidence._Watch, now_us: int) -> evidence._Part:
    if not watch.window:
        watch.window.append(evidence._Part(1 << 60))
    return watch.window[0]


def _mean_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow ones move the mean as well."""
    limit_us = evidence._limit_us

    def learns(limits: FaultTolerance, kind: object, known_us: int, recompute_page_us: int) -> int:
        for means in _means:
            for mean in means.values():
                mean.value_us += known_us
        return limit_us(limits, kind, known_us, recompute_page_us)

    _means: list[dict] = []
    page_us = Paces.page_us

    def seen(paces: Paces, kind: object, pages: int) -> int | None:
        _means.append(paces._means)
        return page_us(paces, kind, pages)

    monkeypatch.setattr(Paces, "page_us", seen)
    monkeypatch.setattr(evidence, "_limit_us", learns)


def _first_vote_counts(ledger: Ledger, core: object, now_us: int) -> list[wire.CanaryOutcome]:
    under_way = core.failover.canaries()
    said = {number: list(facts.values())[0] for number, facts in ledger._canaries.items() if number in under_way}
    return [wire.CanaryOutcome(number, fact.reason, fact.page_s) for number, fact in said.items()]


def _judged_without_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Evidence.judge
    monkeypatch.setattr(Evidence, "judge", lambda self, now, _forward, *rest: judge(self, now, 0, *rest))


def _one_canary_is_a_while(store: Store, now_us: int) -> bool:
    return True


one_rank_is_bad = simulated.test_one_rank_whose_canary_is_bad_keeps_the_store_out

MISTAKES: dict[str, tuple[Patch, Check]] = {
    "never closes": (cell(Trust.HALF_OPEN, Turn.COMMIT, Trust.OPEN), explored("auto_reconnect")),
    "a bad canary keeps it half open": (
        cell(Trust.HALF_OPEN, Turn.REFUSE, Trust.HALF_OPEN), explored("auto_reconnect")
    ),
    "closes without a canary": (method(Failover, "_start", _attach_without_a_canary), explored("auto_reconnect")),
    "closes after a bad canary": (method(Failover, "canary_ended", _bad_canary_counts), explored("auto_reconnect")),
    "believes an old canary": (
        method(Failover, "canary_ended", _any_canary_counts), checks.a_late_canary_proves_nothing
    ),
    "one rank's canary is enough": (method(Ledger, "canary_outcomes", _first_vote_counts), one_rank_is_bad),
    "a slow canary closes": (
        method(Store, "was_slow", lambda _store, _page_s: False), checks.a_slow_canary_does_not_close
    ),
    "a slow canary never closes": (method(Backoff, "is_longest", False), checks.a_slow_canary_does_not_close),
    "the wait never grows": (method(Backoff, "failed", _failed_without_growing), checks.flaps_are_few),
    "the wait is forgotten at once": (method(Stores, "serves", _trusted_at_once), checks.flaps_are_few),
    "a detach by a command is undone": (
        method(Failover, "detach_begins", _detach_forgets_nothing), explored("failover")
    ),
    "a trip takes nothing out": (method(Failover, "_take_out", _take_out_only_says_so), explored("auto_detach")),
    "only a loss trips": (method(Failover, "_take_out", _nothing), checks.flaps_are_few),
    "a standby stays for ever": (method(Stores, "watches_primary", lambda _stores: False), explored("failover")),
    "the primary is taken back at once": (
        method(Store, "was_good", _one_canary_is_a_while), checks.the_primary_is_watched_before_it_is_taken_back
    ),
    "the weights are not waited for": (
        lambda monkeypatch: monkeypatch.setattr(Failover, "_is_free", lambda self: self._try is None),
        checks.waits_for_the_weights,
    ),
    "misses count": (_harmful("miss"), checks.what_is_no_failure_counts_as_none),
    "a full store counts": (_harmful("no_space"), checks.what_is_no_failure_counts_as_none),
    "ops that were called off count": (_harmful("revoked"), checks.what_is_no_failure_counts_as_none),
    "look-ups hide failing reads": (
        lambda monkeypatch: monkeypatch.setattr(evidence, "_count", _rows_in_common), checks.rows_of_failures_trip
    ),
    "the window never forgets": (
        lambda monkeypatch: monkeypatch.setattr(evidence, "_part_of", _never_forgets), checks.the_window_forgets
    ),
    "slowness is ignored": (method(Evidence, "_measure", _nothing), checks.slowness_trips),
    "slow ones move the mean": (_mean_of_all, checks.slowness_trips),
    "forwards are charged to the store": (_judged_without_forwards, checks.slow_is_not_what_waits_for_a_forward),
    "computing is never compared": (
        lambda monkeypatch: monkeypatch.setattr(
            evidence, "_limit_us", lambda limits, _kind, known_us, _recompute: int(known_us * limits.slow_factor)
        ),
        checks.slower_than_computing_is_slow_if_it_was_quicker,
    ),
    "nothing is too quick to be slow": (
        lambda monkeypatch: monkeypatch.setattr(
            evidence, "_limit_us", lambda limits, _kind, known_us, _recompute: int(known_us * limits.slow_factor)
        ),
        checks.slow_is_not_what_is_quick_enough,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, check = MISTAKES[mistake]
    patch(monkeypatch)
    with pytest.raises((AssertionError, IntegrityError)):
        check()
