"""Every run of the attachment machine keeps the promises; every classic mistake breaks one.

A mutant is one mistake in the machine, in the leader or on a rank.  If the exploration did not catch it, the
promises above would be too weak to rely on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from sglang_hicache.storage import attachment_table as machine
from sglang_hicache.storage.attachment import StorageSlot
from sglang_hicache.storage.attachment_events import (
    Answer,
    Attach,
    Cancel,
    Detach,
    Event,
    FreeOps,
    Instruction,
    Kill,
    Kind,
    QuarantineOps,
    ReleaseQuarantine,
    State,
    Verdict,
)
from sglang_hicache.storage.attachment_table import TABLE, Handler, Never, StorageAttachment
from tests.machines.attachment_replicas import BrokenPromise, Plan
from tests.machines.attachment_rules import Rank, Rules
from tests.machines.attachment_world import Scenario, explore

SOLO = Scenario(("attach a", "switch late", "detach", "attach b"), ranks=1, faults=2)
RUDE = Scenario(("attach a", "attach b", "clear", "detach", "clear", "switch b", "detach"), ranks=1, pages=2, ops=2)
SWITCH = Scenario(("attach a", "switch b"), lag=2)
BOTH_FAIL = Scenario(("attach a", "switch b"), ops=0, faults=2)
AGAIN = Scenario(("attach a", "detach", "attach b"), lag=2, faults=2)
LATE = Scenario(("attach late", "detach"), ops=2, faults=2)
REUSE = Scenario(("attach a", "detach", "attach b"), ops=2)
EVERYTHING = Scenario(("attach a", "switch b", "detach"))
HASTE = Scenario(("attach a", "detach", "detach"), faults=2, lag=2)
CANCEL = Scenario(("attach a", "cancel 0", "attach b"), lag=2)
CANCEL_SWITCH = Scenario(("attach a", "switch b", "cancel 1"))
PATIENT = Scenario(("attach a", "switch b patiently", "detach patiently", "detach"), ranks=1, ops=2, pages=2, faults=2)
CALMED = Scenario(("attach a", "detach", "detach patiently"))
SHORT = {
    "solo": SOLO,
    "rude": RUDE,
    "switch": SWITCH,
    "both fail": BOTH_FAIL,
    "again": AGAIN,
    "late": LATE,
    "reuse": REUSE,
    "everything": EVERYTHING,
    "haste": HASTE,
    "cancel": CANCEL,
    "cancelled switch": CANCEL_SWITCH,
    "patient": PATIENT,
    "calmed": CALMED,
}
LONG = {
    "three ranks": Scenario(("attach a", "detach"), ranks=3, faults=2, lag=2),
    "three ranks switch": Scenario(("attach a", "switch late"), ranks=3, faults=1, lag=1),
    "switch under faults": Scenario(("attach late", "switch b", "detach"), faults=2, lag=1, ops=1),
    "two pages": Scenario(("attach late", "detach", "attach b", "detach"), pages=2, ops=3, faults=1, lag=1),
    "far behind": Scenario(("attach a", "detach", "attach b"), lag=4, faults=2),
    "one rank, many faults": Scenario(
        ("attach a", "switch late", "switch c", "detach", "attach d"), ranks=1, ops=2, faults=3
    ),
    "patience under faults": Scenario(("attach a", "switch b patiently", "detach"), lag=2),
    "cancel anywhere": Scenario(("attach a", "cancel 0", "switch b", "cancel 2", "detach"), faults=2),
    "clear anywhere": Scenario(("attach a", "clear", "switch b", "clear", "detach"), faults=1),
}


@pytest.mark.parametrize("scenario", SHORT.values(), ids=SHORT.keys())
def test_every_run_keeps_the_promises(scenario: Scenario) -> None:
    explorer = explore(scenario)
    assert explorer.rest.keys() <= {State.ATTACHED, State.DETACHED}
    assert State.DETACHED in explorer.rest
    assert explorer.worlds > 500


@pytest.mark.long
@pytest.mark.parametrize("scenario", LONG.values(), ids=LONG.keys())
def test_every_run_keeps_the_promises_long(scenario: Scenario) -> None:
    explorer = explore(scenario)
    assert explorer.rest.keys() <= {State.ATTACHED, State.DETACHED}


def test_scenarios_take_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = set()

    def watched(cell: tuple[State, Kind], handler: Handler) -> Handler:
        def handle(*arguments: object) -> Iterator[Instruction]:
            taken.add(cell)
            return handler(*arguments)

        return handle

    rows = {cell: handler for cell, handler in TABLE.items() if not isinstance(handler, Never)}
    for cell, handler in rows.items():
        monkeypatch.setitem(TABLE, cell, watched(cell, handler))
    for scenario in (SOLO, RUDE, SWITCH, HASTE, CANCEL):
        explore(scenario)
    assert {(state.value, kind.value) for state, kind in rows.keys() - taken} == set()


# ---------------------------------------------------------------------------- mistakes in the machine

Patch = Callable[[pytest.MonkeyPatch], None]


def _replace(name: str, wrong: Handler) -> Patch:
    """Put a handler in the place of another, in the table and where other handlers call it."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = vars(machine)[name]
        monkeypatch.setattr(machine, name, wrong)
        for cell in [cell for cell, handler in TABLE.items() if handler is right]:
            monkeypatch.setitem(TABLE, cell, wrong)

    return patch


