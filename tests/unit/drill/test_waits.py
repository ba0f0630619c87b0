"""What a drill says that has waited in vain."""

from __future__ import annotations

from collections.abc import Callable

from sglang_hicache.ctl.exits import Exit
from tests.unit.drill.conftest import SCENARIO, Ran


def test_a_wait_for_storage_that_is_not_needed_says_so(drill: Callable[..., Ran]) -> None:
    """On a server whose pools hold the whole load every drill failed, and said nothing but what the ranks say."""
    ran = drill(f'{SCENARIO}[[timeline]]\ndo = "wait"\nuntil = {{ storage_tokens = 16 }}\nwithin_s = 0.2\n')
    assert ran.code == Exit.DRILL_FAILED
    (words,) = [ran.details[name] for name, verdict in ran.verdicts.items() if verdict == "failed"]
    assert "not so after 0.2 s: " in words
    assert "0 tokens from storage (it is asked for what neither device nor host holds" in words


def test_a_wait_in_vain_says_what_was_counted(drill: Callable[..., Ran]) -> None:
    ran = drill(f'{SCENARIO}[[timeline]]\ndo = "wait"\nuntil = {{ requests = 1000000 }}\nwithin_s = 0.2\n')
    (words,) = [ran.details[name] for name, verdict in ran.verdicts.items() if verdict == "failed"]
    assert " answers, 0 tokens from storage; the last status: " in words
