"""Names of backends and their extra configs: what is refused, and with which words."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from sglang_hicache.errors import UserError
from sglang_hicache.storage import registry
from sglang_hicache.storage.composite_settings import MirrorSettings, TieredSettings
from sglang_hicache.storage.dynamic_settings import DynamicSettings
from sglang_hicache.storage.fault_tolerance import FaultTolerance
from sglang_hicache.storage.faulty_settings import Fault, FaultySettings
from sglang_hicache.storage.mooncake_settings import MooncakeSettings
from sglang_hicache.storage.redis_settings import RedisSettings
from sglang_hicache.storage.s3_settings import S3Settings
from sglang_hicache.storage.settings import (
    COMMON_KEYS,
    EncryptionSettings,
    FileSettings,
    MemorySettings,
    PrefetchSettings,
    StoreSettings,
    store_settings,
)


def test_names_are_listed_when_one_is_unknown() -> None:
    with pytest.raises(UserError, match="unknown storage backend 'redsi'; choose one of: file, memory"):
        registry.spec("redsi")


def test_saboteur_is_unknown_unless_the_server_was_started_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "faulty" in registry.names()
    monkeypatch.delenv(registry.ALLOW_FAULTY_ENV)
    assert "faulty" not in registry.names()
    with pytest.raises(UserError, match="unknown storage backend 'faulty'"):
        registry.validate_extra_config("faulty", '{"inner": "memory"}')


@pytest.mark.parametrize("text", [None, "", "{}"])
def test_defaults(text: str | None) -> None:
    prefetch, settings = registry.validate_extra_config("file", text)
    assert prefetch == PrefetchSettings()
    assert (prefetch.prefetch_threshold, prefetch.prefetch_timeout_base) == (256, 1.0)
    assert (prefetch.prefetch_timeout_per_ki_token, prefetch.hicache_storage_pass_prefix_keys) == (0.25, False)
    assert settings == FileSettings(file_storage_path="", fsync="none")


def test_keys_of_the_controller_never_reach_the_backend() -> None:
    text = '{"prefetch_threshold": 64, "prefetch_timeout_base": 2, "prefetch_timeout_per_ki_token": 0.5,'
    text += '"hicache_storage_pass_prefix_keys": true, "fsync": "full", "file_storage_path": "/x"}'
    prefetch, config = registry.split_extra_config(text)
    assert config == {"fsync": "full", "file_storage_path": "/x"}
    assert prefetch == PrefetchSettings(
        prefetch_threshold=64,
        prefetch_timeout_base=2.0,
        prefetch_timeout_per_ki_token=0.5,
        hicache_storage_pass_prefix_keys=True,
    )


@pytest.mark.parametrize(
    "text",
    [
        '{"prefetch_threshold": -1}',
        '{"prefetch_threshold": true}',
        '{"prefetch_threshold": 1.5}',
        '{"prefetch_threshold": "256"}',
        '{"prefetch_threshold": null}',
        '{"prefetch_timeout_base": -0.1}',
        '{"prefetch_timeout_base": 1e9}',
        '{"prefetch_timeout_base": false}',
        '{"prefetch_timeout_per_ki_token": -1}',
        '{"prefetch_timeout_per_ki_token": [1]}',
        '{"hicache_storage_pass_prefix_keys": 1}',
    ],
)
def test_keys_of_the_controller_are_checked(text: str) -> None:
    name = next(iter(msgspec.json.decode(text)))
    with pytest.raises(UserError, match=f"extra config {name}=.* is not allowed; it takes"):
        registry.split_extra_config(text)


def test_keys_of_the_storage_process_never_reach_the_backend() -> None:
    text = '{"encryption": {"key_file": "/etc/key"}, "negative_ttl_s": 5, "fsync": "full"}'
    assert registry.split_extra_config(text) == (PrefetchSettings(), {"fsync": "full"})
    encryption = EncryptionSettings(key_file="/etc/key")
    assert store_settings(text) == StoreSettings(encryption=encryption, negative_ttl_s=5.0)
    assert store_settings(None) == store_settings('{"encryption": null}') == StoreSettings(negative_ttl_s=60.0)


@pytest.mark.parametrize("name", ["file", "memory", "faulty"])
def test_every_backend_takes_the_keys_of_the_storage_process(name: str) -> None:
    config = {"encryption": {"key_file": "/etc/key"}, "negative_ttl_s": 0}
    config |= {"inner": "memory"} if name == "faulty" else {}
    registry.validate_extra_config(name, msgspec.json.encode(config).decode())


_SECRET = "c2VjcmV0IHNlY3JldCBzZWNyZXQgc2VjcmV0IHNlY3I="


@pytest.mark.parametrize(
    "value",
    [
        f'"{_SECRET}"',
        f'{{"key_file": "{_SECRET}"}}',
        '{"key_file": "relative/path"}',
        '{"key_file": ""}',
        '{"key_file": "/with/\\u0000"}',
        '{"key_file": 7}',
        '{"key_file": null}',
        "{}",
        "[]",
        "true",
        '{"key_file": "/etc/key", "cipher": "rot13"}',
    ],
)
def test_encryption_is_a_key_file_and_its_mistakes_are_not_repeated(value: str) -> None:
    with pytest.raises(
        UserError, match=r'extra config encryption.*it takes \{"key_file": "<absolute path>"\}'
    ) as caught:
        registry.validate_extra_config("file", f'{{"encryption": {value}}}')
    assert _SECRET not in str(caught.value)


@pytest.mark.parametrize("value", ["-1", "true", '"60"', "null", "1e9"])
def test_time_of_the_negative_cache_is_checked(value: str) -> None:
    with pytest.raises(UserError, match="extra config negative_ttl_s=.* is not allowed; it takes seconds"):
        store_settings(f'{{"negative_ttl_s": {value}}}')


@pytest.mark.parametrize(
    "text", ["{", "[" * 30_000, "nonsense", '{"prefetch_timeout_base": NaN}', "[]", "1", '"x"', "null"]
)
def test_only_a_json_object_is_a_config(text: str) -> None:
    with pytest.raises(UserError, match="give one JSON object"):
        registry.split_extra_config(text)


def test_config_that_does_not_fit_the_pipe_is_refused() -> None:
    with pytest.raises(UserError, match="at most 32768"):
        registry.split_extra_config('{"x": "' + "y" * 40_000 + '"}')


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("file", '{"max_sise": 1}', "unknown extra config 'max_sise'; file takes .*file_storage_path, fsync"),
        ("file", '{"fsync": "always"}', "Invalid enum value 'always'.*file takes .*file_storage_path, fsync"),
        ("file", '{"file_storage_path": 3}', "Expected `str`, got `int`"),
        ("memory", '{"fsync": "none"}', "memory takes max_size, high_watermark"),
        ("faulty", "{}", "missing required field `inner`"),
        ("faulty", '{"inner": "faulty"}', "sabotage one real backend"),
        ("faulty", '{"inner": "file", "inner_config": {"x": 1}}', "unknown extra config 'x'; file takes"),
        ("faulty", '{"inner": "file", "faults": {"raed": {"kind": "error"}}}', "Invalid enum value 'raed'"),
        ("faulty", '{"inner": "file", "faults": {"read": {"kind": "error", "gaet": "x"}}}', "unknown field `gaet`"),
    ],
)
def test_backend_config_is_refused_with_what_is_allowed(name: str, text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        registry.validate_extra_config(name, text)


def test_late_io_is_known_without_asking_the_process() -> None:
    for text, expected in (('{"inner": "file"}', False), ('{"inner": "file", "late_io": true}', True)):
        _, settings = registry.validate_extra_config("faulty", text)
        assert registry.late_io("faulty", settings) is expected
    assert not registry.late_io("file", FileSettings())


def test_faults_are_records() -> None:
    text = '{"inner": "memory", "faults": {"read": {"kind": "flip", "first": 2, "count": 1}}}'
    _, settings = registry.validate_extra_config("faulty", text)
    assert isinstance(settings, FaultySettings)
    assert settings.faults == {"read": Fault(kind="flip", first=2, count=1)}


def test_every_key_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "extra-config.md").read_text(encoding="utf-8")
    known = {*COMMON_KEYS, *FileSettings.__struct_fields__, *MemorySettings.__struct_fields__}
    known |= {*FaultTolerance.__struct_fields__}
    known |= {*DynamicSettings.__struct_fields__} - {DynamicSettings.REST}
    known |= {*TieredSettings.__struct_fields__, *MirrorSettings.__struct_fields__}
    known |= {*RedisSettings.__struct_fields__, *S3Settings.__struct_fields__, *MooncakeSettings.__struct_fields__}
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == known


#: Extra, the package that it brings, and a config that needs nothing of a server.
EXTRAS = [
    ("redis", "redis", '{"url": "redis://127.0.0.1:1"}'),
    ("s3", "obstore", '{"bucket": "pages"}'),
    ("mooncake", "mooncake", '{"master_server_address": "127.0.0.1:1"}'),
]


@pytest.mark.parametrize(("name", "package", "config"), EXTRAS)
def test_a_missing_package_is_an_error_that_names_the_extra(name: str, package: str, config: str) -> None:
    said = _in_an_interpreter(f"""
import sys
sys.modules[{package!r}] = None
from sglang_hicache.errors import StorageError
from sglang_hicache.storage import registry
from sglang_hicache.storage.backend import OpenContext
_, settings = registry.validate_extra_config({name!r}, {config!r})
try:
    registry.create({name!r}, settings, OpenContext(rank=0, namespace="ab" * 32, page_bytes=64))
except StorageError as error:
    print(error.reason, error.code, error)
""")
    assert said.startswith("refused missing_library") and f"pip install 'sglang-hicache[{name}]'" in said, said


def test_judging_a_config_loads_no_library_of_a_store() -> None:
    configs = {name: config for name, _, config in EXTRAS}
    packages = [package for _, package, _ in EXTRAS] + ["torch", "boto3", "sglang"]
    said = _in_an_interpreter(f"""
import sys
from sglang_hicache.storage import registry
for name, config in {configs!r}.items():
    registry.validate_extra_config(name, config)
print([package for package in {packages!r} if package in sys.modules])
""")
    assert said == "[]", said


def _in_an_interpreter(code: str) -> str:
    """What a new one prints: in this one everything has been imported long ago."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()
