"""Every configuration field says what it means, is read by the server, and is set by somebody."""

from __future__ import annotations

import ast
import functools

import msgspec
import pytest

from sglang_hicache import config
from tests.house import source

RECORDS = [
    value
    for value in vars(config).values()
    if isinstance(value, type) and issubclass(value, msgspec.Struct) and not value.__name__.startswith("_")
]
FIELDS = [(record, field.name) for record in RECORDS for field in msgspec.structs.fields(record)]
#: ServerConfig holds one record per room; their names say it all.
ROOMS = {"model", "pool", "cache", "storage", "scheduler", "http", "log"}


def undocumented(file: source.SourceFile) -> list[str]:
    """Annotated fields of classes without a `#:` line right above."""
    return [
        f"{name}.{source.dotted(child.target)}"
        for name, node in source.classes(file)
        for child in node.body
        if isinstance(child, ast.AnnAssign) and not file.lines[child.lineno - 2].strip().startswith("#:")
    ]


def test_every_field_has_a_doc_line() -> None:
    path = "sglang_hicache/config.py"
    missing = undocumented(source.parse((source.ROOT / path).read_text(encoding="utf-8"), path))
    assert not [name for name in missing if name not in {f"ServerConfig.{room}" for room in ROOMS}]


def test_a_field_without_a_doc_line_is_found() -> None:
    snippet = "class C:\n    #: Said.\n    a: int\n    b: int\n    # Not a doc line.\n    c: int\n"
    assert undocumented(source.parse(snippet)) == ["C.b", "C.c"]


@functools.cache
def read_names(folders: tuple[str, ...]) -> set[str]:
    """Names that the files below these folders read as an attribute."""
    return {
        node.attr
        for file in source.files(*folders)
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


@functools.cache
def set_names(folders: tuple[str, ...]) -> set[str]:
    """Names that the files below these folders give a value to, as a keyword."""
    return {
        keyword.arg
        for file in source.files(*folders)
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg
    }


@pytest.mark.parametrize(("record", "name"), FIELDS, ids=lambda item: item if isinstance(item, str) else item.__name__)
def test_field_is_read_and_set(record: type, name: str) -> None:
    """A field that nobody reads is a promise that nobody keeps; one that nobody sets is a constant in disguise."""
    assert name in read_names(source.PRODUCT_FOLDERS), f"{record.__name__}.{name} is never read"
    assert name in set_names(("sglang_hicache", "tests")), f"{record.__name__}.{name} is never set"


def test_records_are_frozen_and_refuse_unknown_fields() -> None:
    assert all(record.__struct_config__.frozen for record in RECORDS)
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"colour": "red"}), type=config.LogConfig)
