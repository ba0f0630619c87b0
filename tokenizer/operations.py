"""Operations: what was asked of the whole server, whether it still runs, and how it ended.

Every admin command is one, whether its caller waits or not.  The table belongs to the event loop of the tokenizer
process; it holds the latest, and whatever runs however old it is.  It says what the ranks have answered and decides
nothing.
"""

from __future__ import annotations

import asyncio
import enum
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sglang_hicache.audit import utc
from sglang_hicache.observe import redacted, without_secrets
from sglang_hicache.tokenizer.ranks_desk import Order, Outcome, Result
from sglang_hicache.wire import (
    AttachStorage,
    CancelCommand,
    ClearStorage,
    CommandAnswer,
    DetachStorage,
    DryRunReport,
    DryRunStorage,
    FlushCache,
    UpdateWeights,
)

#: Operations that are remembered; more are as long as they run.
MOST_REMEMBERED = 256


class State(enum.Enum):
    """Where an operation is."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    #: Not every rank has answered in time.  A late answer still turns it into one of the others.
    UNKNOWN = "unknown"
    CANCELLED = "cancelled"


_STATE_OF = {Result.SUCCEEDED: State.SUCCEEDED, Result.FAILED: State.FAILED, Result.UNKNOWN: State.UNKNOWN}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who gave a command."""

    #: Fingerprint of one of the server's keys; "unknown": another one; "none"; "server": the server itself.
    key: str
    #: Of the connection: what a proxy says of others is not asked.
    address: str | None = None

    @property
    def is_known(self) -> bool:
        """Has a key of this server."""
        return self.key not in ("unknown", "none")


SERVER = Caller("server")


@dataclass(slots=True, eq=False)
class Operation:
    """One command, from the moment it was given until all ranks have answered."""

    order: Order
    caller: Caller = SERVER
    #: What it is about to change, as the audit log tells it.
    before: dict[str, str] | None = None
    state: State = State.RUNNING
    message: str = ""
    answers: dict[int, CommandAnswer] = field(default_factory=dict)
    #: Wall clock, for people.
    began_s: float = field(default_factory=time.time)
    took_s: float | None = None
    #: The one that tries to give this one up.
    cancel: Operation | None = None
    #: Another storage is attached by it, or none; an attach that only changes policies makes no news.
    made_news: bool = False
    #: Its caller can be told: it no longer runs, and what is kept of it is kept.
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _began_clock_s: float = field(default_factory=time.monotonic)

    @property
    def id(self) -> str:
        """The id of its command."""
        return self.order.id

    @property
    def kind(self) -> str:
        """What it does, in the words of the routes."""
        match self.order:
            case AttachStorage(switch=switch):
                return "switch" if switch else "attach"
            case DetachStorage():
                return "detach"
            case ClearStorage():
                return "clear"
            case FlushCache():
                return "flush"
            case UpdateWeights():
                return "update_weights"
            case DryRunStorage():
                return "dry_run"
            case CancelCommand():
                return "cancel"

    @property
    def mode(self) -> str | None:
        """idle, drain or force, where there is a choice."""
        return self.order.mode if isinstance(self.order, AttachStorage | DetachStorage) else None

    @property
    def backend(self) -> str | None:
        """Name of the backend that it is about."""
        return self.order.backend if isinstance(self.order, AttachStorage | DryRunStorage) else None

    def end(self, outcome: Outcome) -> None:
        """The ranks have answered, or the time for it is over; or, later, they have answered after all."""
        self.state = _STATE_OF[outcome.result]
        if self.state is State.FAILED and self.cancel is not None and self.cancel.state is State.SUCCEEDED:
            self.state = State.CANCELLED
        self.message, self.answers = without_secrets(outcome.message), outcome.answers
        self.took_s = time.monotonic() - self._began_clock_s

    def told(self) -> dict[str, Any]:
        """As JSON shows it."""
        return {
            "id": self.id,
            "kind": self.kind,
            "state": self.state.value,
            "mode": self.mode,
            "backend": self.backend,
            "target": self.order.target if isinstance(self.order, CancelCommand) else None,
            "began": utc(self.began_s),
            "ended": None if self.took_s is None else utc(self.began_s + self.took_s),
            "took_s": round(time.monotonic() - self._began_clock_s if self.took_s is None else self.took_s, 3),
            "deadline_s": self.order.deadline_s,
            "message": self.message,
            "ranks": [_told_rank(self.answers[rank]) for rank in sorted(self.answers)],
        }


class Operations:
    """The latest operations of this server, oldest first."""

    def __init__(self) -> None:
        self._table: dict[str, Operation] = {}

    def __repr__(self) -> str:
        return f"<Operations {len(self.running())} running, {len(self._table)} known>"

    def add(self, operation: Operation) -> None:
        """Remember one more, and forget the oldest that has ended."""
        self._table[operation.id] = operation
        while len(self._table) > MOST_REMEMBERED:
            oldest = next((each for each in self._table.values() if each.state is not State.RUNNING), None)
            if oldest is None:
                return
            del self._table[oldest.id]

    def get(self, operation_id: str) -> Operation | None:
        """One that is remembered."""
        return self._table.get(operation_id)

    def latest(self) -> list[Operation]:
        """All that are remembered, newest first."""
        return list(reversed(self._table.values()))

    def running(self) -> list[Operation]:
        """Those that have not ended, oldest first."""
        return [each for each in self._table.values() if each.state is State.RUNNING]


def told_report(rank: int, report: DryRunReport, ok: bool) -> dict[str, Any]:
    """What a rank found out about a backend."""
    fields = msgspec.structs.asdict(report) | {
        "steps": [msgspec.structs.asdict(step) for step in report.steps],
        "reason": without_secrets(report.reason),
        "info": redacted(report.info),
    }
    return {"rank": rank, "ok": ok} | fields


def _told_rank(answer: CommandAnswer) -> dict[str, Any]:
    told = {"rank": answer.rank, "success": answer.success, "message": without_secrets(answer.message)}
    if answer.report is not None:
        told["report"] = told_report(answer.rank, answer.report, answer.success)
    return told
