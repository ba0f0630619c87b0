"""Classes that a config names: over HTTP only those on the list of the server, and nothing is imported to find out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from sglang_hicache import wire
from sglang_hicache.storage import registry
from sglang_hicache.storage.dynamic_settings import ALIASES
from tests.contract.fake_server import ADMIN, FakeServer, make_config
from tests.contract.test_state_file import Ranks, attach

PATH = "/hicache/storage-backend"
MODULE = "this_module_is_imported_by_nobody"
PLUG_IN = {"backend_name": "mine", "module_path": MODULE, "class_name": "Store", "address": "10.0.0.1"}
EIC = "sglang.srt.mem_cache.storage.eic.eic_storage:EICStorage"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that could be imported, and leaves a file behind if it is."""
    trace = tmp_path / "imported"
    code = f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nclass Store:\n    pass\n"
    (tmp_path / f"{MODULE}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(registry.ALLOW_FAULTY_ENV, "1")
    return trace


@pytest.fixture
def serve(model: Path) -> Iterator[Any]:
    """Starts servers with a list, one after the other."""
    servers: list[FakeServer] = []

    def start(*allowed: str, **storage: Any) -> FakeServer:
        while servers:
            servers.pop().close()
        config = make_config(model)
        changed = structs.replace(config.storage, plug_ins=allowed, **storage)
        servers.append(FakeServer(structs.replace(config, storage=changed)))
        servers[-1].answer_command = lambda rank, command: (True, "done")
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def put(server: FakeServer, backend: str, config: dict[str, Any] | None, **body: Any) -> Any:
    text = None if config is None else json.dumps(config)
    body |= {"hicache_storage_backend": backend, "hicache_storage_backend_extra_config_json": text}
    return server.call("PUT", PATH, json=body, headers=ADMIN)


STANDBY = {"level": "failover", "standby": [{"backend": "dynamic", "extra_config": PLUG_IN}]}
#: Backend, extra config, and what else is in the body.
WAYS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "attach": ("dynamic", PLUG_IN, {}),
    "switch": ("dynamic", PLUG_IN, {"switch": True, "mode": "force"}),
    "dry run": ("dynamic", PLUG_IN, {"dry_run": True}),
    "standby": ("file", {"fault_tolerance": STANDBY}, {}),
    "standby of a dry run": ("file", {"fault_tolerance": STANDBY}, {"dry_run": True}),
    "inside": ("faulty", {"inner": "dynamic", "inner_config": PLUG_IN}, {}),
    "tier": (
        "tiered", {"tiers": [{"backend": "memory"}, {"backend": "dynamic", "extra_config": PLUG_IN}]}, {},
    ),
    "standby inside": (
        "memory",
        {"fault_tolerance": {"level": "failover", "standby": [
            {"backend": "faulty", "extra_config": {"inner": "dynamic", "inner_config": PLUG_IN}}]}},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_fm61_a_class_that_is_not_on_the_list_is_refused_and_not_imported(way: str, serve: Any, module: Path) -> None:
    """1. Somebody who may attach names a module of his own. 2. Importing it would run his code in the server."""
    backend, config, body = WAYS[way]
    server = serve("another.module:Store", f"{MODULE}:Other")
    reply = put(server, backend, config, **body)
    assert reply.status_code == 400, reply.text
    assert f"--hicache-allow-dynamic-backend {MODULE}:Store" in reply.text
    assert not server.sent
    assert not module.exists() and MODULE not in sys.modules


@pytest.mark.parametrize("way", WAYS)
def test_a_class_that_is_on_the_list_reaches_the_ranks_and_is_not_imported_here(
    way: str, serve: Any, module: Path
) -> None:
    backend, config, body = WAYS[way]
    server = serve(f"{MODULE}:Store")
    put(server, backend, config, **body)
    sent = [command for _, command in server.sent]
    assert len(sent) == 2 and {type(command) for command in sent} <= {wire.AttachStorage, wire.DryRunStorage}
    assert json.loads(sent[0].extra_config_json) == config
    assert not module.exists() and MODULE not in sys.modules


def test_fm61_names_of_plug_ins_are_held_to_the_list_as_well(serve: Any) -> None:
    for name, alias in ALIASES.items():
        assert f"{alias.module_path}:{alias.class_name}" in put(serve(), name, None).text
    server = serve(EIC)
    assert put(server, "eic", None).status_code == 200
    # The same class, as a class: what counts is what would be loaded.
    module, name = EIC.split(":")
    assert put(server, "dynamic", PLUG_IN | {"module_path": module, "class_name": name}).status_code == 200
    reply = put(server, "nixl", {})
    assert reply.status_code == 400 and "HiCacheNixl" in reply.text
    inside = {"backend": "mirror", "extra_config": {"copies": [{"backend": "memory"}, {"backend": "nixl"}]}}
    standby = {"fault_tolerance": {"level": "failover", "standby": [inside]}}
    for backend, config in (("tiered", {"tiers": [{"backend": "memory"}, inside]}), ("file", standby)):
        reply = put(server, backend, config)
        assert reply.status_code == 400 and "HiCacheNixl" in reply.text


def test_fm61_a_name_cannot_be_given_another_class(serve: Any) -> None:
    reply = put(serve(EIC), "eic", {"module_path": MODULE, "class_name": "Store"})
    assert reply.status_code == 400
    assert "module_path: the backend 'eic' stands for 'sglang.srt.mem_cache.storage.eic.eic_storage'" in reply.text


def test_fm61_a_state_file_that_names_a_class_is_held_to_the_list(serve: Any, tmp_path: Path, module: Path) -> None:
    path = tmp_path / "state.json"
    first = serve(f"{MODULE}:Store", state_file=str(path))
    Ranks(first)
    assert put(first, "dynamic", PLUG_IN).status_code == 200
    assert MODULE in path.read_text(encoding="utf-8")
    assert [command.backend for command in attach(serve(f"{MODULE}:Store", state_file=str(path)))] == ["dynamic"] * 2
    refused = serve(state_file=str(path))
    assert attach(refused) == []
    assert f"--hicache-allow-dynamic-backend {MODULE}:Store" in refused.startup.warning
    assert not module.exists()


def test_what_is_refused_says_no_secret(serve: Any) -> None:
    reply = put(serve(), "dynamic", PLUG_IN | {"password": "correct horse"})
    assert reply.status_code == 400 and "horse" not in reply.text
