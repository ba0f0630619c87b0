"""The HiCache routes: attach, detach, ask, clear, flush.

Handlers run on the event loop.  They check who may call (beyond the auth matrix), turn a body into a command,
give it to the desk, and wrap the merged answer of the ranks in the words that existing clients look for.  They
keep no mirror of what is attached: GET asks the ranks, so it can never tell a state that no rank is in.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sglang_hicache.config import PREFETCH_POLICIES, WRITE_POLICIES
from sglang_hicache.errors import UserError
from sglang_hicache.extra_config import extra_config_json
from sglang_hicache.observe import REDACTED, learn_secrets, redacted, without_secrets
from sglang_hicache.storage import registry
from sglang_hicache.tokenizer.api import AttachBody, decode_body
from sglang_hicache.tokenizer.manager import Unavailable
from sglang_hicache.tokenizer.ranks_desk import Outcome, Result
from sglang_hicache.tokenizer.replies import JsonReply, openai_error, text_reply
from sglang_hicache.tokenizer.services import Services
from sglang_hicache.wire import AttachStorage, ClearStorage, DetachStorage, FlushCache, StatusAnswer

log = logging.getLogger(__name__)


#: A flush takes effect in the next tick, but the tick under way may hold a long prefill.
FLUSH_DEADLINE_S = 10.0

#: Longest wait for idle that /flush_cache accepts.
LONGEST_FLUSH_WAIT_S = 3600.0

NEEDS_ADMIN_KEY = "This route needs an admin key, and the server has none; restart it with --admin-api-key."
NOT_ENABLED = "Hierarchical cache is not enabled; restart the server with --enable-hierarchical-cache."

#: HTTP status of each way a command can end.  Unknown is neither success nor failure: a client must not retry blindly.
_STATUS = {Result.SUCCEEDED: 200, Result.FAILED: 400, Result.UNKNOWN: 504}

#: Words that make a text which cannot be parsed, and so not be redacted name by name, unfit to be echoed.
_SECRET_WORDS = re.compile(r"key|secret|passw|token|credential|://[^/\s]*@", re.IGNORECASE)

#: A number in a sentence.
_NUMBER = re.compile(r"\d+(\.\d+)?")


class AdminRoutes:
    """/hicache/storage-backend and its neighbours."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def attach(self, request: Request) -> Response:
        """PUT /hicache/storage-backend."""
        if refusal := self._gate():
            return refusal
        try:
            body = decode_body(await request.body(), AttachBody)
        except UserError as error:
            return openai_error(str(error), 400, kind="Bad Request")
        except ClientDisconnect:
            return Response(status_code=400)
        try:
            return await self._attach(body)
        except UserError as error:
            return text_reply(f"Failed to attach HiCache storage backend.\n{error}", 400)
        except Unavailable as error:
            return text_reply(f"Failed to attach HiCache storage backend.\n{error}", 503)

    async def detach(self, request: Request) -> Response:
        """DELETE /hicache/storage-backend."""
        if refusal := self._gate():
            return refusal
        try:
            self._check_enabled()
        except UserError as error:
            return text_reply(f"Failed to detach HiCache storage backend.\n{error}", 400)
        except Unavailable as error:
            return text_reply(f"Failed to detach HiCache storage backend.\n{error}", 503)
        deadline_s = self._services.config.storage.drain_timeout_s
        outcome = await self._services.desk.command(lambda id: DetachStorage(id=id, deadline_s=deadline_s), deadline_s)
        return _told(outcome, "HiCache storage backend detached.", "Failed to detach HiCache storage backend.")

    async def status(self, request: Request) -> Response:
        """GET /hicache/storage-backend: four keys that clients know, and what each rank says of itself."""
        return self._gate() or JsonReply(await self.live_status())

    async def clear(self, request: Request) -> Response:
        """POST /hicache/storage-backend/clear.  The reply of a failure says so, unlike the reference's."""
        failed = "Failed to clear the hierarchical cache storage backend."
        try:
            self._check_enabled()
        except UserError as error:
            return text_reply(f"{failed}\n{error}", 400)
        except Unavailable as error:
            return text_reply(f"{failed}\n{error}", 503)
        deadline_s = self._services.config.storage.drain_timeout_s
        outcome = await self._services.desk.command(lambda id: ClearStorage(id=id, deadline_s=deadline_s), deadline_s)
        if outcome.result is Result.SUCCEEDED:
            return text_reply("Hierarchical cache storage backend cleared.")
        return _told(outcome, "", failed)

    async def flush_cache(self, request: Request) -> Response:
        """GET or POST /flush_cache?timeout=<seconds to wait for idle>&keep_storage=<true or false>."""
        try:
            self._services.lifecycle.check()
            timeout_s = _flush_timeout(request.query_params.get("timeout", "0"))
            keep_storage = _flag("keep_storage", request.query_params.get("keep_storage", "true"))
        except UserError as error:
            return text_reply(str(error), 400)
        except Unavailable as error:
            return text_reply(str(error), 503)
        clear_s = 0.0 if keep_storage else self._services.config.storage.drain_timeout_s
        deadline_s = timeout_s + FLUSH_DEADLINE_S + clear_s
        outcome = await self._services.desk.command(
            lambda id: FlushCache(id=id, deadline_s=deadline_s, timeout_s=timeout_s, keep_storage=keep_storage),
            deadline_s,
        )
        failure = "Failed to flush the cache." if keep_storage else "Failed to flush the cache and clear the storage."
        return _told(outcome, "Cache flushed.", failure)

    async def l3_layout(self, request: Request) -> Response:
        """GET /get_hicache_l3_cache_layout: only a backend that outsiders may read directly has a layout to tell."""
        live = await self.live_status()
        backend = live["hicache_storage_backend"]
        reason = (
            f"backend {backend} does not publish its object layout" if backend else "no storage backend is attached"
        )
        return JsonReply(
            {
                "enabled": False,
                "backend": backend,
                "page_size": self._services.config.pool.page_size,
                "hicache_object_layout": {"pools": []},
                "reason": reason,
            }
        )

    async def live_status(self) -> dict[str, Any]:
        """What the ranks say.  The four keys are the word of rank 0, or of the first that answers when it is silent."""
        answers = await self._services.desk.status()
        voice = next((answer for answer in answers if answer is not None), None)
        attached = voice is not None and voice.backend != ""
        return {
            "hicache_storage_backend": voice.backend if attached else None,
            "hicache_storage_backend_extra_config": echo(voice.extra_config_json) if attached else None,
            "hicache_storage_prefetch_policy": voice.prefetch_policy or None if voice else None,
            "hicache_write_policy": voice.write_policy or None if voice else None,
            "why": _why(answers),
            "lost_tokens": voice.lost_tokens if voice else {},
            "ranks": [_rank(rank, answer) for rank, answer in enumerate(answers)],
        }

    async def _attach(self, body: AttachBody) -> Response:
        self._check_enabled()
        _check_choice("hicache_storage_prefetch_policy", body.hicache_storage_prefetch_policy, PREFETCH_POLICIES)
        _check_choice("hicache_write_policy", body.hicache_write_policy, WRITE_POLICIES)
        config = self._extra_config(body)
        deadline_s = self._services.config.storage.attach_timeout_s
        outcome = await self._services.desk.command(
            lambda id: AttachStorage(
                id=id,
                deadline_s=deadline_s,
                backend=body.hicache_storage_backend,
                extra_config_json=config,
                prefetch_policy=body.hicache_storage_prefetch_policy,
                write_policy=body.hicache_write_policy,
            ),
            deadline_s,
        )
        return _told(outcome, "HiCache storage backend attached.", "Failed to attach HiCache storage backend.")

    def _extra_config(self, body: AttachBody) -> str | None:
        """Resolved and checked.  None stays None: a re-attach of the same backend then keeps what it has."""
        given = body.hicache_storage_backend_extra_config_json
        registry.spec(body.hicache_storage_backend)
        try:
            config = extra_config_json(given, below=self._services.config.storage.config_dir)
            learn_secrets(config)
            registry.validate_extra_config(body.hicache_storage_backend, config)
        except UserError as error:
            if not given or given.startswith("@"):
                raise
            raise UserError(f"{error}; the extra config was: {echo(given)}") from error
        return config

    def _check_enabled(self) -> None:
        self._services.lifecycle.check()
        if not self._services.config.cache.hierarchical:
            raise UserError(NOT_ENABLED)

    def _gate(self) -> Response | None:
        """Beyond the matrix: without an admin key these routes are closed, not open to everybody."""
        if self._services.config.http.admin_api_key:
            return None
        return JsonReply({"error": NEEDS_ADMIN_KEY}, 400)


