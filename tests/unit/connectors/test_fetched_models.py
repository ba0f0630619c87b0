"""What a server gets of a model in a store: its small files, the list of its chunks, and the name of its weights."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from sglang_hicache.connectors import base, source, stored_model
from sglang_hicache.connectors.file import FileConnector
from sglang_hicache.connectors.manifest import MANIFEST_NAME, Manifest, decode_manifest
from sglang_hicache.connectors.source import fetch_blocking
from sglang_hicache.connectors.stored_model import Buffer, StoredModel
from sglang_hicache.errors import StorageError, UserError
from sglang_hicache.weights_digest import weights_digest
from tests.unit.connectors.conftest import SAVED, Open, Places, write_model
from tests.unit.connectors.saving import save


def test_a_server_gets_the_small_files_and_the_digest_of_the_model_on_disk(
    kind: str, connect: Open, places: Places, model: Path, tmp_path: Path
) -> None:
    url = places.new(kind)
    save(model, connect(url=url))
    found = fetch_blocking(url, tmp_path / "run")
    folder = Path(found.directory)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {*SAVED, MANIFEST_NAME} - {"model-1.safetensors", "model-2.safetensors"}
    assert all((folder / name).read_bytes() == (model / name).read_bytes() for name in names - {MANIFEST_NAME})
    assert found.weights_digest == weights_digest(str(model), str(tmp_path / "no-cache"))
    weights = [model / f"model-{number}.safetensors" for number in (1, 2)]
    assert found.weights_bytes == sum(file.stat().st_size for file in weights)
    assert found.url == url and "@" not in found.public_url


@pytest.mark.parametrize("kind", ["s3", "redis"])
def test_a_plain_folder_is_served_too(kind: str, connect: Open, places: Places, model: Path, tmp_path: Path) -> None:
    url = places.new(kind)
    place = connect(url=url)
    for name in SAVED:
        place.write_blocking(name, (model / name).read_bytes())
    found = fetch_blocking(url, tmp_path / "run")
    assert found.weights_digest == weights_digest(str(model), str(tmp_path / "no-cache"))
    place.write_blocking("model-1.safetensors", (model / "model-2.safetensors").read_bytes())
    manifest = decode_manifest((tmp_path / "run" / MANIFEST_NAME).read_bytes(), "here")
    with pytest.raises(StorageError, match="key 'model-1.safetensors': these are not the bytes"):
        StoredModel(place, manifest).read_chunk_blocking(manifest.files[0], 0)


def test_a_plain_folder_here_is_what_it_is(model: Path, tmp_path: Path) -> None:
    found = fetch_blocking(f"file://{model}", tmp_path / "run")
    assert (found.directory, found.url) == (str(model), "") and not (tmp_path / "run").exists()


def test_small_files_and_weights_are_of_one_model(
    connect: Open, places: Places, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. The launcher has read the list. 2. Another model takes the place, and its uploader is killed before it removes
    the old one. 3. The config of the new one must not be served with the weights of the old one."""
    url = places.new("file")
    place = connect(url=url)
    save(model, place)
    write_model(tmp_path / "new", seed=2)
    (tmp_path / "new" / "config.json").write_text("{}")
    real = FileConnector.manifest_blocking

    def replaced(self: FileConnector) -> Manifest | None:
        found = real(self)
        with monkeypatch.context() as patch:
            patch.setattr(FileConnector, "manifest_blocking", real)
            patch.setattr(FileConnector, "delete_blocking", lambda self, keys: None)
            save(tmp_path / "new", place, overwrite=True)
        return found

    monkeypatch.setattr(FileConnector, "manifest_blocking", replaced)
    found = fetch_blocking(url, tmp_path / "run")
    assert found.weights_digest == weights_digest(str(model), str(tmp_path / "no-cache"))
    assert Path(found.directory, "config.json").read_bytes() == (model / "config.json").read_bytes()


@pytest.mark.parametrize("is_saved", [True, False])
def test_a_store_does_not_fill_the_disk(
    is_saved: bool, connect: Open, places: Places, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_MOST_PULLED_BYTES", 1000)
    url = places.new("redis")
    if is_saved:
        save(model, connect(url=url))
    else:
        connect(url=url).write_blocking("config.json", bytes(1001))
    with pytest.raises(UserError, match="more than 1000 are no part of a model"):
        fetch_blocking(url, tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_a_whole_bucket_is_no_model(
    connect: Open, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_MOST_FILES", 2)
    url = places.new("redis")
    for number in range(3):
        connect(url=url).write_blocking(f"{number}.json", b"{}")
    with pytest.raises(UserError, match="holds more than 2 files"):
        fetch_blocking(url, tmp_path / "run")


def test_a_folder_in_the_place_of_the_list_is_said(connect: Open, places: Places, model: Path, tmp_path: Path) -> None:
    url = places.new("redis")
    for name in SAVED:
        connect(url=url).write_blocking(name, (model / name).read_bytes())
    connect(url=url).write_blocking("hicache-model.json/x.json", b"{}")
    with pytest.raises(UserError, match="key 'hicache-model.json': it cannot be written"):
        fetch_blocking(url, tmp_path / "run")


def test_a_plain_folder_is_read_although_a_connection_breaks(
    connect: Open, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_model, "_PAUSES_S", (0.01,))
    place = connect("redis")
    place.write_blocking("model.safetensors", (model / "model-1.safetensors").read_bytes())
    real, failures = place.read_blocking, [StorageError("the connection broke", "io")]

    def read(key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        if failures:
            raise failures.pop()
        return real(key, start, size_bytes)

    monkeypatch.setattr(place, "read_blocking", read)
    (file,) = source.scan_blocking(place, tmp_path).files
    assert file.sha256 == hashlib.sha256((model / "model-1.safetensors").read_bytes()).hexdigest() and not failures


def test_a_shard_that_is_missing_is_named(connect: Open, places: Places, model: Path, tmp_path: Path) -> None:
    url = places.new("s3")
    place = connect(url=url)
    for name in SAVED:
        if name != "model-2.safetensors":
            place.write_blocking(name, (model / name).read_bytes())
    with pytest.raises(UserError, match="model-2.safetensors is missing: model.safetensors.index.json names it"):
        fetch_blocking(url, tmp_path / "run")


@pytest.mark.parametrize("kind", ["redis", "s3"])
def test_nothing_there_is_said(kind: str, connect: Open, places: Places, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no model: neither hicache-model.json nor"):
        fetch_blocking(places.new(kind), tmp_path / "run")


@pytest.mark.parametrize("name", ["../evil.json", "a/../../evil.json", "/evil.json", "nul\0.json", "a//b.json"])
def test_a_key_that_would_escape_is_refused_by_name(name: str, connect: Open, places: Places, tmp_path: Path) -> None:
    """1. Somebody puts `<model>/../evil.json` into the store. 2. Elsewhere a server wrote it beside its folder."""
    url = places.new("redis")
    connect(url=url).write_blocking(name, b"{}")
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="would lead out of the folder") as caught:
        fetch_blocking(url, tmp_path / "in" / "run")
    assert repr(name) in str(caught.value)
    assert not list(tmp_path.rglob("*evil*"))


def test_a_file_is_never_written_through_a_link(connect: Open, places: Places, tmp_path: Path) -> None:
    place = connect("redis")
    place.write_blocking("config.json", b"{}")
    (tmp_path / "run").mkdir()
    os.symlink(tmp_path / "target", tmp_path / "run" / "config.json")
    with pytest.raises(UserError, match="config.json"):
        place.pull_files(str(tmp_path / "run"))
    assert not (tmp_path / "target").exists()
