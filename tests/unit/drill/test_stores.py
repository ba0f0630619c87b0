"""What a server is told of a scenario's stores."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sglang_hicache.ctl.drill.scenario import StoreTable
from sglang_hicache.ctl.drill.scenario_file import parse
from sglang_hicache.ctl.drill.stores import Store, foreign_stores, own_stores
from sglang_hicache.errors import UserError
from sglang_hicache.storage import registry
from sglang_hicache.storage.fault_control import write_faults
from sglang_hicache.storage.faulty_settings import Fault


@pytest.fixture(autouse=True)
def saboteur_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.ALLOW_FAULTY_ENV, "1")


def test_a_sabotaged_store_is_wrapped_with_the_common_keys_outside(tmp_path: Path) -> None:
    tables = {
        "main": StoreTable(
            backend="file", sabotaged=True, standby=["spare"],
            extra_config={"prefetch_threshold": 16, "fsync": "data", "fault_tolerance": {"level": "failover"}},
        ),
        "spare": StoreTable(backend="memory", extra_config={"max_size": "1MB"}),
    }  # fmt: skip
    stores = own_stores(tables, tmp_path, {})
    main = stores["main"]
    assert main.backend == "faulty"
    assert main.config == {
        "prefetch_threshold": 16,
        "inner": "file",
        "inner_config": {"fsync": "data", "file_storage_path": str(tmp_path / "pages-main")},
        "control": str(tmp_path / "faults-main.json"),
        "fault_tolerance": {
            "level": "failover", "standby": [{"backend": "memory", "extra_config": {"max_size": "1MB"}}]
        },
    }  # fmt: skip
    registry.validate_extra_config(main.backend, json.dumps(main.config))
    main.inject({"read": Fault(kind="hang")})
    assert "hang" in main.control.read_text()
    main.heal()
    assert json.loads(main.control.read_text()) == {"faults": {}}


def test_names_stand_for_ports_and_folders_wherever_a_text_is(tmp_path: Path) -> None:
    tables = {"main": StoreTable(backend="redis", extra_config={"urls": ["redis://h:{redis.port}/{x}"], "n": 3})}
    store = own_stores(tables, tmp_path, {"redis.port": "77"})["main"]
    assert store.config == {"urls": ["redis://h:77/{x}"], "n": 3}


def test_a_store_knows_itself_in_a_status_that_hides_its_secrets(tmp_path: Path) -> None:
    store = own_stores({"main": StoreTable(backend="redis", extra_config={"password": "geheim"})}, tmp_path, {})["main"]

    def status(backend: str | None, config: str | None) -> dict:
        return {"hicache_storage_backend": backend, "hicache_storage_backend_extra_config": config}

    assert store.is_attached(status("redis", '{"password": "***"}'))
    assert not store.is_attached(status("redis", "{}"))
    assert not store.is_attached(status("file", '{"password": "***"}'))
    assert not store.is_attached(status(None, None))


def _foreign(control: Path, *steps: str) -> dict[str, Store]:
    """The stores of a drill with these steps, as a server tells them that has a saboteur around its store."""
    timeline = "".join(f"\n[[timeline]]\n{step}\n" for step in steps)
    head = 'name = "x"\nabout = ""\nserver.store = "main"\nstores.main = {backend = "memory", sabotaged = true}'
    told = {"hicache_storage_backend": "faulty", "hicache_storage_backend_extra_config": "{}"}
    return foreign_stores(parse(head + timeline), told | {"ranks": [{"backend_info": {"control": str(control)}}] * 2})


def test_a_file_that_is_no_control_file_is_not_overwritten_whatever_a_server_says(tmp_path: Path) -> None:
    control = tmp_path / "control.json"
    fault = 'do = "fault"\nstore = "main"\nfaults.read.kind = "error"'
    assert _foreign(control, fault)["main"].control == control
    write_faults(control, {})
    assert _foreign(control, fault)["main"].control == control
    control.write_text("ssh-ed25519 AAAA me\n")
    for step in (fault, 'do = "heal"\nstore = "main"', 'do = "kill"'):
        with pytest.raises(UserError, match="but it is none, and is left as it is"):
            _foreign(control, step)
    control.unlink()
    os.mkfifo(control)
    with pytest.raises(UserError, match="no regular file"):
        _foreign(control, fault)


def test_a_drill_without_faults_takes_none_away(tmp_path: Path) -> None:
    control = tmp_path / "control.json"
    control.write_text("mine")
    for store in _foreign(control, 'do = "detach"').values():
        store.heal()
    assert control.read_text() == "mine"
