"""Plug-ins of every generation: they keep the contract, and what they get to see."""

from __future__ import annotations

import importlib.metadata
import json
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache.errors import StorageError, UserError
from sglang_hicache.storage import plugin_modules, registry
from sglang_hicache.storage.backend import OpenContext, PageResult
from sglang_hicache.storage.checked import CheckedStore
from sglang_hicache.storage.conformance import (
    CHECKS,
    Make,
    check_clear_is_confined,
    check_readers_see_whole_pages,
    check_round_trip,
)
from sglang_hicache.storage.conformance_faults import SABOTAGES, check_damage_at_every_byte, check_sabotaged
from sglang_hicache.storage.diagnosis import diagnose
from sglang_hicache.storage.dynamic import DynamicBackend
from sglang_hicache.storage.dynamic_settings import ALIASES, DynamicSettings
from sglang_hicache.storage.encryption import AesGcm
from sglang_hicache.storage.page_format import WRITE_CHUNK_BYTES, IncomingPage
from sglang_hicache.storage.plugin_pool import StagingPool
from sglang_hicache.workers.storage_lanes import BATCH_BYTES, BATCH_PAGES
from tests.house.source import ROOT
from tests.storage import pages
from tests.storage.plugins.shelf import SHELVES

HOME = "tests.storage.plugins"
V0, V1, V2 = {}, {"interface_v1": 1}, {"interface_v2": True}
#: Checks with pages larger than those of other tests.
LARGE = (check_round_trip, check_readers_see_whole_pages)
PLUG_INS: dict[str, dict[str, Any]] = {
    "copies": {"module_path": f"{HOME}.copies", "class_name": "Copies"},
    "deleting": {"module_path": f"{HOME}.copies", "class_name": "Deleting"},
    "one-by-one": {"module_path": f"{HOME}.copies", "class_name": "OneByOne"},
    "keeping": {"module_path": f"{HOME}.copies", "class_name": "Keeping"},
    "pointers": {"module_path": f"{HOME}.slots", "class_name": "Pointers", **V1},
    "pages": {"module_path": f"{HOME}.slots", "class_name": "Pages", "constructor": "config_pool", **V1},
    "named-pools": {"module_path": f"{HOME}.slots", "class_name": "NamedPools", **V2},
}


def made(which: str, page_bytes: int = pages.PAGE_BYTES, **config: Any) -> DynamicBackend:
    """A plug-in by the registry, not open; on a shelf of its own unless one is named."""
    config = {"backend_name": which, "shelf": secrets.token_hex(8)} | PLUG_INS.get(which, {}) | config
    _, settings = registry.validate_extra_config("dynamic", json.dumps(config))
    context = OpenContext(rank=3, namespace=pages.NAMESPACE, page_bytes=page_bytes, tp_size=4, model_name="org/m")
    backend = registry.create("dynamic", settings, context)
    assert isinstance(backend, DynamicBackend)
    return backend


def maker(which: str, page_bytes: int = pages.PAGE_BYTES, **config: Any) -> Make:
    """Over the same shelf each time."""
    shelf = secrets.token_hex(8)
    return lambda: made(which, page_bytes, shelf=shelf, **config)


def instance(backend: DynamicBackend) -> Any:
    """The plug-in itself."""
    return backend._plug_in._instance


@pytest.fixture
def opened() -> Any:
    """Opens plug-ins and closes them after the test."""
    backends: list[DynamicBackend] = []

    def open_one(which: str, **config: Any) -> DynamicBackend:
        backends.append(made(which, **config))
        backends[-1].open_blocking()
        return backends[-1]

    yield open_one
    for backend in backends:
        backend.close_blocking()
    SHELVES.clear()


@pytest.mark.parametrize("which", PLUG_INS)
@pytest.mark.parametrize("check", [c for c in CHECKS if c is not check_clear_is_confined], ids=lambda c: c.__name__)
def test_a_plug_in_keeps_the_contract(check: Callable[[Make], None], which: str) -> None:
    check(maker(which, WRITE_CHUNK_BYTES + 1 if check in LARGE else pages.PAGE_BYTES))


