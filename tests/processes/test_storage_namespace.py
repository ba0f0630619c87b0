"""A storage process whose rank computes with other weights from some message on."""

from __future__ import annotations

from pathlib import Path

from sglang_hicache import wire
from tests.processes.storage_world import NAMESPACE, PAGE_BYTES, Rank, keys

OTHER = "6b" * 32


def names(store: Path) -> dict[str, int]:
    """Pages by namespace."""
    found = [file.relative_to(store).parts[0] for file in store.rglob("*.page")]
    return {name: found.count(name) for name in sorted(set(found))}


def test_fm32_the_same_keys_are_other_pages_after_the_namespace_has_changed(tmp_path: Path) -> None:
    store, run_dir = tmp_path / "store", tmp_path / "run"
    run_dir.mkdir(mode=0o700)
    rank = Rank(run_dir, "file", {"file_storage_path": str(store)})
    try:
        rank.opened()
        first = bytes(rank.pool.buffer)
        # One behind the other: the first write is still in its lane when the namespace changes, and keeps its name.
        rank.write(1, 100)
        rank.send(wire.UseNamespace(namespace=OTHER))
        rank.write(2, 50, host_page=100)
        assert rank.end_of(1).pages == 100
        assert rank.end_of(2).pages == 50
        rank.send(wire.LookupPages(op_id=3, keys=keys(100)))
        assert rank.end_of(3).pages == 50
        assert names(store) == {NAMESPACE: 100, OTHER: 50}

        rank.read(4, 50)
        assert rank.end_of(4).pages == 50
        content = bytes(rank.pool.buffer)
        assert content[128 * PAGE_BYTES : 178 * PAGE_BYTES] == first[100 * PAGE_BYTES : 150 * PAGE_BYTES]

        rank.send(wire.ClearPages(command_id="c"))
        assert rank.next_message(lambda message: isinstance(message, wire.ClearDone)).reason == ""
        assert names(store) == {NAMESPACE: 100}, "a clear is about the present namespace"
        rank.send(wire.UseNamespace(namespace=NAMESPACE))
        rank.send(wire.LookupPages(op_id=5, keys=keys(100)))
        assert rank.end_of(5).pages == 100
        rank.send(wire.StopBackend())
        assert rank.exit_status() == 0
    finally:
        rank.close()
