"""What each step of the attachment machine asks for, answers and leaves behind."""

from __future__ import annotations

import pytest

from sglang_hicache.errors import IntegrityError
from sglang_hicache.storage.attachment_events import (
    Admitted,
    Answer,
    Attach,
    Cancel,
    Cleared,
    Detach,
    FreeOps,
    Kill,
    OpClosed,
    QuarantineOps,
    ReleaseQuarantine,
    RevokeOps,
    Spawn,
    State,
    Stop,
    Switch,
    Verdict,
)
from sglang_hicache.wire import StorageEvent, StorageOutcome
from tests.machines.attachment_rig import SECRET, Rig, in_state


@pytest.fixture
def rig() -> Rig:
    return Rig()


# --------------------------------------------------------------------------------- what is asked for


def test_attach_commit_detach(rig: Rig) -> None:
    assert rig.slot.handle(Attach("a", "file", SECRET)) == [Spawn(1, "file", SECRET)]
    assert rig.slot.gate() is None
    assert rig.outcome("commit", detail="path=/tmp/x") == [Answer("a", Verdict.OK, "path=/tmp/x")]
    assert (rig.slot.gate(), rig.slot.epoch, rig.slot.backend, rig.slot.extra_config_json) == (1, 1, "file", SECRET)
    assert rig.slot.handle(Detach("d")) == [Stop(1)]
    assert rig.slot.gate() is None
    assert rig.outcome("reaped") == [Answer("d", Verdict.OK)]
    assert (rig.slot.face(), rig.slot.epoch, rig.slot.backend) == (State.DETACHED, 1, "")


def test_a_drain_revokes_and_waits_for_the_last_operation(rig: Rig) -> None:
    rig.attach()
    rig.admit(2)
    assert rig.slot.handle(Detach("d")) == [RevokeOps(1)]
    assert rig.slot.handle(OpClosed(1)) == []
    assert rig.slot.in_flight(1) == 1
    assert rig.slot.handle(OpClosed(1)) == [Stop(1)]


def test_a_drain_past_its_deadline_is_killed_and_its_pages_come_back_after_the_reap(rig: Rig) -> None:
    rig.attach()
    rig.admit()
    rig.slot.handle(Detach("d"))
    assert rig.outcome("deadline", detail="drain took 30 s") == [Kill(1)]
    assert rig.slot.last_error == "drain took 30 s"
    assert rig.outcome("reaped") == [FreeOps(1), Answer("d", Verdict.OK)]


def test_an_operation_may_close_between_the_kill_and_the_reap(rig: Rig) -> None:
    rig.attach()
    rig.admit()
    rig.outcome("lost")
    assert rig.slot.handle(OpClosed(1)) == []
    assert rig.outcome("reaped") == []  # nothing is left to free


@pytest.mark.parametrize("event", ["open_failed", "lost", "deadline"])
def test_an_attach_that_fails_is_answered_when_the_slot_is_empty(rig: Rig, event: StorageEvent) -> None:
    rig.slot.handle(Attach("a", "file", SECRET))
    assert rig.outcome(event, detail="rank 1: no space") == [Kill(1)]
    assert rig.slot.face() is State.FAILED
    assert rig.outcome("reaped") == [Answer("a", Verdict.FAILED, "rank 1: no space")]
    assert (rig.slot.face(), rig.slot.last_error) == (State.DETACHED, "rank 1: no space")
    assert rig.slot.handle(Attach("b", "file", SECRET)) == [Spawn(2, "file", SECRET)]


def test_a_commit_forgets_the_last_error(rig: Rig) -> None:
    rig.slot.handle(Attach("a", "file", SECRET))
    rig.outcome("open_failed")
    rig.outcome("reaped")
    assert rig.slot.last_error == "open_failed (file, epoch 1)"
    rig.attach()
    assert rig.slot.last_error == ""


def test_fm58_an_attach_that_cannot_open_refuses_and_the_slot_works_on(rig: Rig) -> None:
    rig.slot.handle(Attach("a", "file", SECRET))
    rig.outcome("open_failed", detail="pool outside of registered memory")
    assert rig.outcome("reaped") == [Answer("a", Verdict.FAILED, "pool outside of registered memory")]
    rig.attach()
    assert rig.slot.gate() == 2


def test_late_io_is_set_aside_at_the_reap_until_it_is_quiet(rig: Rig) -> None:
    rig.attach(late_io=True)
    rig.admit()
    rig.outcome("lost")
    assert rig.outcome("reaped") == [QuarantineOps(1)]
    assert rig.slot.quarantined == {1: 1}
    assert rig.outcome("quiet") == [ReleaseQuarantine(1)]