@pytest.mark.parametrize("which", ["copies", "deleting", "keeping", "pointers", "named-pools"])
@pytest.mark.parametrize(("call", "kind"), SABOTAGES)
def test_a_saboteur_around_a_plug_in_costs_pages_and_nothing_else(which: str, call: str, kind: str) -> None:
    check_sabotaged(maker(which, clear_all=True), call, kind)


@pytest.mark.parametrize("which", ["copies", "pointers"])
def test_encrypted_pages_go_through_a_plug_in(which: str) -> None:
    check_sabotaged(maker(which, clear_all=True), "write", "flip", AesGcm(b"k" * 32))


@pytest.mark.parametrize("which", ["copies", "pointers"])
def test_damage_at_any_byte_of_a_plug_in_is_a_miss(which: str) -> None:
    check_damage_at_every_byte(maker(which))


def test_values_are_whole_pages_of_one_size_under_keys_like_those_of_sglang(opened: Any) -> None:
    backend = opened("pointers", shelf="values")
    store, keys = pages.store(backend), pages.keys(3)
    assert store.write_blocking(keys, [pages.content(n) for n in range(3)], b"", 0).pages == 3
    small = CheckedStore(backend, pages.layout(size=16))
    assert small.write_blocking([pages.key(9)], [pages.content(9, 16)], b"", 0).pages == 1
    values = SHELVES["values"]
    assert {len(value) for value in values.values()} == {8192}  # header and page, up to the next 4096
    assert all(len(key) == 64 and int(key, 16) for key in values)
    assert all(value.startswith(b"HICPAGE\n") for value in values.values())
    assert [not any(value[256 + 4096 :]) for value in values.values()] == [True] * 4
    again = opened("copies", shelf="values")  # another generation finds what the first one wrote
    assert pages.store(again).lookup_blocking(keys) == 3


def test_what_it_cannot_do_at_the_end_is_told_to_the_log_only(caplog: pytest.LogCaptureFixture) -> None:
    backend = made("x", module_path=f"{HOME}.shapes", class_name="NotClosed", **V1)
    backend.open_blocking()
    backend.close_blocking()
    assert "raised in close: it is not written" in caplog.text
    SHELVES.clear()