def _cell(state: State, kind: Kind, wrong: Handler) -> Patch:
    return lambda monkeypatch: monkeypatch.setitem(TABLE, (state, kind), wrong)


def _commit_sets_no_time(slot: StorageSlot, a: StorageAttachment, event: Event) -> Iterator[Instruction]:
    a.drain_us = None
    yield from COMMIT(slot, a, event)


def _detach_gives_more_time(slot: StorageSlot, a: StorageAttachment, event: Detach) -> Iterator[Instruction]:
    yield from machine._wait(slot, a, event)
    a.due_us = event.due_us


def _kill_keeps_the_deadline(slot: StorageSlot, a: StorageAttachment, event: Event) -> Iterator[Instruction]:
    due_us = a.due_us
    yield from KILL(slot, a, event)
    a.due_us = due_us


def _cancel_forgets_the_process(slot: StorageSlot, a: StorageAttachment, _: Cancel) -> Iterator[Instruction]:
    a.error = "cancelled"
    yield from END(slot, a)


def _cancel_answers_too(slot: StorageSlot, a: StorageAttachment, event: Cancel) -> Iterator[Instruction]:
    yield from CANCEL_OPENING(slot, a, event)
    yield Answer(a.command_id, Verdict.FAILED, "cancelled")


def _cancel_is_never_answered(slot: StorageSlot, a: StorageAttachment, event: Cancel) -> Iterator[Instruction]:
    yield from CANCEL_OPENING(slot, a, event)
    a.command_id = ""


def _cancel_takes_the_old_one_down(slot: StorageSlot, a: StorageAttachment, event: Cancel) -> Iterator[Instruction]:
    yield from CANCEL_OPENING(slot, a, event)
    if slot.current is not None and slot.current.state is State.ATTACHED:
        yield from machine._drain(slot.current, 0)


def _cancel_kills_again(slot: StorageSlot, a: StorageAttachment, event: Cancel) -> Iterator[Instruction]:
    a.command_id = ""
    yield from CANCEL_OPENING(slot, a, event)


def _nothing(*_: object) -> Iterator[Instruction]:
    yield from ()


def _ok_before_the_commit(slot: StorageSlot, a: StorageAttachment, event: Attach) -> Iterator[Instruction]:
    yield from OPEN(slot, a, event)
    yield Answer(event.command_id, Verdict.OK)


def _switch_drains_before_the_commit(slot: StorageSlot, a: StorageAttachment, event: Event) -> Iterator[Instruction]:
    old = slot.current
    yield from OPEN(slot, a, event)
    if old is not None:
        yield from machine._drain(old, 0)


def _commit_forgets_the_old_one(slot: StorageSlot, a: StorageAttachment, event: Event) -> Iterator[Instruction]:
    yield from COMMIT(slot, a, event)
    slot.retiring = None


