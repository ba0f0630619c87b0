"""A server that is killed and started again: its storage comes back, even if it is not there at once."""

from __future__ import annotations

from pathlib import Path

from sglang_hicache import audit
from tests.processes.server import Server


def test_killed_and_restarted_while_the_store_is_away(tmp_path: Path) -> None:
    """1. Attach over HTTP. 2. Kill the launcher. 3. Start again while the store cannot be opened. 4. It comes back."""
    store, state, log = tmp_path / "store", tmp_path / "state.json", tmp_path / "audit.jsonl"
    flags = ("--enable-hierarchical-cache", "--hicache-state-file", str(state), "--hicache-audit-log", str(log))
    with Server(tmp_path / "first", *flags) as server:
        assert server.attach(store).status_code == 200
        head = server.status()["audit_head"]
        server.process.kill()
        server.exit_code = -9
    store.rename(tmp_path / "away")
    store.write_text("in the way")
    with Server(tmp_path / "second", *flags, "--hicache-storage-optional") as server:
        status = server.status()
        assert status["hicache_storage_backend"] is None
        startup = status["startup"]
        assert (startup["source"], startup["backend"], startup["optional"]) == ("state file", "file", True)
        assert startup["outcome"] == "failed" and str(store) in startup["extra_config"]
        assert server.generate("Serving goes on without it.", 4)["text"]
        store.unlink()
        (tmp_path / "away").rename(store)
        status = server.wait_until(lambda ranks: ranks[0]["state"] == "attached", "the store is attached again")
        assert status["hicache_storage_prefetch_policy"] == "wait_complete"
        assert server.http.put("/hicache/storage-backend", json={}).status_code == 401
    assert audit.verify(str(log), head) == []
    text = log.read_text()
    assert '"what":"reconnect"' in text and '"event":"refused"' in text