def test_a_method_that_is_there_some_of_the_time_is_a_fault_like_any_other(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened("x", module_path=f"{HOME}.shapes", class_name="Moody", **V1)
    store = pages.store(backend)
    store.write_blocking(pages.keys(1), [pages.content(1)], b"", 0)
    monkeypatch.setattr(type(instance(backend)), "is_well", False)
    assert store.read_blocking(pages.keys(1), pages.empty(1)).reason.startswith("io: the plug-in")
    assert backend.stats()["raised_calls"] == 3


@pytest.mark.parametrize("page_bytes", [1 << 20, 1 << 18, 64])
def test_a_batch_of_a_lane_goes_in_one_part(page_bytes: int) -> None:
    """A page more would be a call of its own, one for each batch."""
    pool = StagingPool(page_bytes)
    assert pool.slots == min(BATCH_PAGES, BATCH_BYTES // page_bytes)
    pool.close()


def test_parts_that_went_well_before_one_that_failed_count(opened: Any) -> None:
    backend = opened("pointers")
    store, keys = pages.store(backend), pages.keys(300)
    contents = [pages.content(n) for n in range(300)]
    plug_in, calls = instance(backend), []

    def fail_from_the_second_on(transfer: Any) -> Any:
        def transferred(*args: Any) -> Any:
            calls.append(len(args[0]))
            return transfer(*args) if len(calls) == 1 else None

        return transferred

    plug_in.batch_set_v1 = fail_from_the_second_on(plug_in.batch_set_v1)
    assert store.write_blocking(keys, contents, b"", 0).pages == 128 and calls == [128, 128]
    del plug_in.batch_set_v1
    assert store.write_blocking(keys, contents, b"", 0).pages == 300
    calls.clear()
    plug_in.batch_get_v1 = fail_from_the_second_on(plug_in.batch_get_v1)
    assert store.read_blocking(keys, pages.empty(300)).pages == 128 and calls == [128, 128]


def test_batches_longer_than_the_pool_go_in_parts(opened: Any) -> None:
    for which in ("copies", "pointers", "named-pools"):
        backend = opened(which)
        store, keys = pages.store(backend), pages.keys(300)
        targets = pages.empty(300)
        contents = [pages.content(n) for n in range(300)]
        assert store.write_blocking(keys, contents, b"", 0).pages == 300
        assert store.read_blocking(keys, targets).pages == 300
        assert targets == contents


def test_what_is_there_is_not_sent_again(opened: Any) -> None:
    backend = opened("pointers")
    store, keys = pages.store(backend), pages.keys(4)
    contents = [pages.content(n) for n in range(4)]
    store.write_blocking(keys[:2], contents[:2], b"", 0)
    instance(backend)._save = lambda *_: pytest.fail("sent again")
    assert store.write_blocking(keys[:2], contents[:2], b"", 0).pages == 2
    assert (store.counters.get("written_pages"), store.counters.get("present_pages")) == (2, 2)


def test_a_plug_in_is_told_that_it_serves_one_rank_of_one(opened: Any) -> None:
    config = instance(opened("copies", node="${rank}", backend_name="mine", allocator="shm")).config
    assert (config.tp_rank, config.tp_size, config.pp_rank, config.pp_size) == (0, 1, 0, 1)
    assert (config.attn_cp_rank, config.attn_cp_size, config.dp_rank, config.dcp_size) == (0, 1, 0, 1)
    assert config.is_mla_model and config.is_page_first_layout and config.is_storage_writer
    assert not config.enable_storage_metrics and config.model_name == "org/m"
    extra = config.extra_config
    assert {"node", "shelf", "backend_name", "module_path", "class_name", "interface_v1", "allocator"} == extra.keys()
    assert (extra["backend_name"], extra["allocator"], extra["class_name"]) == ("mine", "shm", "Copies")


def test_pools_are_registered_in_order(opened: Any) -> None:
    plug_in = instance(opened("named-pools"))
    assert plug_in.events == ["anchor", "kv", "registered"]
    assert plug_in.registered_pools == {"kv": plug_in.mem_pool_host}
    backend = opened("pointers")
    events = instance(backend).events
    assert events == ["anchor", "registered"]
    backend.close_blocking()
    assert events == ["anchor", "registered", "closed"]


@pytest.mark.parametrize("shape", ["config_kwargs", "config", "config_pool", "env_config"])
def test_constructor_shapes(shape: str, opened: Any) -> None:
    classes = {"config_kwargs": "Kwargs", "config": "Config", "config_pool": "Pool", "env_config": "Env"}
    backend = opened("x", module_path=f"{HOME}.shapes", class_name=classes[shape], constructor=shape, own=5, **V1)
    made_of, shelf = instance(backend).made, instance(backend).config.extra_config["shelf"]
    pool, config = instance(backend).mem_pool_host, instance(backend).config
    expected = {
        "config_kwargs": (config, {"shelf": shelf, "own": 5}),
        "config": (config,),
        "config_pool": (config, pool),
        "env_config": (8192, pool.dtype, config),
    }
    assert made_of == expected[shape]


def test_the_pool_says_of_itself_what_sglangs_says(opened: Any) -> None:
    pool = instance(opened("pointers")).mem_pool_host
    pointers, sizes = pool.get_page_buffer_meta(pool.indices(range(2)))
    assert sizes == [8192, 8192] and pointers[1] - pointers[0] == 8192
    assert pointers[0] == pool.kv_buffer.data_ptr() == pool.get_data_page(0).data_ptr()
    assert pool.kv_buffer.numel() == pool.size * 8192 == sum(one.numel() for one in pool.get_hybrid_pool_buffer())
    assert {pool.get_ksize_per_token(), pool.get_size_per_token(), pool.size_per_token} == {8192}
    assert pool.get_page_buffer_element_size() == 8192
    assert pool.is_stride_page_aligned(4096) and not pool.is_stride_page_aligned(16384)


@pytest.mark.parametrize(
    ("plug_in", "complaint", "code"),
    [
        ("nowhere:Class", r"the plug-in nowhere needs 'nowhere'.*PYTHONPATH", "missing_library"),
        (f"{HOME}.shapes:Nothing", "has no class Nothing", "bad_config"),
        (f"{HOME}.shapes:NOT_A_CLASS", "has no class NOT_A_CLASS", "bad_config"),
        (f"{HOME}.quits:Store", "ends the process that imports it", "other"),
        (f"{HOME}.breaks:Store", r"breaks cannot be imported: FileNotFoundError: .* libmine.so", "not_found"),
        (f"{HOME}.shapes:NotWritten", r"cannot be made: it is not written \(next release\)", "contract"),
        (f"{HOME}.shapes:NotRegistered", "on_host_pools_registered: it is not written", "contract"),
        (f"{HOME}.shapes:Bare", "has no set, which the interface v0 needs", "bad_config"),
        (f"{HOME}.shapes:Unmakeable", "cannot be made: ConnectionRefusedError", "refused"),
        (f"{HOME}.shapes:Unready", "wants another page size", "other"),
    ],
)
def test_what_cannot_be_loaded_says_why(plug_in: str, complaint: str, code: str) -> None:
    module, name = plug_in.split(":")
    backend = made("x", module_path=module, class_name=name)
    with pytest.raises(StorageError, match=complaint) as caught:
        backend.open_blocking()
    assert diagnose(caught.value, "dynamic").code == code
    backend.close_blocking()


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"module_path": "m", "class_name": "C"}, "missing required field `backend_name`"),
        ({"backend_name": "b", "class_name": "C"}, "missing required field `module_path`"),
        ({"backend_name": "b", "module_path": "m"}, "missing required field `class_name`"),
        ({"backend_name": "b", "module_path": "${env.X}", "class_name": "C"}, "is no dotted name of a module"),
        ({"backend_name": "b", "module_path": "m", "class_name": "C${rank}"}, "is no name of a class"),
        ({"backend_name": "${rank}", "module_path": "m", "class_name": "C"}, "takes no placeholder"),
        ({"backend_name": "b", "module_path": "../m", "class_name": "C"}, "is no dotted name of a module"),
        ({"backend_name": "b", "module_path": "m", "class_name": "C", "allocator": "gpu"}, "'default' or 'shm'"),
        ({"backend_name": "b", "module_path": "m", "class_name": "C", "interface_v1": 1, "interface_v2": 1}, "exclude"),
        ({"backend_name": "b", "module_path": "m", "class_name": "C", "constructor": "x"}, "Invalid enum value 'x'"),
    ],
)
def test_configs_are_refused_with_what_is_allowed(config: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        registry.validate_extra_config("dynamic", json.dumps(config))


# ---- what has no method in the interface


def test_a_page_that_must_go_where_nothing_can_be_deleted_gets_another_key(opened: Any) -> None:
    backend = opened("copies", shelf="hiding")
    store, keys = pages.store(backend), pages.keys(2)
    contents = [pages.content(n) for n in range(2)]
    store.write_blocking(keys, contents, b"", 0)
    name = pages.layout().name(keys[0])
    assert backend.delete_blocking([name]) == 1
    assert len(SHELVES["hiding"]) == 2 and backend.stats()["hidden_pages"] == 1
    assert backend.exists_blocking([name]) == 0 and backend.delete_blocking([name]) == 0
    assert store.read_blocking(keys, pages.empty(2)).pages == 0
    assert backend.info()["deletes"].startswith("no")
    assert store.write_blocking(keys, contents, b"", 0).pages == 2
    assert store.read_blocking(keys, pages.empty(2)).pages == 2 and len(SHELVES["hiding"]) == 3


def test_a_page_damaged_in_a_plug_in_that_keeps_what_it_has_is_written_again_for_everybody(opened: Any) -> None:
    """1. A page is damaged where it lies. 2. The plug-in neither deletes nor overwrites. 3. One process writes the page
    anew. 4. Every other one reads the damage once, and then finds the new page."""
    first, second = opened("keeping", shelf="keeping"), opened("keeping", shelf="keeping")
    keys, contents = pages.keys(1), [pages.content(1)]
    pages.store(first).write_blocking(keys, contents, b"", 0)
    (value,) = SHELVES["keeping"].values()
    value[300] ^= 1
    store = pages.store(first)
    assert store.read_blocking(keys, pages.empty(1)).corrupt == 1
    assert store.lookup_blocking(keys) == 0
    assert store.write_blocking(keys, contents, b"", 0).pages == 1
    assert store.read_blocking(keys, pages.empty(1)).pages == 1
    other, target = pages.store(second), pages.empty(1)
    assert other.read_blocking(keys, target).corrupt == 1
    assert other.lookup_blocking(keys) == 1
    assert other.read_blocking(keys, target).pages == 1 and target == contents


def test_a_page_is_gone_where_it_can_be_deleted(opened: Any) -> None:
    for which in ("deleting", "one-by-one", "pointers"):
        backend = opened(which, shelf=which)
        pages.store(backend).write_blocking(pages.keys(2), [pages.content(n) for n in range(2)], b"", 0)
        assert backend.delete_blocking([pages.layout().name(key) for key in pages.keys(3)]) == 2
        assert not SHELVES[which] and backend.stats()["hidden_pages"] == 0
        assert backend.info()["deletes"] == "yes"


def test_clearing_is_refused_unless_the_store_is_ours_alone(opened: Any) -> None:
    backend = opened("copies", shelf="clearing")
    pages.store(backend).write_blocking(pages.keys(2), [pages.content(n) for n in range(2)], b"", 0)
    SHELVES["clearing"]["somebody's"] = b"1"
    with pytest.raises(StorageError, match='attach it with "clear_all": true') as caught:
        backend.clear_blocking(pages.NAMESPACE)
    assert caught.value.reason == "refused" and len(SHELVES["clearing"]) == 3
    ours = opened("copies", shelf="clearing", clear_all=True)
    pages.store(ours).write_blocking(pages.keys(3), [pages.content(n) for n in range(3)], b"", 0)
    assert ours.clear_blocking(pages.NAMESPACE) == 1  # of four, it has written one
    assert not SHELVES["clearing"]


def test_a_plug_in_that_only_inherits_its_clear_has_cleared_nothing(opened: Any) -> None:
    """What it inherits from SGLang does nothing, and says nothing."""
    backend = opened("x", module_path=f"{HOME}.shapes", class_name="NotCleared", clear_all=True, **V1)
    pages.store(backend).write_blocking(pages.keys(1), [pages.content(1)], b"", 0)
    with pytest.raises(StorageError, match=r"has no clear\(\) of its own: its pages stay") as caught:
        backend.clear_blocking(pages.NAMESPACE)
    assert caught.value.reason == "refused"


def test_a_full_plug_in_keeps_the_first_pages(opened: Any) -> None:
    backend = opened("pages", most=2)
    result = pages.store(backend).write_blocking(pages.keys(4), [pages.content(n) for n in range(4)], b"", 0)
    assert result.pages == 2 and "did not keep the page" in result.reason
    assert pages.store(backend).read_blocking(pages.keys(4), pages.empty(4)).pages == 2


def test_a_page_that_is_larger_than_those_it_was_opened_for_is_refused(opened: Any) -> None:
    backend = opened("copies")
    large = CheckedStore(backend, pages.layout(size=8192))
    result = large.write_blocking(pages.keys(1), [pages.content(1, 8192)], b"", 0)
    assert result.reason.startswith("contract") and "does not fit" in result.reason


def test_a_miss_is_a_value(opened: Any) -> None:
    backend = opened("copies")
    pages.store(backend).write_blocking(pages.keys(1), [pages.content(1)], b"", 0)
    outcomes = backend.read_blocking(
        [pages_incoming(pages.key(1)), pages_incoming(pages.key(2)), pages_incoming(pages.key(1))]
    )
    assert outcomes[:2] == [PageResult.HIT, PageResult.MISS]


def pages_incoming(key: bytes) -> Any:
    """A page to be read."""
    return IncomingPage(pages.layout(), key, pages.empty(1)[0])


def test_a_folder_of_its_name_is_no_sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken for it, no plug-in could be loaded in a folder that has a copy of SGLang's repository in it."""
    (tmp_path / "sglang" / "python").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "sglang", raising=False)
    importlib.invalidate_caches()
    assert not plugin_modules.is_installed()
    (tmp_path / "sglang" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert plugin_modules.is_installed()


# ---- names that SGLang has


def is_installed(package: str) -> bool:
    """Does pip know it?  What stands in for a module is no package."""
    return any(found.name == package for found in importlib.metadata.distributions())


@pytest.mark.parametrize("name", ALIASES)
def test_a_name_of_sglangs_says_which_package_is_missing(name: str) -> None:
    if is_installed("sglang"):
        pytest.skip("SGLang is installed here")
    _, settings = registry.validate_extra_config(name, None)
    backend = registry.create(name, settings, OpenContext(rank=0, namespace=pages.NAMESPACE, page_bytes=64))
    with pytest.raises(StorageError, match=f"{name} is a part of SGLang \\(pip install sglang\\)") as caught:
        backend.open_blocking()
    backend.close_blocking()
    assert diagnose(caught.value, name).code == "missing_library" and ALIASES[name].needs in str(caught.value)


def test_a_name_of_sglangs_is_dynamic_with_a_class_and_takes_the_plug_ins_keys() -> None:
    _, settings = registry.validate_extra_config("nixl", '{"plugin": {"posix": {}}, "clear_all": true}')
    assert isinstance(settings, DynamicSettings)
    assert (settings.backend_name, settings.class_name, settings.constructor) == ("nixl", "HiCacheNixl", "config")
    assert settings.interface_v1 and settings.clear_all and settings.rest == {"plugin": {"posix": {}}}
    assert registry.family("nixl") == "dynamic" and registry.family("file") == "file"
    assert "nixl" not in registry.names() and registry.spec("nixl").class_name == "DynamicBackend"
    with pytest.raises(UserError, match="choose one of: file, .*or a plug-in of SGLang: hf3fs, eic, "):
        registry.spec("tape")


def test_the_page_names_all_of_them() -> None:
    page = (ROOT / "docs" / "stores" / "dynamic.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip(" `") for line in page.splitlines() if line.startswith("| `")]
    assert {*ALIASES} <= {*rows}


def test_a_plug_in_inside_another_store(tmp_path: Any) -> None:
    config = {"backend_name": "x", "shelf": "inside", **PLUG_INS["pointers"]}
    for name, outer in (
        ("faulty", {"inner": "dynamic", "inner_config": config}),
        ("mirror", {"copies": [{"backend": "memory"}, {"backend": "dynamic", "extra_config": config}]}),
    ):
        backend = pages.backend(name, outer)
        backend.open_blocking()
        store = pages.store(backend)
        assert store.write_blocking(pages.keys(2), [pages.content(n) for n in range(2)], b"", 0).pages == 2
        assert store.read_blocking(pages.keys(2), pages.empty(2)).pages == 2
        backend.close_blocking()
        assert len(SHELVES.pop("inside")) == 2