def _commit_keeps_the_old_one_running(slot: StorageSlot, a: StorageAttachment, _: Event) -> Iterator[Instruction]:
    command_id, a.state, a.command_id, a.due_us = a.command_id, State.ATTACHED, "", None
    slot.retiring, slot.current, slot.candidate = slot.current, a, None
    yield Answer(command_id, Verdict.OK)


def _kill_frees_the_pages(slot: StorageSlot, a: StorageAttachment, event: Event) -> Iterator[Instruction]:
    yield from KILL(slot, a, event)
    a.in_flight = 0
    yield FreeOps(a.epoch)


def _kill_answers_too(slot: StorageSlot, a: StorageAttachment, event: Event) -> Iterator[Instruction]:
    yield from KILL(slot, a, event)
    if a.command_id:
        yield Answer(a.command_id, Verdict.FAILED, a.error)


def _failed_switch_takes_the_old_one_down(
    slot: StorageSlot, a: StorageAttachment, event: Event
) -> Iterator[Instruction]:
    yield from KILL(slot, a, event)
    if a is slot.candidate and slot.current is not None and slot.current.state is State.ATTACHED:
        yield from machine._drain(slot.current, 0)


def _loss_forgets_the_candidate(slot: StorageSlot, a: StorageAttachment, event: Event) -> Iterator[Instruction]:
    yield from KILL(slot, a, event)
    if a is slot.current:
        slot.candidate = None


def _no_kill(slot: StorageSlot, a: StorageAttachment, event: Event) -> Iterator[Instruction]:
    yield from (step for step in KILL(slot, a, event) if not isinstance(step, Kill))


def _detached_at_once_when_lost(slot: StorageSlot, a: StorageAttachment, event: Event) -> Iterator[Instruction]:
    yield from KILL(slot, a, event)
    yield from FINISH(slot, a, event)


def _drain_stops_at_once(a: StorageAttachment, due_us: int | None) -> Iterator[Instruction]:
    a.due_us = due_us
    yield from machine._stop(a)


def _close_never_stops(_: StorageSlot, a: StorageAttachment, __: Event) -> Iterator[Instruction]:
    a.in_flight -= 1
    yield from ()


def _reap_frees_late_io(slot: StorageSlot, a: StorageAttachment, _: Event) -> Iterator[Instruction]:
    yield FreeOps(a.epoch)
    yield from machine._end(slot, a)


def _reap_keeps_the_pages(slot: StorageSlot, a: StorageAttachment, _: Event) -> Iterator[Instruction]:
    yield from machine._end(slot, a)


def _write_off_frees(slot: StorageSlot, a: StorageAttachment, _: Event) -> Iterator[Instruction]:
    yield FreeOps(a.epoch)
    yield from machine._end(slot, a)


def _write_off_lets_pages_and_name_go(slot: StorageSlot, a: StorageAttachment, event: Event) -> Iterator[Instruction]:
    yield from (WRITE_OFF if a.in_flight else _write_off_frees)(slot, a, event)


def _number_used_again(slot: StorageSlot, a: StorageAttachment) -> Iterator[Instruction]:
    yield from END(slot, a)
    if slot.quarantined:
        slot.last_epoch -= 1


def _failure_not_answered(slot: StorageSlot, a: StorageAttachment) -> Iterator[Instruction]:
    slot.leave(a)
    yield from ()


def _release_keeps_the_pages(slot: StorageSlot, a: None, event: Event) -> Iterator[Instruction]:
    yield from (step for step in RELEASE(slot, a, event) if not isinstance(step, ReleaseQuarantine))


def _gate_while(state: State) -> Patch:
    def gate(slot: StorageSlot) -> int | None:
        return next((a.epoch for a in slot.places() if a.state in (State.ATTACHED, state)), None)

    return lambda monkeypatch: monkeypatch.setattr(StorageSlot, "gate", gate)


def _detach_answered_at_the_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(slot: StorageSlot) -> Iterator[Instruction]:
        if all(a.state is State.FAILED for a in slot.places()):
            yield from (Answer(command_id, Verdict.OK) for command_id in slot.waiters)
            slot.waiters = []

    monkeypatch.setattr(StorageSlot, "_answer_waiters", answer)


