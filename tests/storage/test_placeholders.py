"""Values of a node in an extra config: which are known, which variables may be named, what each rank makes of them."""

from __future__ import annotations

import json

import pytest

from sglang_hicache.errors import UserError
from sglang_hicache.observe import redacted
from sglang_hicache.storage import registry
from sglang_hicache.storage.placeholders import Node, check_placeholders, resolved, variable_names


def node(rank: int = 3, **environment: str) -> Node:
    return Node(rank, "gpu7", lambda: "10.0.0.7", environment)


def test_every_placeholder_has_the_value_of_its_node() -> None:
    config = {
        "a": "/x/${node.hostname}/${rank}", "b": [{"c": "${node.ip}:${env.PORT}"}], "n": 1, "t": True, "s": "$5 {}",
    }  # fmt: skip
    text, used = resolved(json.dumps(config), node(PORT="80", OTHER="x"), ["PORT"])
    assert json.loads(text) == {"a": "/x/gpu7/3", "b": [{"c": "10.0.0.7:80"}], "n": 1, "t": True, "s": "$5 {}"}
    assert used == {"PORT": "80"}


def test_a_config_without_placeholders_stays_as_it_is_to_the_letter() -> None:
    text = '{"b":1,   "a": "$x"}'
    assert resolved(text, node(), []) == (text, {})


def test_the_two_characters_themselves() -> None:
    text, _ = resolved('{"password": "a$${b}$${"}', node(), [])
    assert json.loads(text) == {"password": "a${b}${"}
    check_placeholders('{"password": "a$${b}$${"}', [])


def test_what_a_variable_holds_is_no_placeholder() -> None:
    """Or whoever sets one variable could read all of them."""
    text, _ = resolved('{"a": "${env.A}"}', node(A="${env.SECRET}", SECRET="s"), ["A"])
    assert json.loads(text) == {"a": "${env.SECRET}"}


def test_nobody_asks_for_an_address_that_no_config_wants() -> None:
    def ask() -> str:
        raise AssertionError("asked")

    assert json.loads(resolved('{"a": "${rank}"}', Node(0, "h", ask, {}), [])[0]) == {"a": "0"}


def test_standbys_are_resolved_when_they_are_used() -> None:
    """A variable that only a standby wants must not keep the primary from being attached."""
    config = {"x": "${rank}", "fault_tolerance": {"standby": [{"backend": "file", "extra_config": {"y": "${env.A}"}}]}}
    text, used = resolved(json.dumps(config), node(), ["A"])
    assert json.loads(text) == config | {"x": "3"} and used == {}
    with pytest.raises(UserError, match="does not allow A"):
        check_placeholders(json.dumps(config), [])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("${node.name}", ["${node.name}", "${node.hostname}", "${env.NAME}", "$${"]),
        ("${}", ["${}"]),
        ("${env.HOME}", ["${env.HOME}", "--hicache-config-env", "PORT", "does not allow HOME"]),
        ("${env.}", ["${env.}"]),
        ("hunter2${rank", ["without a matching }", "$${"]),
    ],
)
def test_a_mistake_is_named_and_nothing_else_of_the_text(text: str, words: list[str]) -> None:
    for judge in (lambda: check_placeholders(json.dumps({"a": text}), ["PORT"]),
                  lambda: resolved(json.dumps({"a": text}), node(HOME="/root"), ["PORT"])):  # fmt: skip
        with pytest.raises(UserError) as caught:
            judge()
        assert all(word in str(caught.value) for word in words), caught.value
        assert "hunter2" not in str(caught.value)


def test_a_variable_that_a_node_has_not_is_named_with_the_node() -> None:
    with pytest.raises(UserError, match=r"\$\{env.PORT\}: PORT is not set .* rank 3 on gpu7"):
        resolved('{"a": "${env.PORT}"}', node(), ["PORT"])


def test_names_of_variables() -> None:
    assert variable_names(" A,_b , C3,") == ("A", "_b", "C3")
    assert variable_names("") == ()
    with pytest.raises(UserError, match="'A B'"):
        variable_names("A B")


def test_the_form_of_a_text_is_checked_once_it_is_known() -> None:
    for config, complaint in (
        ({"max_size": "${env.A}"}, "much"),
        ({"min_free_space": "${env.A}"}, "much"),
        ({"encryption": {"key_file": "${env.A}"}}, "no absolute path"),
    ):
        registry.validate_extra_config("file", json.dumps(config))
        bad, _ = resolved(json.dumps(config), node(A="much"), ["A"])
        with pytest.raises(UserError, match=complaint):
            registry.validate_extra_config("file", bad)


@pytest.mark.parametrize("config", [{"fsync": "${env.A}"}, {"ttl_s": "${env.A}"}, {"prefetch_threshold": "${rank}"}])
def test_numbers_and_choices_take_no_placeholder(config: dict[str, str]) -> None:
    """Ranks decide by some of them, and must decide alike."""
    with pytest.raises(UserError):
        registry.validate_extra_config("file", json.dumps(config))


def test_late_io_and_the_kind_of_a_store_cannot_differ_between_ranks() -> None:
    for config in ({"inner": "${env.A}"}, {"inner": "memory", "late_io": "${env.A}"}):
        with pytest.raises(UserError):
            registry.validate_extra_config("faulty", json.dumps(config))


def test_where_a_secret_comes_from_is_no_secret() -> None:
    config = {"password": "${env.REDIS_PASSWORD}", "token": "x${env.A}"}
    assert redacted(config) == {"password": "${env.REDIS_PASSWORD}", "token": "***"}