def test_fm23_a_process_that_cannot_be_killed_keeps_its_pages_out_of_the_free_list(rig: Rig) -> None:
    rig.attach()
    rig.admit()
    rig.slot.handle(Detach("d"))
    rig.outcome("deadline")
    held, answer = rig.outcome("reap_timeout", detail="rank 0: not reaped")
    assert held == QuarantineOps(1)
    assert (answer.command_id, answer.verdict) == ("d", Verdict.PAGES_HELD)
    assert (rig.slot.face(), rig.slot.last_error) == (State.DETACHED, "rank 0: not reaped")
    rig.attach()  # another epoch works beside it
    assert rig.outcome("quiet") == [ReleaseQuarantine(1)]
    assert rig.slot.gate() == 2


def test_a_detach_gives_up_an_opening_candidate(rig: Rig) -> None:
    rig.slot.handle(Attach("a", "file", SECRET))
    assert rig.slot.handle(Detach("d")) == [Kill(1)]
    assert rig.outcome("reaped") == [Answer("a", Verdict.FAILED, "given up by a detach"), Answer("d", Verdict.OK)]
    assert rig.slot.last_error == ""


def test_detach_of_nothing_is_ok_at_once_and_every_waiter_is_answered(rig: Rig) -> None:
    assert rig.slot.handle(Detach("d")) == [Answer("d", Verdict.OK)]
    rig.attach()
    rig.slot.handle(Detach("e"))
    assert rig.slot.handle(Detach("f")) == []
    assert rig.outcome("reaped") == [Answer("e", Verdict.OK), Answer("f", Verdict.OK)]


@pytest.mark.parametrize("state", [s for s in State if s is not State.DETACHED], ids=lambda state: state.value)
def test_one_change_at_a_time(state: State) -> None:
    rig = in_state(state)
    (answer,) = rig.slot.handle(Attach("second", "memory", "{}"))
    assert (answer.command_id, answer.verdict) == ("second", Verdict.CONFLICT)
    assert answer.detail == f"storage is {state.value} (file, epoch 1)"


# -------------------------------------------------------------------------------------------- switch


def test_a_switch_commits_the_new_one_and_drains_the_old_one_in_one_plan(rig: Rig) -> None:
    rig.attach()
    rig.admit()
    assert rig.slot.handle(Switch("s", "memory", "{}")) == [Spawn(2, "memory", "{}")]
    assert (rig.slot.gate(), rig.slot.face()) == (1, State.ATTACHING)
    assert rig.outcome("commit", 2) == [Answer("s", Verdict.OK), RevokeOps(1)]
    assert (rig.slot.gate(), rig.slot.face()) == (2, State.DRAINING)
    assert rig.slot.handle(OpClosed(1)) == [Stop(1)]
    assert rig.outcome("reaped", 1) == []
    assert (rig.slot.gate(), rig.slot.face()) == (2, State.ATTACHED)


def test_a_switch_that_fails_leaves_the_old_one_untouched(rig: Rig) -> None:
    rig.attach()
    rig.slot.handle(Switch("s", "memory", "{}"))
    assert rig.outcome("open_failed", 2) == [Kill(2)]
    assert rig.slot.gate() == 1
    assert rig.outcome("reaped", 2) == [Answer("s", Verdict.FAILED, "open_failed (memory, epoch 2)")]
    assert (rig.slot.gate(), rig.slot.face()) == (1, State.ATTACHED)


def test_a_loss_of_the_old_one_does_not_stop_the_new_one(rig: Rig) -> None:
    rig.attach()
    rig.slot.handle(Switch("s", "memory", "{}"))
    rig.outcome("lost", 1)
    assert rig.slot.gate() is None
    assert rig.outcome("commit", 2) == [Answer("s", Verdict.OK)]
    assert (rig.slot.gate(), rig.slot.retiring.epoch) == (2, 1)


# ------------------------------------------------------------------------------------------ how long


def test_an_opening_one_has_the_time_of_its_command_and_an_open_one_none(rig: Rig) -> None:
    rig.slot.handle(Attach("a", "file", SECRET, due_us=7))
    assert rig.slot.next_deadline_us() == 7
    rig.outcome("commit")
    assert rig.slot.next_deadline_us() is None


def test_the_drain_of_a_switch_begins_at_the_commit(rig: Rig) -> None:
    rig.attach()
    rig.admit()
    rig.slot.handle(Switch("s", "memory", "{}", due_us=500, drain_us=30))
    rig.slot.now_us = 400
    rig.outcome("commit", 2)
    assert (rig.slot.retiring.due_us, rig.slot.current.due_us) == (430, None)


