"""An extra config from text or file, and which files HTTP may reach."""

import json
import os
import time

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


@pytest.mark.parametrize(("opening", "closing"), [('{"a":', "}"), ("[", "]")])
def test_what_is_nested_too_deep_is_refused(tmp_path, opening, closing):
    """JSON may go deeper than whoever walks through it later, looking for secrets."""
    for depth in (60, 900, 100_000):
        text = f'{{"a": {opening * depth}1{closing * depth}}}'
        with pytest.raises(UserError, match="nested"):
            extra_config_json(text)
    (tmp_path / "c.toml").write_text(f"a = {'[' * 60}{']' * 60}")
    with pytest.raises(UserError, match="nested"):
        extra_config_json(f"@{tmp_path / 'c.toml'}")


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


@pytest.mark.parametrize("below", [True, False])
def test_only_plain_files_of_bounded_size_are_read(tmp_path, below):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "large.json").write_text('{"a": "' + "x" * 300_000 + '"}')
    (tmp_path / "device.json").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "large", "device"):
        with pytest.raises(UserError):
            extra_config_json(f"@{tmp_path / name}.json", below=str(tmp_path) if below else None)


def test_a_folder_swapped_for_a_link_after_the_check_is_noticed(tmp_path, monkeypatch):
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "sub").mkdir(parents=True)
    outside.mkdir()
    (inside / "sub" / "c.json").write_text("{}")
    (outside / "c.json").write_text('{"secret": 1}')
    real_open = os.open

    def swap_and_open(path, *args, **kwargs):
        (inside / "sub").rename(inside / "old")
        (inside / "sub").symlink_to(outside)
        monkeypatch.undo()
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", swap_and_open)
    with pytest.raises(UserError, match="not below"):
        extra_config_json("@sub/c.json", below=str(inside))


def test_yaml_that_explodes_or_nests_is_refused_at_once(tmp_path):
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
    )
    started = time.process_time()  # what a neighbour takes does not count
    for name, text in (("bomb.yaml", bomb), ("deep.yaml", "[" * 5000), ("date.yaml", "a: 2026-99-99")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError):
            extra_config_json(f"@{tmp_path / name}")
    assert time.process_time() - started < 2
