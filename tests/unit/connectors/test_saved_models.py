"""A model is saved and pulled: whole or not at all, resumed, replaced in one step, and checked byte by byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from sglang_hicache.connectors.base import BaseWeightConnector
from sglang_hicache.connectors.manifest import (
    CHUNKS,
    MANIFEST_NAME,
    Manifest,
    ModelFile,
    chunk_key,
    decode_manifest,
    encode_manifest,
)
from sglang_hicache.connectors.source import fetch_blocking
from sglang_hicache.connectors.stored_model import StoredModel
from sglang_hicache.connectors.upload_source import FolderSource, PlainSource, StoreSource
from sglang_hicache.errors import StorageError, UserError
from tests.unit.connectors.conftest import CHUNK_BYTES, SAVED, Open, Places, write_model
from tests.unit.connectors.saving import chunks, contents, of_folder, save


class CutOff(Exception):
    """The upload ends here."""


def cut_off_after(place: BaseWeightConnector, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place takes so many writes, and then the process is ended."""
    real, left = place.write_blocking, [count]

    def write(key: str, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise CutOff
        real(key, data)

    monkeypatch.setattr(place, "write_blocking", write)


def test_what_was_saved_comes_back(kind: str, connect: Open, model: Path) -> None:
    place = connect(kind)
    saved = save(model, place)
    assert contents(place) == of_folder(model)
    assert saved.written_bytes == saved.manifest.size_bytes and not saved.skipped_bytes
    assert "pytorch_model.bin" in FolderSource(str(model)).left_out


def test_an_upload_that_is_cut_off_is_not_served_and_goes_on(
    kind: str, connect: Open, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = connect(kind)
    with monkeypatch.context() as patch:
        cut_off_after(place, 6, patch)
        with pytest.raises(CutOff):
            save(model, place)
    assert place.manifest_blocking() is None and 0 < len(chunks(place)) <= 6
    with pytest.raises(StorageError, match="no model that was saved to its end"):
        list(place.weight_iterator([]))
    half = sum(entry.size_bytes for entry in place.entries_blocking(CHUNKS))
    saved = save(model, place)
    assert saved.skipped_bytes == half and saved.written_bytes == saved.manifest.size_bytes - half
    assert contents(place) == of_folder(model)


def test_a_server_says_that_an_upload_has_not_ended(
    kind: str, connect: Open, places: Places, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = places.new(kind)
    place = connect(url=url)
    with monkeypatch.context() as patch:
        cut_off_after(place, 3, patch)
        with pytest.raises(CutOff):
            save(model, place)
    with pytest.raises(UserError, match="whose upload has not ended; run .*save_model again"):
        fetch_blocking(url, tmp_path / "run")


def test_a_chunk_that_was_written_in_part_is_written_again(connect: Open, model: Path) -> None:
    """1. A store keeps half of a value, as some do that lose power. 2. The next upload must not take it for whole."""
    place = connect("file")
    save(model, place)
    key = next(key for key in chunks(place) if "model-1" in key)
    place.delete_blocking([MANIFEST_NAME])
    place.write_blocking(key, bytes(place.read_blocking(key))[:-1])
    assert save(model, place).written_bytes == CHUNK_BYTES
    assert contents(place) == of_folder(model)


def test_the_same_model_again_changes_nothing(kind: str, connect: Open, model: Path) -> None:
    place = connect(kind)
    save(model, place)
    before = bytes(place.read_blocking(MANIFEST_NAME))
    again = save(model, place)
    assert (again.written_bytes, again.removed) == (0, 0)
    assert bytes(place.read_blocking(MANIFEST_NAME)) == before


def test_another_model_is_replaced_only_when_asked_and_in_one_step(
    kind: str, connect: Open, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = connect(kind)
    save(model, place)
    write_model(tmp_path / "new", seed=2)
    with pytest.raises(UserError, match="holds another model; --overwrite replaces it"):
        save(tmp_path / "new", place)
    assert contents(place) == of_folder(model)
    with monkeypatch.context() as patch:
        cut_off_after(place, 5, patch)
        with pytest.raises(CutOff):
            save(tmp_path / "new", place, overwrite=True)
    assert contents(place) == of_folder(model), "the old one is served until the new one is whole"
    saved = save(tmp_path / "new", place, overwrite=True)
    assert contents(place) == of_folder(tmp_path / "new")
    assert saved.removed and set(chunks(place)) == saved.manifest.keys(), "nothing of the old one is left"


def test_a_reader_of_a_model_that_was_replaced_fails_and_names_the_key(
    kind: str, connect: Open, model: Path, tmp_path: Path
) -> None:
    place = connect(kind)
    old = save(model, place).manifest
    write_model(tmp_path / "new", seed=2)
    save(tmp_path / "new", place, overwrite=True)
    file = next(file for file in old.files if file.name == "model-1.safetensors")
    with pytest.raises(StorageError, match=r"key 'files/model-1.safetensors/000001-\w+' of this model is gone"):
        StoredModel(place, old).read_chunk_blocking(file, 1)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:-1], lambda d: b""]
)
def test_a_damaged_chunk_is_found_and_named(
    kind: str, connect: Open, model: Path, damage: Callable[[bytes], bytes]
) -> None:
    place = connect(kind)
    manifest = save(model, place).manifest
    file = manifest.file("model-2.safetensors")
    assert file is not None
    key = manifest.place(file, 2).key
    place.write_blocking(key, damage(bytes(place.read_blocking(key))))
    with pytest.raises(StorageError) as caught:
        contents(place)
    assert key in str(caught.value) and "not the bytes of 'model-2.safetensors' that were saved" in str(caught.value)


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b"[]", b"\xff\xfe", b'{"format":"x","version":1,"sha256":"","model":{}}']
)
def test_a_manifest_that_is_none_is_refused(connect: Open, damaged: bytes) -> None:
    place = connect("file")
    place.write_blocking(MANIFEST_NAME, damaged)
    with pytest.raises(StorageError, match=MANIFEST_NAME):
        place.manifest_blocking()


