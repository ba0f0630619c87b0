"""An extra config from text or file, and which files HTTP may reach."""

import json

import pytest

from sglang_hicache.errors import UserError
from sglang_hicache.extra_config import extra_config_json


@pytest.mark.parametrize(
    ("name", "text"),
    [("c.json", '{"a": {"b": 1}}'), ("c.toml", "[a]\nb = 1\n"), ("c.yaml", "a:\n  b: 1\n"), ("c.yml", "a: {b: 1}")],
)
def test_files_of_each_kind(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert json.loads(extra_config_json(f"@{tmp_path / name}")) == {"a": {"b": 1}}


def test_text_stays_and_none_stays_none():
    assert extra_config_json(None) is None
    assert extra_config_json("") == "{}"
    assert json.loads(extra_config_json('{"a": 1}')) == {"a": 1}


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"a": NaN}', "null", "@/no/such.json", "@/etc/passwd"])
def test_what_is_no_object_is_refused(text):
    with pytest.raises(UserError):
        extra_config_json(text)


@pytest.mark.parametrize(("name", "text"), [("c.toml", "a = 2026-01-01"), ("c.toml", "a ="), ("c.yaml", "a: [")])
def test_what_json_cannot_carry_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name):
        extra_config_json(f"@{tmp_path / name}")


def test_http_reads_no_file_without_a_folder(tmp_path):
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(UserError, match="--hicache-config-dir"):
        extra_config_json(f"@{tmp_path / 'c.json'}", below="")


def test_http_reads_below_its_folder_only(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (inside / "c.json").write_text('{"a": 1}')
    (outside / "c.json").write_text('{"secret": 1}')
    (inside / "link.json").symlink_to(outside / "c.json")
    for path in ("c.json", str(inside / "c.json")):
        assert extra_config_json(f"@{path}", below=str(inside)) == '{"a": 1}'
    for path in ("../out/c.json", str(outside / "c.json"), "link.json"):
        with pytest.raises(UserError, match="not below"):
            extra_config_json(f"@{path}", below=str(inside))
