"""What an extra config for Mooncake may say, without a library or a store."""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import pytest

from sglang_hicache.errors import StorageError, UserError
from sglang_hicache.storage import mooncake_memory, registry
from sglang_hicache.storage.backend import OpenContext
from sglang_hicache.storage.mooncake_memory import HostSpan
from sglang_hicache.storage.mooncake_settings import MooncakeSettings
from tests.storage import pages

_MASTER = "cache-0:50051"


def settings(**config: Any) -> MooncakeSettings:
    """What a config comes to."""
    _, found = registry.validate_extra_config("mooncake", pages.text({"master_server_address": _MASTER, **config}))
    assert isinstance(found, MooncakeSettings)
    return found


def test_what_sglang_clients_send_is_taken() -> None:
    found = settings(
        local_hostname="10.0.0.7", metadata_server="http://10.0.0.1:8080/metadata", global_segment_size="4gb",
        protocol="rdma", device_name="mlx5_0,mlx5_1", master_metrics_port=9003, check_server=True,
        standalone_storage=False, client_server_address="127.0.0.1:50052", enable_ssd_offload=False,
        ssd_offload_path="/nvme", tenant_id="default", enable_group_semantics=True, extra_backend_tag="v2",
    )  # fmt: skip
    assert found.segment_bytes() == 239 * (16 << 20) >= 4 * 10**9
    assert found.name_prefix() == "hicache/v2/"
    assert found.place() == _MASTER
    assert found.may_write_late()


def test_by_default_a_server_lends_nothing_and_waits_briefly() -> None:
    found = settings()
    assert (found.segment_bytes(), found.metadata_server, found.protocol) == (0, "P2PHANDSHAKE", "tcp")
    assert (found.connect_timeout_s, found.timeout_s) == (1.0, 2.0)
    assert found.name_prefix() == "hicache/"
    assert not found.may_write_late()


def test_values_of_a_node_are_filled_in_later() -> None:
    """Failure mode 8: one config goes to all ranks, and each has an address of its own."""
    found = settings(
        local_hostname="${node.ip}", master_server_address="${env.MASTER}:50051", global_segment_size="${env.SHARE}",
        local_buffer_size="${env.BUFFER}", prefix="${env.TEAM}/",
    )  # fmt: skip
    assert found.local_hostname == "${node.ip}"
    assert found.place() == ""


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"master_server_address": "cache-0"}, "takes host:port"),
        ({"master_server_address": "cache-0:0"}, "takes host:port"),
        ({"master_server_address": "cache-0:65536"}, "takes host:port"),
        ({"master_server_address": ""}, "takes host:port"),
        ({"metadata_server": "cache-0:8080"}, "takes 'P2PHANDSHAKE' or a URL"),
        ({"local_hostname": "a b"}, "a name or an address"),
        ({"protocol": "TCP"}, "a word such as 'tcp'"),
        ({"protocol": ""}, "a word such as 'tcp'"),
        ({"global_segment_size": "much"}, "global_segment_size: .* is no size"),
        ({"global_segment_size": -1}, "global_segment_size: .* is no size"),
        ({"local_buffer_size": "much"}, "local_buffer_size: .* is no size"),
        ({"local_buffer_size": "900GiB"}, "local_buffer_size='900GiB' is not allowed; it takes 16GiB at most"),
        ({"master_server_address": "etcd://u:hunter2@cache-0:1"}, "^(?!.*hunter2).*master_server_address holds a user"),
        ({"metadata_server": "etcd://hunter2@cache-0:1"}, "^(?!.*hunter2).*metadata_server holds a user or a password"),
        ({"prefix": ""}, "1 to 200 bytes that can be printed"),
        ({"prefix": "a\nb"}, "1 to 200 bytes that can be printed"),
        ({"prefix": "x" * 201}, "1 to 200 bytes that can be printed"),
        ({"extra_backend_tag": "a/b"}, "letters, digits"),
        ({"tenant_id": "a b"}, "letters, digits"),
        ({"timeout_s": 0}, "seconds, 0.1 to 10"),
        ({"timeout_s": 11}, "seconds, 0.1 to 10"),
        ({"connect_timeout_s": 61}, "seconds, 0.1 to 60"),
        ({"standalone_storage": True}, "start mooncake_client beside the server"),
        ({"enable_ssd_offload": True}, "start mooncake_client with --enable_offload"),
        ({"master_adress": "a:1"}, "unknown extra config 'master_adress'"),
    ],
)
def test_what_cannot_be_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        settings(**config)


def test_a_config_without_a_master_is_refused() -> None:
    with pytest.raises(UserError, match="master_server_address"):
        registry.validate_extra_config("mooncake", None)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named 'mooncake'", name="mooncake"), "needs the package 'mooncake'"),
        (ImportError("libibverbs.so.1: cannot open shared object file"), "does not load here: libibverbs.so.1: cannot"),
    ],
)
def test_a_library_that_is_missing_or_does_not_load_names_the_extra(
    error: ImportError, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    context = OpenContext(rank=0, namespace=pages.NAMESPACE, page_bytes=pages.PAGE_BYTES)
    with pytest.raises(StorageError, match=words) as met:
        registry.create("mooncake", settings(), context)
    assert (met.value.reason, met.value.code) == ("refused", "missing_library")
    assert "sglang-hicache[mooncake]" in str(met.value)


def test_a_page_is_found_in_the_pool_only_where_all_of_it_lies() -> None:
    pool = memoryview(bytearray(4096))
    span = HostSpan.of(pool[1024:3072])
    start = ctypes.addressof(ctypes.c_char.from_buffer(pool))
    assert span == HostSpan(start + 1024, start + 3072)
    assert span.find(pool[1024:2048]) == start + 1024
    assert span.find(pool[2048:3072]) == start + 2048
    for elsewhere in (pool[1023:2047], pool[2049:3073], pool[:512], memoryview(bytearray(64)), memoryview(b"constant")):
        assert span.find(elsewhere) == 0
    assert HostSpan.of(None).find(pool) == 0
    assert HostSpan.of(pool, 100).find(pool[:100]) == start
    assert HostSpan.of(pool, 100).find(pool[:99]) == 0, "a small page costs less as a copy"
    assert mooncake_memory.address_of(pool[7:]) == start + 7
    pool.release()  # a view that ctypes keeps would not let go
