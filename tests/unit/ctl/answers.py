"""What the server says, in the forms that tests/contract holds it to."""

from __future__ import annotations

from typing import Any

ID = "3f2a91c0d1e2"


def operation(state: str = "succeeded", **fields: Any) -> dict[str, Any]:
    """GET /hicache/operations/{id}."""
    return {
        "id": ID, "kind": "attach", "state": state, "mode": "drain", "backend": "file", "target": None,
        "began": "2026-11-22T22:40:01.123Z", "ended": None if state == "running" else "2026-11-22T22:40:01.323Z",
        "took_s": 0.2, "deadline_s": 30.0, "message": "" if state == "running" else "the ranks' words",
        "ranks": [{"rank": 0, "success": state == "succeeded", "message": "rank 0's words"}],
    } | fields  # fmt: skip


def rank(number: int = 0, **fields: Any) -> dict[str, Any]:
    """One rank of GET /hicache/storage-backend."""
    return {
        "rank": number, "state": "attached", "epoch": 3, "backend": "file", "in_flight": {"write": 2, "read": 0},
        "queued_backups": 5, "quarantined_pages": 0, "last_error": None, "last_error_age_s": None,
        "backend_info": {}, "why": [], "lost_tokens": {}, "counters": {}, "backend_stats": {},
        "places": [
            {"role": "current", "state": "attached", "epoch": 3, "backend": "file", "in_flight": 2},
        ],
        "load": {"running-req": 4, "queue-req": 1},
    } | fields  # fmt: skip


def silent(number: int) -> dict[str, Any]:
    """A rank that did not answer in time."""
    return {
        "rank": number, "state": "unknown", "epoch": None, "in_flight": None, "last_error": "the rank is silent",
    }  # fmt: skip


def breaker(**fields: Any) -> dict[str, Any]:
    """The breaker in it."""
    return {
        "state": "closed", "level": "failover", "in_state_s": 7500.0, "total_s": {"closed": 7500.0}, "trips": 0,
        "reason": None, "serving": "primary", "next_try_s": None, "failovers": 0, "failbacks": 0,
    } | fields  # fmt: skip


def incident(**fields: Any) -> dict[str, Any]:
    """One of GET /hicache/incidents."""
    return {
        "number": 1, "kind": "outage", "cause": "tripped_errors: 5 reads failed in a row", "backend": "file",
        "requests": 12, "reprefilled_tokens": 3400, "computed_tokens": 9000, "reprefill_s": 2.5,
        "began": "2026-11-22T22:40:01.123Z", "ended": "2026-11-22T22:41:31.123Z", "lasted_s": 90.0,
    } | fields  # fmt: skip


def status(**fields: Any) -> dict[str, Any]:
    """GET /hicache/storage-backend."""
    startup = {
        "source": "command line", "backend": "file", "extra_config": '{"path":"/pages"}', "optional": False,
        "prefetch_policy": "timeout", "write_policy": "write_through", "outcome": "succeeded", "message": "attached",
        "warning": None,
    }  # fmt: skip
    return {
        "hicache_storage_backend": "file", "hicache_storage_backend_extra_config": '{"path": "/pages"}',
        "hicache_storage_prefetch_policy": "timeout", "hicache_write_policy": "write_through",
        "startup": startup, "audit": {"head": "17-9f86d081", "error": None}, "state_file": None,
        "why": ["nothing waits to be written"], "lost_tokens": {}, "breaker": breaker(), "operation": [],
        "audit_head": "17-9f86d081", "ranks": [rank(0), rank(1)],
    } | fields  # fmt: skip
