"""What is told of the storage: what is attached, rank by rank, and what it did not do.

Handlers run on the event loop and change nothing.  They keep no mirror of what is attached: the ranks are asked each
time, so that a reply can never tell a state that no rank is in.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

from msgspec import structs
from starlette.requests import Request
from starlette.responses import Response

from sglang_hicache.audit import utc
from sglang_hicache.observe import learn_secrets, redacted, without_secrets
from sglang_hicache.tokenizer.admin import admin_gate
from sglang_hicache.tokenizer.replies import JsonReply
from sglang_hicache.tokenizer.services import Services
from sglang_hicache.tokenizer.shown import shown_config
from sglang_hicache.wire import BreakerStatus, Incident, StatusAnswer

#: A number in a sentence.
_NUMBER = re.compile(r"\d+(\.\d+)?")


class StorageStatusRoutes:
    """GET /hicache/storage-backend, the incidents, and the layout of objects."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def status(self, request: Request) -> Response:
        """GET /hicache/storage-backend: four keys that clients know, and what each rank says of itself."""
        if refusal := admin_gate(self._services, request):
            return refusal
        control = self._services.control
        audit, state_file = control.trail.told, control.state_file
        more = {
            "startup": self._services.startup.told,
            "operation": [operation.told() for operation in control.operations.running()],
            "audit": audit,
            "audit_head": audit and audit["head"],
            "state_file": {"error": state_file.error or None} if state_file else None,
        }
        return JsonReply(await self.live_status() | more)

    async def incidents(self, request: Request) -> Response:
        """GET /hicache/incidents: what outages, refusals and a cold start have cost, oldest first."""
        if refusal := admin_gate(self._services, request):
            return refusal
        voice = _voice(await self._services.desk.status())
        if voice is None:
            return JsonReply({"error": {"message": "no rank has answered in time; try again"}}, 503)
        return JsonReply({"incidents": [_incident(incident, time.time()) for incident in voice.incidents]})

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
        voice = _voice(answers)
        attached = voice is not None and voice.backend != ""
        return {
            "hicache_storage_backend": voice.backend if attached else None,
            "hicache_storage_backend_extra_config": shown_config(voice.extra_config_json) if attached else None,
            "hicache_storage_prefetch_policy": voice.prefetch_policy or None if voice else None,
            "hicache_write_policy": voice.write_policy or None if voice else None,
            "why": _why(answers),
            "lost_tokens": voice.lost_tokens if voice else {},
            "breaker": _breaker(voice.breaker) if voice else None,
            "ranks": [_rank(rank, answer) for rank, answer in enumerate(answers)],
        }


def _voice(answers: Sequence[StatusAnswer | None]) -> StatusAnswer | None:
    """Rank 0, or the first that answers."""
    return next((answer for answer in answers if answer is not None), None)


def _breaker(breaker: BreakerStatus) -> dict[str, Any]:
    return structs.asdict(breaker) | {"reason": without_secrets(breaker.reason) or None}


def _incident(incident: Incident, now_s: float) -> dict[str, Any]:
    """With moments instead of ages: a list that is read later must not have moved."""
    told = structs.asdict(incident) | {"cause": without_secrets(incident.cause), "backend": incident.backend or None}
    began_s_ago, ended_s_ago = told.pop("began_s_ago"), told.pop("ended_s_ago")
    return told | {
        "began": utc(now_s - began_s_ago),
        "ended": None if ended_s_ago is None else utc(now_s - ended_s_ago),
        "lasted_s": round(began_s_ago - (ended_s_ago or 0.0), 3),
    }


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
        "places": [structs.asdict(place) for place in answer.places],
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
