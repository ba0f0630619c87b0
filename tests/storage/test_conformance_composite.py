"""Stores made of stores keep the contract that every store keeps, whatever they are made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache.storage.conformance import CHECKS, Make
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
