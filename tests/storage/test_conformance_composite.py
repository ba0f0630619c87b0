"""Stores made of stores keep the contract that every store keeps, whatever they are made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache.storage.conformance import CHECKS, Make, check_readers_see_whole_pages
from sglang_hicache.storage.conformance_faults import (
    SABOTAGES,
    check_damage_at_every_byte,
    check_pages_cut_at_every_byte,
    check_sabotaged,
)
from sglang_hicache.storage.encryption import AesGcm
from tests.storage import pages

#: Backend, the kinds of store inside, and what is set beside them.
_COMPOSITES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "tiered-memory-file": ("tiered", ("memory", "file"), {}),
    "tiered-memory-memory": ("tiered", ("memory", "memory"), {}),
    "tiered-file-file": ("tiered", ("file", "file"), {}),
    "tiered-any": ("tiered", ("file", "memory"), {"required": "any"}),
    "tiered-still": ("tiered", ("memory", "file"), {"promote": False}),
    "mirror-memory-file": ("mirror", ("memory", "file"), {}),
    "mirror-memory-memory": ("mirror", ("memory", "memory"), {}),
    "mirror-file-file": ("mirror", ("file", "file"), {"min_writes": 2}),
}
_ATTACKED = ["tiered-memory-file", "tiered-memory-memory", "mirror-memory-file", "mirror-memory-memory"]


def _maker(which: str, root: Path) -> Make:
    name, kinds, config = _COMPOSITES[which]
    inside = [
        {"backend": kind, "extra_config": {"file_storage_path": str(root / str(number))} if kind == "file" else {}}
        for number, kind in enumerate(kinds)
    ]
    key = "tiers" if name == "tiered" else "copies"
    return lambda: pages.backend(name, config | {key: inside})


@pytest.mark.parametrize("which", _COMPOSITES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_store_of_stores_keeps_the_contract(check: Callable[[Make], None], which: str, root: Path) -> None:
    check(_maker(which, root))


@pytest.mark.parametrize("which", _ATTACKED)
@pytest.mark.parametrize(("call", "kind"), SABOTAGES)
def test_a_saboteur_costs_pages_and_nothing_else(which: str, call: str, kind: str, root: Path) -> None:
    check_sabotaged(_maker(which, root), call, kind)


@pytest.mark.parametrize("which", ["tiered-memory-file", "mirror-memory-file"])
@pytest.mark.parametrize(("call", "kind"), [("read", "flip"), ("write", "flip"), ("write", "duplicate")])
def test_a_saboteur_costs_pages_and_nothing_else_with_encryption(which: str, call: str, kind: str, root: Path) -> None:
    check_sabotaged(_maker(which, root), call, kind, AesGcm(b"k" * 32))


@pytest.mark.parametrize("which", ["tiered-memory-memory", "mirror-memory-memory"])
@pytest.mark.parametrize("check", [check_damage_at_every_byte, check_pages_cut_at_every_byte])
def test_damage_at_any_byte_is_a_miss(check: Callable[..., None], which: str, root: Path) -> None:
    check(_maker(which, root))


#: What one store inside may do without anybody noticing: what costs it pages, but no lie about what is there, and no
#: answer that nobody else could give (who fails to read what the other does not have leaves it unknown).
_SICK = [
    *((call, kind) for call, kind in SABOTAGES if call in ("write", "touch", "set_aside")),
    *(("read", kind) for kind in ("flip", "short", "disappear", "duplicate", "slow", "twice")),
    *(("exists", kind) for kind in ("error", "none", "wrong_type")),
]


@pytest.mark.parametrize("name", ["tiered", "mirror"])
@pytest.mark.parametrize(("call", "kind"), _SICK)
def test_one_sick_store_inside_breaks_no_contract(name: str, call: str, kind: str) -> None:
    fault = {"kind": kind, "share": 0.5, "delay_ms": 0.1}
    sick = {"backend": "faulty", "extra_config": {"inner": "memory", "faults": {call: fault}}}
    key = "tiers" if name == "tiered" else "copies"
    for check in CHECKS:
        # A page that is damaged here, and deleted elsewhere a moment later, is rightly called damaged.
        if call != "read" or check is not check_readers_see_whole_pages:
            check(lambda: pages.backend(name, {key: [sick, {"backend": "memory"}]}))
