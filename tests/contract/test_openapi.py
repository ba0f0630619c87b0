"""/openapi.json says what the server really accepts."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_hicache.tokenizer.api import AttachBody, DetachBody, GenerateBody, SamplingBody
from tests.contract.fake_server import ADMIN, FakeServer


@pytest.fixture
def document(server: FakeServer) -> Any:
    return server.call("GET", "/openapi.json").json()


def test_every_route_answers_as_described(server: FakeServer, document: Any) -> None:
    """No path of the document is a 404, and a method that it does not name is a 405."""
    known = server.call("POST", "/flush_cache", headers=ADMIN).headers["X-HiCache-Operation"]
    for path, operations in document["paths"].items():
        concrete = path.replace("{model}", "org/tiny").replace("{id}", known)
        for method in operations:
            assert server.call(method.upper(), concrete).status_code not in (404, 405), (method, path)
        assert server.call("PATCH", concrete).status_code in (401, 405), path


def test_bodies_are_the_structs_that_decode(document: Any) -> None:
    schemas = document["components"]["schemas"]
    assert set(schemas["GenerateBody"]["properties"]) == set(GenerateBody.__struct_fields__)
    assert set(schemas["SamplingBody"]["properties"]) == set(SamplingBody.__struct_fields__)
    assert schemas["SamplingBody"]["additionalProperties"] is False
    assert set(schemas["AttachBody"]["properties"]) == set(AttachBody.__struct_encode_fields__)
    assert set(schemas["DetachBody"]["properties"]) == set(DetachBody.__struct_encode_fields__)
    assert schemas["AttachBody"]["required"] == ["hicache_storage_backend"]


def test_references_lead_somewhere(document: Any) -> None:
    def references(node: Any) -> list[str]:
        if isinstance(node, list):
            return [found for item in node for found in references(item)]
        if not isinstance(node, dict):
            return []
        own = [node["$ref"]] if "$ref" in node else []
        return own + [found for item in node.values() for found in references(item)]

    names = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    found = references(document)
    assert found and set(found) <= names


def test_levels_are_told(document: Any) -> None:
    assert document["paths"]["/generate"]["post"]["x-auth-level"] == "normal"
    assert document["paths"]["/hicache/storage-backend"]["put"]["x-auth-level"] == "admin_optional"
    assert "security" not in document["paths"]["/health"]["get"]


ROUTES_OF_THE_CONTRACT = """
    POST /generate, PUT /generate, POST /abort_request,
    POST /v1/completions, POST /v1/chat/completions, GET /v1/models, GET /v1/models/{model},
    GET /health, GET /health_generate, GET /ready, GET /ping,
    GET /server_info, GET /get_server_info, GET /model_info, GET /get_model_info,
    GET /flush_cache, POST /flush_cache, POST /update_weights_from_disk,
    GET /get_hicache_l3_cache_layout,
    PUT /hicache/storage-backend, GET /hicache/storage-backend, DELETE /hicache/storage-backend,
    POST /hicache/storage-backend/clear, POST /clear_hicache_storage_backend,
    GET /hicache/operations, GET /hicache/operations/{id}, DELETE /hicache/operations/{id}, GET /hicache/incidents
"""


@pytest.mark.parametrize("route", [route.strip() for route in ROUTES_OF_THE_CONTRACT.split(",")])
def test_route_exists(document: Any, route: str) -> None:
    method, path = route.split()
    assert method.lower() in document["paths"][path]
