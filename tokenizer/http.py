"""The HTTP application: the route table, the health routes, and the app made of both.

`build_app` is called once by the process; the handlers run on its event loop.  What a route does is in the room
of its family (`generate`, `openai`, `admin`, `info`); here is only which route there is, and whether the server
is well.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from sglang_hicache.tokenizer.admin import AdminRoutes
from sglang_hicache.tokenizer.admin_operations import OperationRoutes
from sglang_hicache.tokenizer.admin_status import StorageStatusRoutes
from sglang_hicache.tokenizer.api import AbortBody, AttachBody, DetachBody, GenerateBody, UpdateWeightsBody
from sglang_hicache.tokenizer.api_openai import ChatBody, CompletionBody
from sglang_hicache.tokenizer.auth import AuthLevel, AuthMiddleware
from sglang_hicache.tokenizer.generate import NativeRoutes
from sglang_hicache.tokenizer.http_limits import BodyLimit
from sglang_hicache.tokenizer.info import InfoRoutes
from sglang_hicache.tokenizer.metrics import MetricsRoutes, metrics_off
from sglang_hicache.tokenizer.openai import OpenAIRoutes
from sglang_hicache.tokenizer.openapi import openapi_document
from sglang_hicache.tokenizer.orders import MODES
from sglang_hicache.tokenizer.replies import JsonReply, text_reply
from sglang_hicache.tokenizer.routes import RouteSpec
from sglang_hicache.tokenizer.services import Services
from sglang_hicache.tokenizer.weights import WeightsRoutes

log = logging.getLogger(__name__)

#: Seconds that a health probe may take.
HEALTH_TIMEOUT_ENV = "SGLANG_HEALTH_CHECK_TIMEOUT"
HEALTH_TIMEOUT_S = 20.0
#: "false": /health answers without asking the scheduler (then only /health_generate does).
HEALTH_GENERATION_ENV = "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"

GET, POST, PUT, DELETE = "GET", "POST", "PUT", "DELETE"

#: JSON schemas of query parameters.
_SECONDS: dict[str, Any] = {"type": "number", "minimum": 0}
_FLAG: dict[str, Any] = {"type": "boolean", "default": False}
_MODE: dict[str, Any] = {"type": "string", "enum": list(MODES), "default": MODES[0]}


class HealthRoutes:
    """Is it up, does it answer?"""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._timeout_s = float(os.environ.get(HEALTH_TIMEOUT_ENV, HEALTH_TIMEOUT_S))
        self._asks_scheduler = os.environ.get(HEALTH_GENERATION_ENV, "true").lower() not in ("false", "0", "no")

    async def health(self, request: Request) -> Response:
        """GET /health: up, and (unless switched off) the scheduler answers."""
        if obstacle := self._services.lifecycle.obstacle():
            return text_reply(obstacle, 503)
        return await self._probe() if self._asks_scheduler else Response(status_code=200)

    async def health_generate(self, request: Request) -> Response:
        """GET /health_generate: the scheduler answers."""
        if obstacle := self._services.lifecycle.obstacle():
            return text_reply(obstacle, 503)
        return await self._probe()

    async def ready(self, request: Request) -> Response:
        """GET /ready and /ping: requests are taken."""
        obstacle = self._services.lifecycle.obstacle()
        return text_reply(obstacle, 503) if obstacle else Response(status_code=200)

    async def _probe(self) -> Response:
        if await self._services.requests.probe(self._timeout_s):
            # What arrived may be the news that it fails.
            obstacle = self._services.lifecycle.obstacle()
            return text_reply(obstacle, 503) if obstacle else Response(status_code=200)
        log.warning("the scheduler has not answered a health probe within %g s", self._timeout_s)
        return text_reply(f"the scheduler has not answered within {self._timeout_s:g} s", 503)


def route_table(services: Services) -> list[RouteSpec]:
    """Every route of the server but /openapi.json, which is made from it."""
    native, openai, health = NativeRoutes(services), OpenAIRoutes(services), HealthRoutes(services)
    info, weights = InfoRoutes(services, StorageStatusRoutes(services)), WeightsRoutes(services)
    optional = AuthLevel.ADMIN_OPTIONAL
    metrics = [RouteSpec(("/metrics",), (GET,), MetricsRoutes(services).metrics, "Metrics, for Prometheus")]
    return (metrics if services.config.http.enable_metrics else []) + [
        RouteSpec(("/generate",), (POST, PUT), native.generate, "Generate from a prompt", body=GenerateBody),
        RouteSpec(("/abort_request",), (POST,), native.abort_request, "End requests", optional, AbortBody),
        RouteSpec(("/v1/completions",), (POST,), openai.completions, "OpenAI completions", body=CompletionBody),
        RouteSpec(("/v1/chat/completions",), (POST,), openai.chat_completions, "OpenAI chat", body=ChatBody),
        RouteSpec(("/v1/models",), (GET,), openai.models, "The served model, as a list"),
        RouteSpec(("/v1/models/{model:path}",), (GET,), openai.model, "The served model"),
        RouteSpec(("/health",), (GET,), health.health, "Does the server answer?"),
        RouteSpec(("/health_generate",), (GET,), health.health_generate, "Does the scheduler answer?"),
        RouteSpec(("/ready", "/ping"), (GET,), health.ready, "Are requests taken?"),
        RouteSpec(("/server_info", "/get_server_info"), (GET,), info.server_info, "Configuration and live state"),
        RouteSpec(("/model_info", "/get_model_info"), (GET,), info.model_info, "Facts about the model"),
        RouteSpec(
            ("/update_weights_from_disk",), (POST,), weights.update_from_disk, "Serve other weights", optional,
            UpdateWeightsBody, change="update_weights",
        ),  # fmt: skip
        *_storage_routes(services),
    ]


def _storage_routes(services: Services) -> list[RouteSpec]:
    """What is about L3, and about operations."""
    admin, storage, operations = AdminRoutes(services), StorageStatusRoutes(services), OperationRoutes(services)
    optional = AuthLevel.ADMIN_OPTIONAL
    backend, operation = ("/hicache/storage-backend",), ("/hicache/operations/{id}",)
    clear = ("/hicache/storage-backend/clear", "/clear_hicache_storage_backend")
    return [
        RouteSpec(
            ("/flush_cache",), (GET, POST), admin.flush_cache, "Empty L1 and L2, and L3 if asked", optional,
            change="flush",
            query={"timeout": _SECONDS | {"default": 0}, "keep_storage": {"type": "boolean", "default": True}},
        ),  # fmt: skip
        RouteSpec(
            backend, (PUT,), admin.attach, "Attach a storage, switch to it, or try it out", optional, AttachBody,
            change="attach",
        ),  # fmt: skip
        RouteSpec(backend, (GET,), storage.status, "What is attached, by rank", optional),
        RouteSpec(
            backend, (DELETE,), admin.detach, "Detach the storage", optional, DetachBody, is_body_optional=True,
            change="detach",
            query={"mode": _MODE, "timeout_s": _SECONDS, "force": _FLAG, "async": _FLAG},
        ),  # fmt: skip
        RouteSpec(clear, (POST,), admin.clear, "Delete this server's pages from the storage", optional, change="clear"),
        RouteSpec(("/hicache/operations",), (GET,), operations.operations, "The latest operations", optional),
        RouteSpec(operation, (GET,), operations.operation, "One operation", optional),
        RouteSpec(operation, (DELETE,), operations.cancel, "Give an operation up", optional, change="cancel"),
        RouteSpec(("/hicache/incidents",), (GET,), storage.incidents, "What outages have cost", optional),
        RouteSpec(("/get_hicache_l3_cache_layout",), (GET,), storage.l3_layout, "Object layout of the storage"),
    ]


def build_app(services: Services) -> Starlette:
    """The ASGI application."""
    specs = route_table(services)
    document = openapi_document(specs)

    async def openapi(request: Request) -> Response:
        return JsonReply(document)

    specs.append(RouteSpec(("/openapi.json",), (GET,), openapi, "This document"))
    if not services.config.http.enable_metrics:
        specs.append(RouteSpec(("/metrics",), (GET,), metrics_off, "How to switch metrics on"))
    book = _RouteBook(specs)
    trail, keys = services.control.trail, services.config.http

    def refused(scope: Scope, why: str) -> None:
        spec = book.find(scope)
        if spec is not None and spec.change:
            trail.refused(trail.caller(scope), spec.change, why)

    return Starlette(
        routes=[route for route, _ in book.routes],
        middleware=[
            Middleware(
                AuthMiddleware,
                level_of=book.level_of,
                api_key=keys.api_key,
                admin_api_key=keys.admin_api_key,
                refused=refused,
            ),
            Middleware(BodyLimit, most_bytes=keys.max_body_bytes),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _defect},
    )


class _RouteBook:
    """Which route a request is for, before the router has been asked."""

    def __init__(self, specs: list[RouteSpec]) -> None:
        self.routes = [
            (Route(path, spec.endpoint, methods=spec.methods), spec) for spec in specs for path in spec.paths
        ]

    def find(self, scope: Scope) -> RouteSpec | None:
        """The route; for a path that exists with other methods only (405) one of those."""
        partial = None
        for route, spec in self.routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return spec
            if match is Match.PARTIAL:
                partial = spec
        return partial

    def level_of(self, scope: Scope) -> AuthLevel:
        """A path that no route knows needs the ordinary key."""
        spec = self.find(scope)
        return spec.level if spec is not None else AuthLevel.NORMAL


async def _http_error(request: Request, error: HTTPException) -> Response:
    """404 and 405, as JSON."""
    reply = JsonReply(
        {"error": {"message": f"{error.detail}: {request.method} {request.scope['path']}"}}, error.status_code
    )
    for name, value in (error.headers or {}).items():
        reply.headers[name] = value
    return reply


async def _defect(request: Request, error: Exception) -> Response:
    """Anything a handler did not foresee: the log has the traceback, the client learns nothing of the inside."""
    return JsonReply({"error": {"message": "internal error; the server's log has the details"}}, 500)