@pytest.mark.parametrize("ops", [0, 1])
def test_a_later_detach_brings_the_end_nearer_and_never_moves_it_away(rig: Rig, ops: int) -> None:
    rig.attach()
    rig.admit(ops)
    for due_us, expected in ((None, None), (900, 900), (500, 500), (700, 500), (None, 500)):
        rig.slot.handle(Detach(f"due {due_us}", due_us))
        assert rig.slot.next_deadline_us() == expected
    assert rig.slot.face() is (State.DRAINING if ops else State.DETACHING)


def test_after_a_kill_only_the_reap_is_waited_for(rig: Rig) -> None:
    rig.attach()
    rig.admit()
    rig.slot.handle(Detach("d", 5))
    rig.outcome("deadline")
    rig.slot.handle(Detach("e", 3))
    assert rig.slot.next_deadline_us() is None


def test_a_cancel_gives_up_what_is_opening_for_that_command_alone(rig: Rig) -> None:
    rig.attach()
    rig.slot.handle(Switch("s", "memory", "{}", due_us=9))
    assert rig.slot.handle(Cancel("another")) == rig.slot.handle(Cancel("")) == []
    assert rig.slot.handle(Cancel("s")) == [Kill(2)]
    assert rig.slot.handle(Cancel("s")) == []
    assert rig.outcome("reaped", 2) == [Answer("s", Verdict.FAILED, "cancelled")]
    assert (rig.slot.gate(), rig.slot.last_error) == (1, "")


def test_time_is_mixed_into_the_digest() -> None:
    rigs = [in_state(State.DRAINING), in_state(State.DRAINING)]
    for rig, due_us in zip(rigs, (5, 6), strict=True):
        rig.slot.handle(Detach("d", due_us))
    assert rigs[0].digest.mixed != rigs[1].digest.mixed


# ------------------------------------------------------------------------- digest, story, repr, leader


def test_everything_that_changes_is_mixed_in(rig: Rig) -> None:
    rig.slot.handle(Attach("a", "file", "{}"))
    other = Rig()
    other.slot.handle(Attach("a", "file", '{"dir": "/x"}'))
    assert rig.digest.mixed != other.digest.mixed
    before = list(rig.digest.mixed)
    for number, event in enumerate([StorageOutcome("commit", 1), Admitted(1), OpClosed(1), Cleared(), Detach("d")]):
        rig.slot.handle(event)
        assert len(rig.digest.mixed) == len(before) + number + 1
    assert all(isinstance(number, int) for numbers in rig.digest.mixed for number in numbers)


def test_equal_events_give_equal_digests() -> None:
    rigs = [in_state(State.FAILED, ops=2, late_io=True) for _ in range(2)]
    assert rigs[0].digest.mixed == rigs[1].digest.mixed


def test_clears_count_as_generations(rig: Rig) -> None:
    rig.attach()
    rig.slot.handle(Cleared())
    assert rig.slot.generation == 1
    rig.slot.handle(Detach("d"))
    rig.outcome("reaped")
    assert rig.slot.generation == 1


def test_repr_tells_the_truth(rig: Rig) -> None:
    assert repr(rig.slot) == "<StorageSlot DETACHED>"
    rig.attach()
    rig.admit(2)
    assert repr(rig.slot.current) == "<StorageAttachment ATTACHED file epoch=1 in_flight=2>"
    rig.slot.handle(Switch("s", "memory", "{}"))
    assert repr(rig.slot) == (
        "<StorageSlot current: ATTACHED file epoch=1 in_flight=2 | candidate: ATTACHING memory epoch=2 in_flight=0>"
    )
    rig.outcome("lost", 1)
    rig.outcome("reap_timeout", 1)
    assert repr(rig.slot) == "<StorageSlot candidate: ATTACHING memory epoch=2 in_flight=0 | quarantined: [1]>"


def test_fm60_neither_story_nor_error_holds_the_extra_config(rig: Rig) -> None:
    rig.attach()
    rig.slot.handle(Switch("s", "redis", SECRET))
    with pytest.raises(IntegrityError) as caught:
        rig.outcome("reaped", 1)
    told = str(caught.value) + "".join(caught.value.__notes__)
    assert "Switch('s', 'redis')" in told
    assert "hunter2" not in told
    assert "hunter2" not in repr([Spawn(1, "redis", SECRET), Attach("a", "redis", SECRET), rig.slot])


def test_operations_do_not_push_attachments_out_of_the_story(rig: Rig) -> None:
    rig.attach()
    for _ in range(100):
        rig.admit()
        rig.slot.handle(OpClosed(1))
    with pytest.raises(IntegrityError, match="none is in flight") as caught:
        rig.slot.handle(OpClosed(1))
    (story,) = caught.value.__notes__
    assert "Attach('attach 1', 'file')" in story
