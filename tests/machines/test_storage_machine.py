"""Nothing that can happen to a rank and its store, in any order, breaks a promise: see `storage_machine.py`."""

from __future__ import annotations

import secrets
from collections import Counter

import hypothesis
import pytest

from tests.machines.storage_machine import StorageMachine, play

#: What runs must have met to prove anything, in tokens or by count.
REACHED = (
    "hit", "miss", "prefetched", "storage_transfer", "deadline", "load_back", "backup", "evicted", "backuped", "failed",
    "recovered", "lost backend_error", "lost detached", "lost queue_full", "lost evicted_before_backup", "answer True",
    "answer False",
)


def test_no_order_of_steps_and_faults_breaks_a_promise() -> None:
    seen = play(50, 100, derandomize=True)
    assert seen["steps"] > 3500
    assert not [name for name in REACHED if not seen[name]], seen


@pytest.mark.long
def test_no_order_of_steps_and_faults_breaks_a_promise_long() -> None:
    """100,000 steps, other ones every time."""
    seen: Counter[str] = Counter()
    while seen["steps"] < 100_000:
        number = secrets.randbits(32)
        print(f"seed {number}")
        hypothesis.seed(number)(StorageMachine)
        seen += play(100, 200, derandomize=False)
