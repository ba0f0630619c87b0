"""The table of the attachment machine, cell by cell."""

from __future__ import annotations

import pytest

from sglang_hicache.errors import IntegrityError
from sglang_hicache.storage.attachment_events import (
    Admitted,
    Attach,
    Cancel,
    Cleared,
    Detach,
    Event,
    Kind,
    OpClosed,
    ReleaseQuarantine,
    State,
    Switch,
)
from sglang_hicache.storage.attachment_table import TABLE, Never
from sglang_hicache.wire import StorageOutcome
from tests.machines.attachment_rig import Rig, in_state


@pytest.fixture
def rig() -> Rig:
    return Rig()


def _event(kind: Kind) -> Event:
    match kind:
        case Kind.ATTACH:
            return Attach("new", "memory", "{}")
        case Kind.SWITCH:
            return Switch("new", "memory", "{}")
        case Kind.DETACH:
            return Detach("new")
        case Kind.CANCEL:
            return Cancel("attach 1")
        case Kind.ADMITTED:
            return Admitted(1)
        case Kind.OP_CLOSED:
            return OpClosed(1)
        case Kind.CLEARED:
            return Cleared()
    return StorageOutcome(kind.value, 1)


#: The machine once more, in other words: where epoch 1 stands after the event, or None where the event cannot
#: come.  The order of the columns is that of `State`: detached, attaching, attached, draining, detaching, failed.
#: One operation is in flight in attached, draining and failed.
AFTER = {
    Kind.ATTACH: "DETACHED ATTACHING ATTACHED DRAINING DETACHING FAILED",
    Kind.SWITCH: "DETACHED ATTACHING ATTACHED DRAINING DETACHING FAILED",
    Kind.DETACH: "DETACHED FAILED DRAINING DRAINING DETACHING FAILED",
    # Of one that is open nobody knows by which command it came: there is nothing that a cancel could mean.
    Kind.CANCEL: "DETACHED FAILED ATTACHED DRAINING DETACHING FAILED",
    Kind.ADMITTED: "- - ATTACHED - - -",
    Kind.OP_CLOSED: "- - ATTACHED DETACHING - FAILED",
    Kind.CLEARED: "DETACHED ATTACHING ATTACHED DRAINING DETACHING FAILED",
    Kind.COMMIT: "- ATTACHED - - - -",
    Kind.OPEN_FAILED: "- FAILED - - - -",
    Kind.LOST: "- FAILED FAILED FAILED - -",
    Kind.DEADLINE: "- FAILED - FAILED FAILED -",
    Kind.REAPED: "- - - - DETACHED DETACHED",
    Kind.REAP_TIMEOUT: "- - - - - DETACHED",
    Kind.QUIET: "- - - - - -",
}


@pytest.mark.parametrize("state", State, ids=lambda state: state.value)
@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.value)
def test_cell(state: State, kind: Kind) -> None:
    rig = in_state(state, ops=1)
    expected = AFTER[kind].split()[list(State).index(state)]
    if expected == "-":
        with pytest.raises(IntegrityError) as caught:
            rig.slot.handle(_event(kind))
        assert kind.value in str(caught.value)
        assert any("story of the storage slot" in note for note in caught.value.__notes__)
        return
    rig.slot.handle(_event(kind))
    attachment = rig.slot.find(1)
    assert (attachment.state if attachment else State.DETACHED) is State[expected]


def test_the_table_is_total() -> None:
    assert TABLE.keys() == {(state, kind) for state in State for kind in Kind}
    assert all(cell.reason for cell in TABLE.values() if isinstance(cell, Never))


def test_quiet_of_held_pages_is_the_row_that_the_cells_above_cannot_show(rig: Rig) -> None:
    rig.attach()
    rig.outcome("lost")
    rig.outcome("reap_timeout")
    assert rig.outcome("quiet") == [ReleaseQuarantine(1)]
    with pytest.raises(IntegrityError, match="holds no pages"):
        rig.outcome("quiet")


def test_every_state_is_reached_and_left() -> None:
    reached, left = {State.DETACHED}, set()
    for kind, row in AFTER.items():
        for state, after in zip(State, row.split(), strict=True):
            if after not in ("-", state.name):
                left.add(state)
                reached.add(State[after])
        if kind is Kind.ATTACH:  # opens epoch 2: the column of epoch 1 cannot show it
            left.add(State.DETACHED)
            reached.add(State.ATTACHING)
    assert reached == left == set(State)


@pytest.mark.parametrize("state", State, ids=lambda state: state.value)
def test_expects_says_which_outcomes_have_a_row(state: State) -> None:
    kinds = [kind for kind in Kind if AFTER[kind].split()[list(State).index(state)] != "-"]
    outcomes = [kind for kind in list(Kind)[list(Kind).index(Kind.COMMIT) :] if kind is not Kind.QUIET]
    rig = in_state(state)
    assert [kind for kind in outcomes if rig.slot.expects(kind.value, 1)] == [k for k in kinds if k in outcomes]
    assert not rig.slot.expects("quiet", 1)


def test_quiet_is_expected_of_held_pages_only(rig: Rig) -> None:
    rig.attach()
    rig.outcome("lost")
    rig.outcome("reap_timeout")
    assert rig.slot.expects("quiet", 1)
    assert not rig.slot.expects("quiet", 2)
