"""`/openapi.json`, generated from the route table and from the very structs that decode the requests.

Pure.  Because nothing is written twice, the document cannot drift from what the server accepts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from sglang_hicache import __version__
from sglang_hicache.tokenizer.auth import OPEN_PATHS, AuthLevel
from sglang_hicache.tokenizer.routes import RouteSpec

_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")


def openapi_document(specs: Iterable[RouteSpec]) -> dict[str, Any]:
    """The document of a route table."""
    specs = list(specs)
    bodies = list(dict.fromkeys(spec.body for spec in specs if spec.body is not None))
    schemas, components = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(bodies, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for spec in specs:
        for path in spec.paths:
            operations = paths.setdefault(_PARAMETER.sub(r"{\1}", path), {})
            for method in spec.methods:
                operations[method.lower()] = _operation(spec, path, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "sglang-hicache", "version": __version__},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(spec: RouteSpec, path: str, schema_of: dict[type, dict[str, Any]]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": spec.summary,
        "responses": {"200": {"description": "Success"}, "default": {"description": "Refused or failed"}},
        "x-auth-level": spec.level.value,
    }
    if path not in OPEN_PATHS:
        # An empty requirement beside the key: whether a key is needed depends on how the server was started.
        operation["security"] = [{"bearer": []}] if spec.level is AuthLevel.ADMIN_FORCE else [{}, {"bearer": []}]
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PARAMETER.findall(path)
    ]
    parameters += [
        {"name": name, "in": "query", "required": False, "schema": schema} for name, schema in spec.query.items()
    ]
    if parameters:
        operation["parameters"] = parameters
    if spec.body is not None:
        content = {"application/json": {"schema": schema_of[spec.body]}}
        operation["requestBody"] = {"required": not spec.is_body_optional, "content": content}
    return operation
