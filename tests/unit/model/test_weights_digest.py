"""The digest of a model's weights: contents only, and a cache that nobody else can feed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_hicache import weights_digest as module
from sglang_hicache.errors import UserError
from sglang_hicache.weights_digest import weight_files, weights_digest


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"first weights")
    return folder


@pytest.fixture
def cache(tmp_path) -> str:
    return str(tmp_path / "cache" / "weights.json")


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that were really read."""
    names: list[str] = []
    read = module._hash_file

    def watched(file: Path) -> str:
        names.append(file.name)
        return read(file)

    monkeypatch.setattr(module, "_hash_file", watched)
    return names


def _index(folder: Path, *names: str) -> None:
    content = {"metadata": {}, "weight_map": {f"tensor{n}": name for n, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def test_second_call_reads_nothing_and_says_the_same(model, cache, hashed):
    first = weights_digest(str(model), cache)
    assert len(first) == 64 and int(first, 16) >= 0
    assert weights_digest(str(model), cache) == first
    assert hashed == ["model.safetensors"]
    assert os.stat(cache).st_mode & 0o777 == 0o600


def test_fm31_same_name_and_size_but_other_contents(model, cache):
    first = weights_digest(str(model), cache)
    (model / "model.safetensors").write_bytes(b"other weights")
    assert weights_digest(str(model), cache) != first


def test_contents_alone_count(model, cache, tmp_path, hashed):
    """A copy of the model, at another place and time, shares the pages."""
    first = weights_digest(str(model), cache)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes(b"first weights")
    (copy / "config.json").write_text("{}")
    assert weights_digest(str(copy), cache) == first
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert weights_digest(str(model), cache) == first
    assert len(hashed) == 3


@pytest.mark.parametrize("broken", [b"", b"{", b'{"a": 1}', b"\xff\x00"])
def test_a_broken_cache_is_made_anew(model, cache, broken):
    first = weights_digest(str(model), cache)
    Path(cache).write_bytes(broken)
    assert weights_digest(str(model), cache) == first
    assert json.loads(Path(cache).read_bytes())


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_cache_that_others_may_write_is_not_believed(model, cache, hashed, mode):
    first = weights_digest(str(model), cache)
    text = Path(cache).read_text()
    (forged,) = json.loads(text).values()
    Path(cache).write_text(text.replace(forged["digest"], "00" * 32))
    assert weights_digest(str(model), cache) != first, "the forgery did not work, so the test proves nothing"
    os.chmod(cache, mode)
    assert weights_digest(str(model), cache) == first
    assert os.stat(cache).st_mode & 0o777 == 0o600


def test_a_cache_behind_a_link_is_not_believed(model, cache, tmp_path, hashed):
    first = weights_digest(str(model), cache)
    os.rename(cache, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", cache)
    assert weights_digest(str(model), cache) == first
    assert len(hashed) == 2


def test_other_contents_with_the_time_of_the_old_ones_are_read_again(model, cache):
    """`cp -p` and `rsync -t` write into the same file and set its time back: its pages must not get the old name."""
    file = model / "model.safetensors"
    before = file.stat()
    first = weights_digest(str(model), cache)
    file.write_bytes(b"other weights")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert weights_digest(str(model), cache) != first


@pytest.mark.parametrize("name", ["/etc/hostname", "../other/model.safetensors", "sub/model.safetensors", "", ".."])
def test_an_index_names_files_of_its_own_folder_only(model, name):
    """A checkpoint from the hub could ask which files there are on this machine, and have them read."""
    _index(model, name)
    with pytest.raises(UserError, match="names a file outside"):
        weight_files(str(model))


def test_an_unwritable_cache_only_costs_time(model, tmp_path, hashed):
    blocked = tmp_path / "file"
    blocked.write_text("")
    cache = str(blocked / "weights.json")
    assert weights_digest(str(model), cache) == weights_digest(str(model), cache)
    assert len(hashed) == 2


def test_shards_count_by_name_and_in_order(tmp_path, cache):
    names = "model-1.safetensors", "model-2.safetensors"
    digests = set()
    for number, contents in enumerate(((b"a", b"b"), (b"b", b"a"), (b"ab", b""))):
        folder = tmp_path / str(number)
        folder.mkdir()
        _index(folder, *reversed(names))
        for name, content in zip(names, contents):
            (folder / name).write_bytes(content)
        (folder / "consolidated.safetensors").write_bytes(str(number).encode())
        assert [file.name for file in weight_files(str(folder))] == list(names)
        digests.add(weights_digest(str(folder), cache))
    assert len(digests) == 3


def test_only_the_file_that_changed_is_read_again(tmp_path, cache, hashed):
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    weights_digest(str(tmp_path), cache)
    (tmp_path / "b.safetensors").write_bytes(b"changed")
    weights_digest(str(tmp_path), cache)
    assert hashed == ["a.safetensors", "b.safetensors", "b.safetensors"]


def test_missing_weights_are_refused_with_what_is_expected(tmp_path, cache):
    with pytest.raises(UserError, match="holds no safetensors weights; expected model.safetensors or"):
        weights_digest(str(tmp_path), cache)
    _index(tmp_path, "model-1.safetensors")
    with pytest.raises(UserError, match="model-1.safetensors is missing"):
        weights_digest(str(tmp_path), cache)
    for content in (b"[]", b'{"weight_map":{"\xff":"a"}}', b'{"weight_map":' + b"[" * 100_000):
        (tmp_path / "model.safetensors.index.json").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as a weights index"):
            weights_digest(str(tmp_path), cache)


def test_floor_and_batch_import_no_torch():
    """The launcher and the scheduler's simulations start without paying for it."""
    code = (
        "import sglang_hicache.weights_digest, sglang_hicache.cpu_environment, sglang_hicache.workers.batch, sys; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
