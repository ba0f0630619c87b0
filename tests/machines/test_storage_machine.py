"""Nothing that can happen to a rank and its store, in any order, breaks a promise: see `storage_machine.py`."""

from __future__ import annotations

import secrets

import hypothesis
import pytest

from tests.machines.storage_machine import StorageMachine, play

#: What runs must have met to prove anything, in tokens, steps or by count.
REACHED = (
    "hit", "miss", "prefetched", "storage_transfer", "deadline", "load_back", "backup", "evicted", "backuped", "failed",
    "recovered", "lost detached", "lost evicted_before_backup", "lost policy", "answer True", "answer False",
    "quarantined", "slot attached", "slot detached", "slot failed",
)  # fmt: skip


def test_no_order_of_steps_and_faults_breaks_a_promise() -> None:
    seen = play(50, 100, derandomize=True)
    assert seen["steps"] > 3500
    assert not [name for name in REACHED if not seen[name]], seen


@pytest.mark.long
@pytest.mark.parametrize("share", range(10))
def test_no_order_of_steps_and_faults_breaks_a_promise_long(share: int) -> None:
    """100,000 steps in all, other ones every time; the number that is printed repeats them."""
    number = secrets.randbits(32)
    print(f"seed {number}")
    hypothesis.seed(number)(StorageMachine)
    assert play(110, 100, derandomize=False)["steps"] >= 10_000