def echo(extra_config: str) -> str:
    """What may be shown of an extra config: texts under a secret's name and logins in URLs are replaced."""
    try:
        shown = redacted(json.loads(extra_config))
        # Whoever gives something else than a key file has perhaps given the key.
        if isinstance(shown, dict) and isinstance(shown.get("encryption"), (str, list, int, float)):
            shown["encryption"] = REDACTED
        text = json.dumps(shown, ensure_ascii=False)
    except (ValueError, RecursionError):
        return _unparsed(extra_config)
    # Half a surrogate pair, which JSON can write and UTF-8 cannot.
    return text.encode(errors="replace").decode()


def _unparsed(text: str) -> str:
    if _SECRET_WORDS.search(text):
        return f"<{len(text)} characters, not shown because they may hold a secret>"
    return text if len(text) <= 200 else text[:200] + "..."


def _told(outcome: Outcome, success: str, failure: str) -> Response:
    """Plain text: our line, then what the ranks said."""
    line = success if outcome.result is Result.SUCCEEDED else failure
    message = without_secrets(outcome.message)
    text = line if message in ("", line) else f"{line}\n{message}"
    log.info("%s", text.replace("\n", " "), extra={"command": outcome.operation_id})
    return text_reply(text, _STATUS[outcome.result])


def _rank(rank: int, answer: StatusAnswer | None) -> dict[str, Any]:
    if answer is None:
        return {"rank": rank, "state": "unknown", "epoch": None, "in_flight": None, "last_error": "the rank is silent"}
    learn_secrets(answer.extra_config_json)
    return {
        "rank": rank,
        "state": answer.state,
        "epoch": answer.epoch,
        "backend": answer.backend or None,
        "in_flight": answer.in_flight,
        "queued_backups": answer.queued_backups,
        "quarantined_pages": answer.quarantined_pages,
        "last_error": without_secrets(answer.last_error) or None,
        "last_error_age_s": round(answer.last_error_age_s, 1) if answer.last_error else None,
        "backend_info": redacted(answer.backend_info),
        "why": answer.why,
        "lost_tokens": answer.lost_tokens,
        "counters": answer.counters,
        "backend_stats": answer.backend_stats,
        "load": answer.load,
        "model_path": answer.model_path,
        "weight_version": answer.weight_version,
        "weights_digest": answer.weights_digest,
    }


