"""The settings of fault tolerance: what they are by default, what is refused, and that no secret is repeated."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sglang_hicache.errors import UserError
from sglang_hicache.observe import redacted, secrets_in
from sglang_hicache.storage import registry
from sglang_hicache.storage.fault_tolerance import FaultTolerance, Standby
from sglang_hicache.storage.settings import store_settings


def _text(**fault_tolerance: Any) -> str:
    return msgspec.json.encode({"fault_tolerance": fault_tolerance}).decode()


def test_by_default_the_server_does_nothing_by_itself() -> None:
    assert store_settings(None).fault_tolerance == FaultTolerance() == FaultTolerance(level="off", standby=())


def test_all_settings_arrive() -> None:
    given = FaultTolerance(
        level="failover", backoff_initial_s=0.5, backoff_max_s=8.0, consecutive_errors=3, error_ratio=0.25,
        window_s=10.0, min_ops=8, slow_factor=4.0, slow_min_s=0.01, healthy_s=12.0, canary_timeout_s=2.0,
        standby=(Standby(backend="file", extra_config={"fsync": "full"}),),
    )  # fmt: skip
    text = _text(**msgspec.to_builtins(given))
    assert store_settings(text).fault_tolerance == given
    assert given.standby[0].extra_config_json() == '{"fsync":"full"}'
    prefetch, _ = registry.validate_extra_config("memory", text)
    assert prefetch == registry.PrefetchSettings(), "nothing of it is for the prefetch, or for the backend"


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"level": "on"}, "Invalid enum value 'on'"),
        ({"level": "failover"}, "needs at least one standby"),
        ({"backoff_initial_s": 0}, "backoff_initial_s=0.* is not allowed; it takes a number from 0.001 to 3600"),
        ({"backoff_initial_s": 2, "backoff_max_s": 1}, "backoff_max_s=1 is less than backoff_initial_s"),
        ({"error_ratio": 1.5}, "error_ratio=1.5 is not allowed"),
        ({"min_ops": 0}, "min_ops=0 is not allowed"),
        ({"consecutive_errors": 2.5}, "Expected `int`, got `float`"),
        ({"healthy_s": True}, "Expected `float`, got `bool`"),
        ({"slow_factor": 1}, "slow_factor=1.* is not allowed"),
        ({"patience": 3}, "unknown field `patience`; it takes level, "),
        ({"standby": {}}, "Expected `array`, got `object`"),
        ({"standby": [{"extra_config": {}}]}, "missing required field `backend`"),
        ({"standby": [{"backend": "memory", "extra_config": "{}"}]}, "Expected `object`, got `str`"),
        ({"standby": [{"backend": "memory"}] * 9}, "at most 8 are allowed"),
        (
            {"standby": [{"backend": "memory", "extra_config": {"fault_tolerance": {"level": "off"}}}]},
            "a standby has no fault_tolerance of its own",
        ),
    ],
)
def test_mistakes_are_named_with_what_is_allowed(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=f"extra config fault_tolerance: .*{complaint}"):
        registry.validate_extra_config("memory", _text(**given))


@pytest.mark.parametrize("value", ["null", "[]", '"off"', "7"])
def test_it_is_an_object(value: str) -> None:
    with pytest.raises(UserError, match="extra config fault_tolerance: Expected `object`"):
        store_settings(f'{{"fault_tolerance": {value}}}')


@pytest.mark.parametrize(
    ("standby", "complaint"),
    [
        ({"backend": "redsi"}, "standby 2: unknown storage backend 'redsi'; choose one of"),
        ({"backend": "file", "extra_config": {"max_sise": 1}}, "standby 2: unknown extra config 'max_sise'"),
        ({"backend": "file", "extra_config": {"prefetch_threshold": -1}}, "standby 2: extra config prefetch_threshold"),
    ],
)
def test_a_standby_is_checked_as_if_it_were_attached(standby: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        registry.validate_extra_config("memory", _text(standby=[{"backend": "memory"}, standby]))


def test_secrets_of_standbys_are_secret() -> None:
    config = {"fault_tolerance": {"standby": [{"backend": "file", "extra_config": {"password": "hunter22"}}]}}
    assert secrets_in(config) == ["hunter22"]
    assert "hunter22" not in str(redacted(config))
    with pytest.raises(UserError) as caught:
        registry.validate_extra_config("memory", msgspec.json.encode(config).decode())
    assert "hunter22" not in str(caught.value)
