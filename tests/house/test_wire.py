"""Every struct on the wire survives the wire; every message has somebody who sends it and somebody who reads it."""

from __future__ import annotations

import ast
import functools
import types
import typing
from typing import Any

import msgspec
import pytest

from sglang_hicache import wire
from tests.house import source

STRUCTS = sorted(
    (
        value
        for value in vars(wire).values()
        if isinstance(value, type) and issubclass(value, msgspec.Struct) and value is not wire.Message
    ),
    key=lambda struct: struct.__name__,
)
UNIONS = {
    "ToRank": wire.ToRank,
    "FromRank": wire.FromRank,
    "ToStorage": wire.ToStorage,
    "FromStorage": wire.FromStorage,
}
#: Direction of each union: folders that may send, folders that must read.
SENDERS = {
    "ToRank": ("tokenizer/", "sglang_hicache/"),
    "FromRank": ("scheduler/",),
    "plans": ("scheduler/",),
    "ToStorage": ("scheduler/", "workers/", "sglang_hicache/cache/"),
    "FromStorage": ("workers/",),
}
READERS = {
    "ToRank": ("scheduler/",),
    "FromRank": ("tokenizer/",),
    "plans": ("scheduler/",),
    "ToStorage": ("workers/",),
    "FromStorage": ("scheduler/", "sglang_hicache/cache/"),
}


def members(union: Any) -> tuple[type, ...]:
    """The classes of a union."""
    return typing.get_args(union)


MESSAGES = [(name, member) for name, union in UNIONS.items() for member in members(union)] + [
    ("plans", wire.TickPlan),
    ("plans", wire.RankReport),
]


def sample(kind: Any) -> Any:
    """A value of a type that differs from every default: the last alternative of a union, one element per list."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind)
        return kind(**{field.name: sample(hints[field.name]) for field in msgspec.structs.fields(kind)})
    if origin in (typing.Union, types.UnionType):
        return sample([option for option in arguments if option is not type(None)][-1])
    if origin is typing.Literal:
        return arguments[-1]
    if origin is tuple and arguments[-1] is not Ellipsis:
        return tuple(sample(argument) for argument in arguments)
    if origin in (list, tuple):
        return origin([sample(arguments[0])])
    if origin is dict:
        return {sample(arguments[0]): sample(arguments[1])}
    return {int: 7_000_000_000, float: 0.25, str: "täxt", bytes: b"\x00\xff", bool: True}[kind]


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_struct_round_trips(struct: type[msgspec.Struct]) -> None:
    value = sample(struct)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=struct) == value


@pytest.mark.parametrize(
    ("union", "member"), MESSAGES, ids=lambda item: item if isinstance(item, str) else item.__name__
)
def test_message_keeps_its_type_in_its_union(union: str, member: type[msgspec.Struct]) -> None:
    value = sample(member)
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=UNIONS.get(union, member))
    assert type(decoded) is member and decoded == value


def test_every_message_belongs_to_a_direction() -> None:
    known = {member for _, member in MESSAGES}
    assert not [struct for struct in STRUCTS if issubclass(struct, wire.Message) and struct not in known]


@functools.cache
def uses(path: str) -> tuple[set[str], set[str]]:
    """`uses_in` of one file of the tree."""
    return uses_in(next(file for file in source.files(*source.PRODUCT_FOLDERS) if file.path == path))


def uses_in(file: source.SourceFile) -> tuple[set[str], set[str]]:
    """Names of classes that a file constructs, and names that it mentions otherwise (imports do not count)."""
    called = {id(node.func): source.dotted(node.func) for node in ast.walk(file.tree) if isinstance(node, ast.Call)}
    mentioned = {
        source.dotted(node)
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Name | ast.Attribute) and id(node) not in called
    }
    return {name.split(".")[-1] for name in called.values()}, {name.split(".")[-1] for name in mentioned}


def found_in(name: str, folders: tuple[str, ...], constructed: bool) -> bool:
    """Is this class constructed, or else mentioned, in a file below these folders?"""
    paths = [file.path for file in source.files(*source.PRODUCT_FOLDERS) if file.path.startswith(folders)]
    return any(name in uses(path)[0 if constructed else 1] for path in paths if path != "sglang_hicache/wire.py")


@pytest.mark.parametrize(
    ("union", "member"), MESSAGES, ids=lambda item: item if isinstance(item, str) else item.__name__
)
def test_message_has_a_sender_and_a_reader(union: str, member: type) -> None:
    assert found_in(member.__name__, SENDERS[union], constructed=True), f"nobody in {SENDERS[union]} sends it"
    assert found_in(member.__name__, READERS[union], constructed=False), f"nobody in {READERS[union]} reads it"


def test_the_search_tells_sending_from_reading() -> None:
    constructed, mentioned = uses_in(source.parse("match m:\n    case wire.Read(): send(wire.Write(id=1))\n"))
    assert "Write" in constructed and "Write" not in mentioned
    assert "Read" in mentioned and "Read" not in constructed