def _why(answers: Sequence[StatusAnswer | None]) -> list[str]:
    """Why nothing is written or fetched: once what all ranks say, with its rank what only some do.

    The ranks are asked one after the other, so that times and counts in the same sentence may differ a little.
    """
    said: dict[str, dict[int, str]] = {}
    for rank, answer in enumerate(answers):
        for sentence in answer.why if answer else ("the rank is silent",):
            said.setdefault(_NUMBER.sub("0", sentence), {})[rank] = sentence
    found: list[str] = []
    for by_rank in said.values():
        if len(by_rank) == len(answers):
            found.append(by_rank[0])
        else:
            found += [f"rank {rank}: {sentence}" for rank, sentence in by_rank.items()]
    return found


def _check_choice(name: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise UserError(f"Invalid {name} {value!r}; it must be one of: {', '.join(allowed)}")


def _flag(name: str, text: str) -> bool:
    """A query parameter that is on or off."""
    if text not in ("true", "false"):
        raise UserError(f"{name} is {text!r}; it must be true or false")
    return text == "true"


def _flush_timeout(text: str) -> float:
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = math.nan
    if not 0 <= timeout_s <= LONGEST_FLUSH_WAIT_S:
        raise UserError(f"timeout is {text!r}; it must be a number of seconds from 0 to {LONGEST_FLUSH_WAIT_S:g}")
    return timeout_s
