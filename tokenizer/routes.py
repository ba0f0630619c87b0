"""One line per route: where it is, who may call it, which struct decodes it, who answers.

The app, the auth middleware and `/openapi.json` are all made from this table, so a route cannot exist without a
level.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sglang_hicache.tokenizer.api import RequestBody
from sglang_hicache.tokenizer.auth import AuthLevel

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class RouteSpec:
    """One route; `paths` after the first are aliases for older clients."""

    paths: tuple[str, ...]
    methods: tuple[str, ...]
    endpoint: Endpoint
    summary: str
    level: AuthLevel = AuthLevel.NORMAL
    body: type[RequestBody] | None = None
    #: All fields of the body have defaults, and so has the body.
    is_body_optional: bool = False
    #: What it changes, in the words of the audit log; "": nothing that an operator would want to know of.
    change: str = ""
    #: Query parameters and their JSON schemas.
    query: Mapping[str, dict[str, Any]] = field(default_factory=dict)
