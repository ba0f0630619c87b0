"""Who did what, told to the audit log if there is one: the only place that knows what an entry of it looks like.

Belongs to the event loop.  An entry is written by a thread of the log; only the begin of a change waits for it, and not
for long: what is about to happen is in the log first, unless the log is sick, and then the server matters more.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from concurrent.futures import Future
from typing import Any

from starlette.types import Scope

from sglang_hicache.audit import AuditLog
from sglang_hicache.config import ServerConfig
from sglang_hicache.observe import learn_secrets, without_secrets
from sglang_hicache.tokenizer.auth import bearer_token
from sglang_hicache.tokenizer.operations import SERVER, Caller, Operation, State
from sglang_hicache.tokenizer.ranks_desk import Order
from sglang_hicache.tokenizer.shown import shown_config
from sglang_hicache.wire import (
    AttachStorage,
    CancelCommand,
    ClearStorage,
    DetachStorage,
    DryRunStorage,
    FlushCache,
    StorageNews,
    UpdateWeights,
)

#: Seconds that a change waits for its first entry to reach the disk.
PATIENCE_S = 0.1

#: A stranger's attempts that are written down, in so many seconds; the rest is counted.  He must not fill the disk.
MOST_REFUSALS, REFUSALS_S = 30, 60.0

#: Characters of what ranks have said that an entry keeps.
LONGEST_TEXT = 2000

#: Commands after which another storage may be attached.
_CHANGES_STORAGE = AttachStorage | DetachStorage


class Trail:
    """Entries of the audit log."""

    def __init__(self, audit: AuditLog | None, config: ServerConfig) -> None:
        self._audit = audit
        self._keys = [key.encode() for key in (config.http.admin_api_key, config.http.api_key) if key]
        #: What changes change.
        self._attached: dict[str, str] | None = None
        self._weights = {"model_path": config.model.place, "weights_digest": config.model.weights_digest}
        #: Attempts of strangers: when the latest that were written down came, and how many were not.
        self._refusals_s: list[float] = []
        self._not_written = 0

    @property
    def told(self) -> dict[str, str | None] | None:
        """Head and health of the log; None without one."""
        return {"head": self._audit.head, "error": self._audit.error or None} if self._audit else None

    def caller(self, scope: Scope) -> Caller:
        """Who sent a request."""
        token, client = bearer_token(scope["headers"]), scope.get("client")
        address = client[0] if client else None
        if token is None:
            return Caller("none", address)
        is_ours = any(hmac.compare_digest(token, key) for key in self._keys)
        return Caller(self._audit.fingerprint(token) if is_ours and self._audit else "unknown", address)

    def started(self, **facts: Any) -> None:
        """The server has begun."""
        self._write("start", SERVER, "server", asked=facts)

    async def close(self) -> None:
        """The server ends."""
        if self._audit is not None:
            self._write("stop", SERVER, "server")
            audit, self._audit = self._audit, None
            await asyncio.to_thread(audit.close_blocking)

    async def began(self, operation: Operation) -> None:
        """A command is about to be given to the ranks."""
        operation.before = self._state(operation.order)
        written = self._write(
            "begin", operation.caller, operation.kind, operation=operation.id, asked=_asked(operation.order),
            before=operation.before,
        )  # fmt: skip
        if written is not None:
            # Not `wait_for`: in Python 3.11 it forgets that it was cancelled if the line is written at that moment, and
            # the end of the server would wait for the command's deadline.
            writing = asyncio.wrap_future(written)
            writing.add_done_callback(_heard)
            await asyncio.wait([writing], timeout=PATIENCE_S)

    def ended(self, operation: Operation) -> None:
        """All ranks have answered, or the time is over, or a late answer has come."""
        if operation.state is State.SUCCEEDED:
            self._changed(operation.order)
        ranks = [
            {"rank": answer.rank, "success": answer.success, "message": _short(answer.message)}
            for _, answer in sorted(operation.answers.items())
        ]
        self._write(
            "end", operation.caller, operation.kind, operation=operation.id, before=operation.before,
            after=self._state(operation.order), outcome=operation.state.value, message=_short(operation.message),
            ranks=ranks,
        )  # fmt: skip

    def refused(self, caller: Caller, what: str, why: str) -> None:
        """A call that never became a command."""
        if not caller.is_known:
            now_s = time.monotonic()
            self._refusals_s = [at_s for at_s in self._refusals_s if now_s - at_s < REFUSALS_S]
            if len(self._refusals_s) >= MOST_REFUSALS:
                self._not_written += 1
                return
            self._refusals_s.append(now_s)
        self._write("refused", caller, what, outcome="refused", message=_short(why))

    def news(self, news: StorageNews, *, is_by_command: bool) -> None:
        """Another storage is attached than before, or none."""
        learn_secrets(news.extra_config_json)
        before = self._attached
        self._attached = None
        if news.after:
            self._attached = {"backend": news.after, "extra_config": shown_config(news.extra_config_json or "{}")}
        if not is_by_command:
            self._write("news", SERVER, news.cause, before=before, after=self._attached, message=_short(news.detail))

    def _changed(self, order: Order) -> None:
        """What a command that succeeded has left; storage is told of by news, which come first."""
        if isinstance(order, UpdateWeights):
            self._weights = {"model_path": order.model_path, "weights_digest": order.weights_digest}

    def _state(self, order: Order) -> dict[str, str] | None:
        """Of what a command changes."""
        if isinstance(order, UpdateWeights):
            return self._weights
        return self._attached if isinstance(order, _CHANGES_STORAGE) else None

    def _write(self, event: str, caller: Caller, what: str, **fields: Any) -> Future[str] | None:
        if self._audit is None:
            return None
        entry = {"event": event, "who": {"key": caller.key, "address": caller.address}, "what": what} | fields
        if self._not_written:
            entry["refusals_not_written"] = self._not_written
            self._not_written = 0
        return self._audit.append(entry)


def _asked(order: Order) -> dict[str, Any]:
    """What a command asks for, without secrets."""
    match order:
        case AttachStorage():
            asked = {
                "backend": order.backend,
                "extra_config": order.extra_config_json and shown_config(order.extra_config_json),
                "mode": order.mode,
                "prefetch_policy": order.prefetch_policy,
                "write_policy": order.write_policy,
            }
        case DryRunStorage():
            asked = {"backend": order.backend, "extra_config": shown_config(order.extra_config_json)}
        case DetachStorage():
            asked = {"mode": order.mode, "deadline_s": order.deadline_s}
        case FlushCache():
            asked = {"keep_storage": order.keep_storage}
        case UpdateWeights():
            asked = {
                "model_path": order.model_path,
                "weights_digest": order.weights_digest,
                "weight_version": order.weight_version,
            }
        case CancelCommand():
            asked = {"target": order.target}
        case ClearStorage():
            asked = {}
    return {name: value for name, value in asked.items() if value is not None}


def _short(text: str) -> str:
    text = without_secrets(text)
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 3] + "..."


def _heard(writing: asyncio.Future[str]) -> None:
    """A line that could not be written is told by the log's own status; asyncio need not complain that nobody asked."""
    if not writing.cancelled():
        writing.exception()