def _quarantine_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_aside(slot: StorageSlot, a: StorageAttachment) -> Iterator[Instruction]:
        yield QuarantineOps(a.epoch)

    monkeypatch.setattr(machine, "_set_aside", set_aside)


OPEN, COMMIT, KILL, FINISH, END = machine._open, machine._commit, machine._kill, machine._finish, machine._end
WRITE_OFF, RELEASE, CANCEL_OPENING = machine._write_off, machine._release, machine._cancel_opening

MACHINE_MISTAKES: dict[str, tuple[Scenario, Patch]] = {
    "attach says ok before the commit": (AGAIN, _replace("_open", _ok_before_the_commit)),
    "switch drains before the commit": (SWITCH, _replace("_open", _switch_drains_before_the_commit)),
    "commit forgets the old one": (SWITCH, _replace("_commit", _commit_forgets_the_old_one)),
    "commit lets the old one run": (SWITCH, _replace("_commit", _commit_keeps_the_old_one_running)),
    "kill frees the pages": (REUSE, _replace("_kill", _kill_frees_the_pages)),
    "kill answers, and so does the end": (AGAIN, _replace("_kill", _kill_answers_too)),
    "failed switch takes the old one down": (SWITCH, _replace("_kill", _failed_switch_takes_the_old_one_down)),
    "loss forgets the candidate": (SWITCH, _replace("_kill", _loss_forgets_the_candidate)),
    "lost without a kill": (AGAIN, _replace("_kill", _no_kill)),
    "lost is detached at once": (REUSE, _cell(State.ATTACHED, Kind.LOST, _detached_at_once_when_lost)),
    "loss ignored while draining": (REUSE, _cell(State.DRAINING, Kind.LOST, _nothing)),
    "drain stops at once": (REUSE, _replace("_drain", _drain_stops_at_once)),
    "last close does not stop": (REUSE, _replace("_close_op", _close_never_stops)),
    "close not counted after the kill": (REUSE, _cell(State.FAILED, Kind.OP_CLOSED, _nothing)),
    "reap frees the pages of late_io": (LATE, _replace("_finish", _reap_frees_late_io)),
    "reap forgets the pages": (REUSE, _replace("_finish", _reap_keeps_the_pages)),
    "write-off frees the pages": (REUSE, _replace("_write_off", _write_off_frees)),
    "write-off forgets a process without pages": (AGAIN, _replace("_write_off", _write_off_lets_pages_and_name_go)),
    "quarantine never returns": (REUSE, _replace("_release", _release_keeps_the_pages)),
    "quarantine is not noted": (REUSE, _quarantine_not_told),
    "epoch number used again": (REUSE, _replace("_end", _number_used_again)),
    "failed attach never answered": (AGAIN, _replace("_end", _failure_not_answered)),
    "candidate takes operations": (AGAIN, _gate_while(State.ATTACHING)),
    "draining takes operations": (REUSE, _gate_while(State.DRAINING)),
    "detach answered at the kill": (AGAIN, _detach_answered_at_the_kill),
    "detach leaves the candidate alone": (AGAIN, _cell(State.ATTACHING, Kind.DETACH, machine._wait)),
    "detach leaves what is attached alone": (AGAIN, _cell(State.ATTACHED, Kind.DETACH, machine._wait)),
    "second detach forgotten": (HASTE, _cell(State.DRAINING, Kind.DETACH, _nothing)),
    "detach of nothing never answered": (RUDE, _cell(State.DETACHED, Kind.DETACH, _nothing)),
    "attach while one is opening": (RUDE, _cell(State.ATTACHING, Kind.ATTACH, machine._open)),
    "attach while one is killed": (AGAIN, _cell(State.FAILED, Kind.ATTACH, machine._open)),
    "attach without a conflict answer": (RUDE, _cell(State.ATTACHED, Kind.ATTACH, _nothing)),
    "a switch lets the old one drain for ever": (SWITCH, _replace("_commit", _commit_sets_no_time)),
    "a detach by force leaves a drain its time": (PATIENT, _cell(State.DRAINING, Kind.DETACH, machine._wait)),
    "a detach by force leaves a close its time": (PATIENT, _cell(State.DETACHING, Kind.DETACH, machine._wait)),
    "a patient detach takes a time back": (CALMED, _replace("_hurry", _detach_gives_more_time)),
    "a kill keeps the deadline": (AGAIN, _replace("_kill", _kill_keeps_the_deadline)),
    "cancel does nothing": (CANCEL, _cell(State.ATTACHING, Kind.CANCEL, _nothing)),
    "cancel forgets the process": (CANCEL, _replace("_cancel_opening", _cancel_forgets_the_process)),
    "cancel answers, and so does the end": (CANCEL, _replace("_cancel_opening", _cancel_answers_too)),
    "what is cancelled is never answered": (CANCEL, _replace("_cancel_opening", _cancel_is_never_answered)),
    "cancel takes the old one down": (CANCEL_SWITCH, _replace("_cancel_opening", _cancel_takes_the_old_one_down)),
    "cancel of a failing one takes its answer": (CANCEL, _cell(State.FAILED, Kind.CANCEL, _cancel_kills_again)),
}