def test_every_changed_byte_of_a_manifest_is_found(model: Path, connect: Open) -> None:
    data = encode_manifest(save(model, connect("file")).manifest)
    for at in range(0, len(data), 97):
        damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        with pytest.raises(StorageError):
            decode_manifest(damaged, "here")


def _file(**fields: object) -> ModelFile:
    return msgspec.structs.replace(ModelFile("a", 5, "0" * 64, ("1" * 64,)), **fields)


@pytest.mark.parametrize(
    "files",
    [
        (_file(name="../a"),),
        (_file(name="/a"),),
        (_file(), _file()),
        (_file(size_bytes=-1, chunks=()),),
        (_file(size_bytes=5000),),
        (_file(chunks=()),),
        (_file(sha256="x"),),
        (_file(chunks=("../../../etc/passwd",)),),
    ],
)
def test_a_manifest_whose_sum_is_right_may_still_be_wrong(files: tuple[ModelFile, ...]) -> None:
    """Whoever wrote it may not have been us."""
    with pytest.raises(StorageError, match="cannot be used"):
        decode_manifest(encode_manifest(Manifest(chunk_bytes=4096, files=files)), "here")


@pytest.mark.parametrize("model", [b'{"files":[{"name":"\xff"', b'{"files":' + b"[" * 100_000])
def test_a_manifest_whose_sum_is_right_may_be_no_text(model: bytes) -> None:
    model += b"]" * model.count(b"[") + b"}"
    model = model.replace(b'\xff"', b'\xff"}')
    digest = hashlib.sha256(model).hexdigest().encode()
    whole = b'{"format":"sglang-hicache model","version":1,"sha256":"%b","model":%b}' % (digest, model)
    with pytest.raises(StorageError, match="cannot be used|is no manifest"):
        decode_manifest(whole, "here")


def test_a_name_says_one_file_only() -> None:
    names = ["a/b", "a!2Fb", "a b", "a_b", "ü", "..x", ".x", "x" * 300, "x" * 301, "%2F", "A", "a"]
    keys = {chunk_key(name, 0, "0" * 64) for name in names}
    assert len(keys) == len(names)
    assert all(len(part) <= 200 and not part.startswith(".") for key in keys for part in key.split("/"))


def test_a_place_that_holds_something_else_is_refused_before_it_is_written_to(
    kind: str, connect: Open, model: Path
) -> None:
    place = connect(kind)
    place.write_blocking("somebody's.txt", b"theirs")
    with pytest.raises(UserError, match="holds something else .*somebody's.txt"):
        save(model, place)
    assert [entry.key for entry in place.entries_blocking()] == ["somebody's.txt"]


@pytest.mark.parametrize("name", ["files/thesis.doc", "files/a/000001-x", f"files/a/b/000001-{'0' * 64}"])
def test_what_is_no_chunk_is_somebody_s_wherever_it_lies(
    name: str, kind: str, connect: Open, model: Path, tmp_path: Path
) -> None:
    """1. A folder has a folder `files`. 2. A model is saved there. 3. Once all of `files` was taken for old chunks."""
    place = connect(kind)
    place.write_blocking(name, b"theirs")
    with pytest.raises(UserError, match=f"holds something else .*{name}"):
        save(model, place)
    place.delete_blocking([name])
    save(model, place)
    place.write_blocking(name, b"theirs")
    write_model(tmp_path / "new", seed=2)
    assert save(tmp_path / "new", place, overwrite=True).removed
    assert bytes(place.read_blocking(name)) == b"theirs"


