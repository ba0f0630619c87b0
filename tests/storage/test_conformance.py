"""Every backend keeps the contract, and the checks notice one that does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_hicache.errors import StorageError
from sglang_hicache.storage import checked
from sglang_hicache.storage.checked import CheckedStore
from sglang_hicache.storage.conformance import CHECKS, ContractBroken, Make, check_backend
from sglang_hicache.storage.conformance_faults import (
    SABOTAGES,
    check_damage_at_every_byte,
    check_pages_cut_at_every_byte,
    check_sabotaged,
)
from sglang_hicache.storage.encryption import AesGcm
from tests.storage import pages

_SMALL = 15 * (4096 + 256) // 2
_BACKENDS = {
    "memory": ("memory", {}),
    "file": ("file", {}),
    "file-data": ("file", {"fsync": "data"}),
    "file-full": ("file", {"fsync": "full"}),
    "faulty-memory": ("faulty", {"inner": "memory"}),
    "faulty-file": ("faulty", {"inner": "file"}),
}
_SMALL_BACKENDS = {
    "memory-small": ("memory", {"max_size": _SMALL}),
    "file-small": ("file", {"max_size": _SMALL, "min_free_space": 0}),
}
#: Backends under attack: settings, encryption, and pages (of eight) that must be there in the end.  The small
#: ones have room for seven and a half and evict down to six while they are written.
_ATTACKED: dict[str, tuple[str, bytes, int]] = {
    "memory": ("memory", b"", 8),
    "memory-encrypted": ("memory", b"k" * 32, 8),
    "file": ("file", b"", 8),
    "file-encrypted": ("file", b"k" * 32, 8),
    "memory-small": ("memory-small", b"", 4),
    "file-small": ("file-small", b"", 4),
}


def _maker(which: str, root: Path) -> Make:
    name, config = (_BACKENDS | _SMALL_BACKENDS)[which]
    path = {"file_storage_path": str(root)}
    if name == "file":
        config = config | path
    elif config.get("inner") == "file":
        config = config | {"inner_config": path}
    return lambda: pages.backend(name, config)


@pytest.mark.parametrize("which", _BACKENDS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_backend_keeps_the_contract(check: Callable[[Make], None], which: str, root: Path) -> None:
    check(_maker(which, root))


@pytest.mark.parametrize("which", _ATTACKED)
@pytest.mark.parametrize(("call", "kind"), SABOTAGES)
def test_a_saboteur_costs_pages_and_nothing_else(which: str, call: str, kind: str, root: Path) -> None:
    backend, key, room_pages = _ATTACKED[which]
    check_sabotaged(_maker(backend, root), call, kind, AesGcm(key) if key else None, room_pages=room_pages)


@pytest.mark.parametrize("which", ["memory", "memory-encrypted", "file", "file-encrypted"])
@pytest.mark.parametrize("check", [check_damage_at_every_byte, check_pages_cut_at_every_byte])
def test_damage_at_any_byte_is_a_miss(check: Callable[..., None], which: str, root: Path) -> None:
    backend, key, _ = _ATTACKED[which]
    check(_maker(backend, root), AesGcm(key) if key else None)


@pytest.mark.parametrize(("call", "kind"), [("read", "flip"), ("write", "duplicate"), ("read", "short")])
def test_a_store_that_trusts_its_backend_is_noticed(call: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked, "_wrong", lambda *_: None)
    with pytest.raises(ContractBroken):
        check_sabotaged(lambda: pages.backend("memory", {}), call, kind)


def test_a_store_that_leaves_bad_pages_where_they_are_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckedStore, "_remove", lambda *_: None)
    with pytest.raises(ContractBroken, match="stays damaged|does not find"):
        check_sabotaged(lambda: pages.backend("memory", {}), "write", "flip")


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        ("read", "flip"),
        ("read", "short"),
        ("read", "disappear"),
        ("read", "none"),
        ("read", "wrong_type"),
        ("read", "short_list"),
        ("read", "error"),
        ("write", "flip"),
        ("write", "none"),
        ("write", "no_space"),
        ("exists", "stale"),
        ("exists", "none"),
        ("exists", "wrong_type"),
        ("delete", "none"),
        ("clear", "error"),
        ("open", "error"),
    ],
)
def test_checks_notice_a_saboteur(call: str, kind: str) -> None:
    config = {"inner": "memory", "faults": {call: {"kind": kind}}}
    with pytest.raises((ContractBroken, StorageError)):
        check_backend(lambda: pages.backend("faulty", config))