@pytest.mark.parametrize("mistake", MACHINE_MISTAKES)
def test_a_mistake_in_the_machine_is_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario, patch = MACHINE_MISTAKES[mistake]
    patch(monkeypatch)
    with pytest.raises(BrokenPromise):
        explore(scenario)


# ---------------------------------------------------------------- mistakes of the leader and of ranks


class OneVoteCommits(Rules):
    def votes_suffice(self, said: int, ranks: int) -> bool:
        return said > 0


class OneReapIsEnough(Rules):
    def reaps_suffice(self, said: int, ranks: int) -> bool:
        return said > 0


class OneRankCloses(Rules):
    def closes_suffice(self, said: int, ranks: int) -> bool:
        return said > 0


class OneRankEndsTheQuarantine(Rules):
    def quarantine_may_end(self, reaped: int, quiet: int, ranks: int) -> bool:
        return reaped > 0


class ReapEndsTheQuarantine(Rules):
    def quarantine_may_end(self, reaped: int, quiet: int, ranks: int) -> bool:
        return reaped == ranks


class QuarantineNeverEnds(Rules):
    def quarantine_may_end(self, reaped: int, quiet: int, ranks: int) -> bool:
        return False


class WriteOffWaitsForAnOperator(Rules):
    def writes_off(self) -> bool:
        return False


class FollowerActsOnItsOwnLoss(Rules):
    def own_decisions(self, rank: Rank, slot: StorageSlot) -> Iterator[Plan]:
        epoch = slot.gate()
        if epoch is not None and rank.process(epoch) is None:
            yield "lost", epoch


class FollowerHasItsOwnClock(Rules):
    def own_decisions(self, rank: Rank, slot: StorageSlot) -> Iterator[Plan]:
        yield from (("deadline", a.epoch) for a in slot.places() if a.state is State.DRAINING)


RULE_MISTAKES = {
    OneVoteCommits: AGAIN,
    OneReapIsEnough: AGAIN,
    OneRankCloses: REUSE,
    OneRankEndsTheQuarantine: REUSE,
    ReapEndsTheQuarantine: LATE,
    QuarantineNeverEnds: REUSE,
    WriteOffWaitsForAnOperator: AGAIN,
    FollowerActsOnItsOwnLoss: AGAIN,
    FollowerHasItsOwnClock: REUSE,
}


@pytest.mark.parametrize("mistake", RULE_MISTAKES)
def test_a_mistake_of_leader_or_rank_is_caught(mistake: type[Rules]) -> None:
    with pytest.raises(BrokenPromise):
        explore(RULE_MISTAKES[mistake], mistake())


def test_a_broken_promise_tells_how_it_came_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _replace("_write_off", _write_off_frees)(monkeypatch)
    with pytest.raises(BrokenPromise, match=r"(?s)after:.*plans \('attach'.*cannot be killed"):
        explore(REUSE)