def test_what_an_upload_leaves_that_was_killed_is_removed(places: Places, connect: Open, model: Path) -> None:
    url = places.new("file")
    place, folder = connect(url=url), Path(url.removeprefix("file://").replace("%20", " "))
    for name in (f"files/a/.partial-{'0' * 16}", f".partial-{'1' * 16}", ".partial-of-somebody"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"half")
    save(model, place)
    assert [path.name for path in folder.rglob(".partial*")] == [".partial-of-somebody"]
    assert not (folder / "files" / "a").exists()


def test_a_file_that_changes_while_it_is_read_is_refused(connect: Open, model: Path) -> None:
    source = FolderSource(str(model), CHUNK_BYTES)
    with open(model / "model-2.safetensors", "ab") as file:
        file.write(b"more")
    place = connect("file")
    with pytest.raises(UserError, match="model-2.safetensors changed while it was read"):
        save(source, place)
    assert place.manifest_blocking() is None


def test_a_store_that_drops_what_it_is_given_is_found_before_anybody_is_served(
    connect: Open, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that evicts says OK to every write."""
    place = connect("redis")
    real = place.write_blocking

    def forget(key: str, data: bytes) -> None:
        if "tokenizer.model" not in key:
            real(key, data)

    monkeypatch.setattr(place, "write_blocking", forget)
    with pytest.raises(StorageError, match="'files/tokenizer.model/.*' is not there although it was written"):
        save(model, place)
    assert place.manifest_blocking() is None


def test_a_write_that_fails_once_is_tried_again(connect: Open, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = connect("redis")
    real, failures = place.write_blocking, [StorageError("the connection broke", "io")]

    def write(key: str, data: bytes) -> None:
        if failures:
            raise failures.pop()
        real(key, data)

    monkeypatch.setattr(place, "write_blocking", write)
    save(model, place)
    assert contents(place) == of_folder(model)


def test_a_model_goes_from_one_store_to_another(connect: Open, model: Path, places: Places) -> None:
    redis, s3 = connect("redis"), connect("s3")
    manifest = save(model, redis).manifest
    saved = save(StoreSource(redis, manifest), s3)
    assert saved.manifest == manifest and contents(s3) == of_folder(model)


def test_a_plain_folder_in_a_store_is_saved_elsewhere(connect: Open, model: Path) -> None:
    plain, file = connect("s3"), connect("file")
    for name in SAVED:
        plain.write_blocking(name, (model / name).read_bytes())
    plain.write_blocking("pytorch_model.bin", b"x")
    save(PlainSource(plain), file)
    assert contents(file) == of_folder(model)


def test_five_thousand_chunks(connect: Open, model: Path) -> None:
    """What is there is found by listings, which have many pages: a chunk that one of them lacks would be written anew,
    and one of an earlier model stay for ever."""
    with open(model / "model-1.safetensors", "ab") as file:
        for number in range(5000):
            file.write(number.to_bytes(4, "little") * (CHUNK_BYTES // 4))
    place = connect("redis")
    saved = save(model, place)
    assert len(chunks(place)) > 5000 and set(chunks(place)) == saved.manifest.keys()
    place.delete_blocking([MANIFEST_NAME])
    assert save(model, place).written_bytes == 0
    write_model(model.with_name("other"), seed=2)
    assert save(model.with_name("other"), place, overwrite=True).removed > 5000
    assert len(chunks(place)) < 50


def test_two_models_in_one_store_have_nothing_in_common(
    kind: str, connect: Open, places: Places, model: Path, tmp_path: Path
) -> None:
    write_model(tmp_path / "other", seed=2)
    one, two = (connect(url=places.at(kind, f"shared-{kind}/{name}")) for name in ("model", "model-2"))
    save(model, one)
    save(tmp_path / "other", two)
    assert contents(one) == of_folder(model) and contents(two) == of_folder(tmp_path / "other")
    save(tmp_path / "other", one, overwrite=True)
    assert contents(one) == contents(two) == of_folder(tmp_path / "other")


def test_the_digest_of_a_file_is_that_of_its_bytes(connect: Open, model: Path) -> None:
    for file in save(model, connect("file")).manifest.files:
        assert file.sha256 == hashlib.sha256((model / file.name).read_bytes()).hexdigest()
