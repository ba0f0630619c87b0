"""Extra configs of stores made of stores: what is refused, in which words, and what is known without opening any."""

from __future__ import annotations

import msgspec
import pytest

from sglang_hicache.errors import UserError
from sglang_hicache.storage import registry
from sglang_hicache.storage.placeholders import Node, resolved
from tests.storage import pages
from tests.storage.conftest import Open


def _tiers(*inside: dict) -> dict:
    return {"tiers": list(inside)}


def _with(config: dict) -> dict:
    return {"backend": "memory", "extra_config": config}


_MEMORY = {"backend": "memory"}
_DEEP: dict = _MEMORY
for _ in range(60):
    _DEEP = {"backend": "tiered", "extra_config": _tiers(_DEEP, _MEMORY)}


@pytest.mark.parametrize(
    ("name", "config", "complaint"),
    [
        ("tiered", {}, "missing required field `tiers`"),
        ("tiered", _tiers(_MEMORY), "it takes 2 to 8 stores, not 1; tiered takes "),
        ("mirror", {"copies": [_MEMORY] * 9}, "it takes 2 to 8 stores, not 9"),
        ("tiered", _tiers(_MEMORY, {"backend": "redsi"}), "^tier 2: unknown storage backend 'redsi'"),
        ("mirror", {"copies": [{"backend": "file", "extra_config": {"fsnyc": 1}}, _MEMORY]},
         "^copy 1: unknown extra config 'fsnyc'; file takes "),
        ("tiered", _tiers(_MEMORY, _with({"encryption": None, "prefetch_threshold": 1})),
         "tier 2: 'encryption', 'prefetch_threshold' cannot be set for one store inside"),
        ("mirror", {"copies": [_MEMORY, _MEMORY], "min_writes": 3}, "min_writes=3 is not allowed; it takes 1 to"),
        ("mirror", {"copies": [_MEMORY, _MEMORY], "min_writes": 0}, "min_writes=0 is not allowed"),
        ("tiered", _tiers(_MEMORY, _MEMORY) | {"required": "first"}, "Invalid enum value 'first'"),
        ("tiered", _tiers(_MEMORY, _MEMORY) | {"retry_initial_s": 0}, "retry_initial_s=0.* is not allowed"),
        ("tiered", _tiers(_MEMORY, _MEMORY) | {"retry_initial_s": 9, "retry_max_s": 3}, "retry_max_s=3 is less"),
        ("tiered", _tiers(_MEMORY, {"backend": "memory", "config": {}}), "unknown field `config`"),
        ("tiered", _tiers(_MEMORY, {"backend": "mirror", "extra_config": {"copies": [_MEMORY]}}),
         "^tier 2: extra config of mirror: it takes 2 to 8 stores, not 1"),
        ("mirror", {"copies": [{"backend": "file"}, _MEMORY, {"backend": "file"}]},
         "copy 3 is the same store as copy 1: what is lost there"),
        ("tiered", _tiers(_MEMORY, _DEEP), "tier 2: stores in stores in stores, too deep"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_with_the_tier_they_are_in(name: str, config: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        pages.backend(name, config)


def test_a_saboteur_inside_needs_its_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.ALLOW_FAULTY_ENV)
    with pytest.raises(UserError, match="tier 1: unknown storage backend 'faulty'"):
        pages.backend("tiered", _tiers({"backend": "faulty", "extra_config": {"inner": "memory"}}, _MEMORY))


def test_a_plug_in_inside_is_named_to_whoever_allows_plug_ins() -> None:
    plug_in = {"module_path": "some.module", "class_name": "Store"}
    text = pages.text(_tiers(_MEMORY, {"backend": "dynamic", "extra_config": plug_in | {"backend_name": "x"}}))
    assert registry.plug_ins("tiered", text) == ["some.module:Store"]


def test_a_composite_may_stand_by_and_may_have_standbys() -> None:
    standby = {"backend": "mirror", "extra_config": {"copies": [_MEMORY, _MEMORY], "prefetch_threshold": 8}}
    config = _tiers(_MEMORY, _MEMORY) | {"fault_tolerance": {"level": "failover", "standby": [standby]}}
    registry.validate_extra_config("tiered", pages.text(config))
    standby["extra_config"]["copies"] = [_MEMORY, {"backend": "nothing"}]
    with pytest.raises(UserError, match="fault_tolerance, standby 1: copy 2: unknown storage backend 'nothing'"):
        registry.validate_extra_config("tiered", pages.text(config))


def test_composites_hold_composites(open_backend: Open) -> None:
    mirror = {"backend": "mirror", "extra_config": {"copies": [_MEMORY, _MEMORY]}}
    backend = open_backend("tiered", _tiers(_MEMORY, mirror))
    assert pages.store(backend).write_blocking(pages.keys(2), [pages.content(1)] * 2, b"", 0).pages == 2
    assert set(backend.stats()) >= {"tier1_used_bytes", "tier2_away"}
    assert not any("copy" in name for name in backend.stats()), "the list of counters must not grow without end"
    assert backend.info()["tier2_copy1"] == "memory: opened"


def test_late_writes_of_one_are_late_writes_of_all() -> None:
    late = {"backend": "faulty", "extra_config": {"inner": "memory", "late_io": True}}
    for inside, expected in (((_MEMORY, _MEMORY), False), ((_MEMORY, late), True)):
        _, settings = registry.validate_extra_config("tiered", pages.text(_tiers(*inside)))
        assert registry.late_io("tiered", settings) is expected
        assert pages.backend("tiered", _tiers(*inside)).capabilities.late_io is expected


def test_a_password_inside_is_neither_shown_nor_repeated() -> None:
    redis = {"backend": "redis", "extra_config": {"url": "redis://10.0.0.1", "password": "hunter2"}}
    _, settings = registry.validate_extra_config("tiered", pages.text(_tiers(_MEMORY, redis)))
    assert settings.place() == "memory, redis" and "hunter2" not in repr(settings)
    redis["extra_config"] |= {"encryption": "hunter2", "colour": "hunter2"}
    with pytest.raises(UserError) as caught:
        registry.validate_extra_config("tiered", pages.text(_tiers(_MEMORY, redis)))
    assert "'encryption'" in str(caught.value) and "hunter2" not in str(caught.value)


def test_values_of_a_node_reach_the_stores_inside() -> None:
    config = _tiers(_MEMORY, {"backend": "file", "extra_config": {"file_storage_path": "/mnt/${rank}"}})
    node = Node(rank=3, hostname="here", ip=str, environment={})
    filled_in, _ = resolved(pages.text(config), node, ())
    assert msgspec.json.decode(filled_in)["tiers"][1]["extra_config"] == {"file_storage_path": "/mnt/3"}
