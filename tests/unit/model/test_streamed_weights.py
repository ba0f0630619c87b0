"""Weights from a store: the same as from a folder, each rank its share, a few chunks in memory at a time."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, PreTrainedModel

from sglang_hicache.connectors import source, stored_model
from sglang_hicache.connectors.create import create_remote_connector
from sglang_hicache.connectors.file import FileConnector
from sglang_hicache.connectors.manifest import MANIFEST_NAME, encode_manifest
from sglang_hicache.connectors.safetensors_header import parse_header
from sglang_hicache.connectors.source import fetch_blocking
from sglang_hicache.connectors.stored_model import READ_AHEAD, Extent, StoredModel
from sglang_hicache.connectors.upload import Upload
from sglang_hicache.connectors.upload_source import FolderSource
from sglang_hicache.errors import StorageError, UserError
from sglang_hicache.workers import models
from sglang_hicache.workers.parallel import TensorGroup
from sglang_hicache.workers.weights import load_model
from tests.unit.model.support import config_of, greedy_batch, model_config, open_worker, prompts, save_model

#: Not a divisor of anything: rows, and elements of unaligned files, lie across the ends of chunks.
CHUNK_BYTES = 4099


def stored(folder: Path, chunk_bytes: int = CHUNK_BYTES) -> str:
    """The model of a folder, saved beside it; its URL."""
    url = f"file://{folder.parent}/store-{folder.name}-{chunk_bytes}"
    with create_remote_connector(url) as place:
        Upload(FolderSource(str(folder), chunk_bytes), place, lambda *told: None, overwrite=True).run_blocking()
    return url


def load(
    folder: str, config: PretrainedConfig, rank: int, size: int, dtype: torch.dtype, url: str = ""
) -> PreTrainedModel:
    """One rank's model; the ranks need not meet to load."""
    group = TensorGroup(rank, size)
    return load_model(folder, config, dtype=dtype, device=torch.device("cpu"), group=group, weights_url=url)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of chunks that were read from a store."""
    keys: list[str] = []
    real = FileConnector.read_blocking

    def read(self: FileConnector, key: str, start: int = 0, size_bytes: int | None = None) -> bytes:
        keys.append(key)
        return real(self, key, start, size_bytes)

    monkeypatch.setattr(FileConnector, "read_blocking", read)
    return keys


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rank_gets_what_a_folder_gives(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Rows, columns, repeated KV heads (four ranks, fewer heads), biases, tied embeddings; converted on the way."""
    folder = tmp_path / "model"
    save_model(folder, config_of(name))
    url = stored(folder)
    pulled = fetch_blocking(url, tmp_path / "run").directory
    config = models.read_config(pulled)
    for size, ranks in ((1, [0]), (2, [0, 1]), (4, [3])):
        for rank in ranks:
            wanted = dict(load(str(folder), config, rank, size, dtype).named_parameters())
            found = dict(load(pulled, config, rank, size, dtype, url).named_parameters())
            assert found.keys() == wanted.keys()
            assert not [key for key in wanted if not torch.equal(found[key], wanted[key])], (size, rank)


def test_a_folder_that_was_copied_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its chunks are parts of whole objects."""
    monkeypatch.setattr(source, "CHUNK_BYTES", CHUNK_BYTES)
    folder, pulled = tmp_path / "model", tmp_path / "run"
    save_model(folder, config_of("qwen3"))
    pulled.mkdir()
    (pulled / "config.json").write_bytes((folder / "config.json").read_bytes())
    with create_remote_connector(f"file://{folder}") as place:
        manifest = source.scan_blocking(place, pulled)
    assert manifest.layout == "whole" and len(manifest.files[0].chunks) > 10
    (pulled / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    config = models.read_config(str(pulled))
    wanted = dict(load(str(folder), config, 1, 2, torch.float32).named_parameters())
    found = dict(load(str(pulled), config, 1, 2, torch.float32, f"file://{folder}").named_parameters())
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_tensors_that_start_anywhere(tmp_path: Path) -> None:
    """A file whose tensors are not where the machine would have them, as some writers make it."""
    folder = tmp_path / "model"
    save_model(folder, config_of("llama3"))
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip(b" ") + b" "
    header += b" " * (1 - len(header) % 2)
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert (8 + len(header)) % 4, "the file is aligned: nothing is tested"
    url = stored(folder)
    pulled = fetch_blocking(url, tmp_path / "run").directory
    config = models.read_config(pulled)
    wanted = load_file(file)
    found = load(pulled, config, 0, 1, torch.float32, url).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_the_text_is_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(folder, config_of("llama"))
    url = stored(folder)
    found = fetch_blocking(url, tmp_path / "run")
    wanted = prompts([50, 9])
    texts = []
    for config in (
        model_config(folder),
        model_config(Path(found.directory), weights_url=url, weights_digest=found.weights_digest),
    ):
        worker = open_worker(config, 16)
        texts.append(greedy_batch(worker, wanted, 12))
        worker.close()
    assert texts[0] == texts[1]


def test_a_rank_reads_its_rows_and_every_chunk_once(tmp_path: Path, reads: list[str]) -> None:
    """All columns of a matrix pass by every rank; of rows it reads its own, and of the vocabulary all."""
    folder = tmp_path / "model"
    save_model(folder, config_of("qwen3"))
    url = stored(folder)
    pulled = fetch_blocking(url, tmp_path / "run").directory
    config = models.read_config(pulled)
    counts = {}
    for size in (1, 2):
        reads.clear()
        load(pulled, config, 0, size, torch.float32, url)
        header, *swept = reads
        counts[size] = len(swept)
        assert len(set(swept)) == len(swept), "a chunk was read twice"
    assert counts[2] < 0.9 * counts[1]


def test_few_chunks_are_in_memory_at_a_time(tmp_path: Path) -> None:
    """64 MiB through 8 MiB of room: what numpy and Python allocate is counted, and torch's own is the parameters."""
    chunk_bytes, rows = 1 << 20, 64
    folder = tmp_path / "model"
    save_model(folder, config_of("llama"))
    (folder / "model.safetensors").unlink()
    save_file({"big": torch.arange(rows << 18, dtype=torch.float32).view(rows, -1)}, folder / "model.safetensors")
    url = stored(folder, chunk_bytes)
    with create_remote_connector(url) as place:
        manifest = place.manifest_blocking()
        assert manifest is not None
        file = manifest.file("model.safetensors")
        assert file is not None and file.size_bytes > rows * chunk_bytes
        tracemalloc.start()
        seen = 0
        for fragment in place.weight_iterator([Extent(file.name, 0, file.size_bytes)]):
            seen += len(fragment.data)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert seen == file.size_bytes
    assert peak_bytes < (READ_AHEAD + 3) * chunk_bytes


def test_loading_needs_no_second_copy(tmp_path: Path) -> None:
    """The same for all that a rank does to load: what Python holds at any time, beside the parameters."""
    folder = tmp_path / "model"
    large = config_of("llama3")
    large.vocab_size = 16_384
    save_model(folder, large)
    url = stored(folder, 1 << 16)
    pulled = fetch_blocking(url, tmp_path / "run").directory
    config = models.read_config(pulled)
    load(pulled, config, 0, 2, torch.float32, url)  # what is imported or cached the first time does not count
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    model = load(pulled, config, 0, 2, torch.float32, url)
    peak_bytes = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    weights_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert weights_bytes > 6_000_000
    assert peak_bytes < weights_bytes / 4, (peak_bytes, weights_bytes)


@pytest.mark.parametrize("spoil", ["flip", "gone"])
def test_a_chunk_that_is_wrong_stops_the_rank_and_is_named(spoil: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(folder, config_of("llama"))
    url = stored(folder)
    pulled = fetch_blocking(url, tmp_path / "run").directory
    with create_remote_connector(url) as place:
        key = next(entry.key for entry in place.entries_blocking("files/model.safetensors/000007-"))
        data = bytes(place.read_blocking(key))
        place.delete_blocking([key])
        if spoil == "flip":
            place.write_blocking(key, data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(StorageError) as caught:
        load(pulled, models.read_config(pulled), 0, 1, torch.float32, url)
    assert key in str(caught.value) and f"file://{tmp_path}/store" in str(caught.value)


def test_what_does_not_fit_the_config_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(folder, config_of("llama"))
    tensors = load_file(folder / "model.safetensors")
    for name, change in (
        ("no tensor", lambda name: tensors.pop(name)),
        ("of shape", lambda name: tensors.update({name: torch.zeros(3, 3)})),
    ):
        change("model.layers.0.mlp.up_proj.weight")
        save_file(tensors, folder / "model.safetensors")
        url = stored(folder)
        pulled = fetch_blocking(url, tmp_path / name).directory
        with pytest.raises(UserError, match=f"{name}.*up_proj|up_proj.*{name}"):
            load(pulled, models.read_config(pulled), 0, 1, torch.float32, url)


@pytest.mark.parametrize(
    "beginning",
    [
        b"short",
        (1 << 40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (70).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400000]}}'.ljust(70),
        (70).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}'.ljust(70),
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(beginning: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(folder, config_of("llama"))
    (folder / "model.safetensors").write_bytes(beginning)
    url = stored(folder)
    pulled = fetch_blocking(url, tmp_path / "run").directory
    with pytest.raises(UserError, match="model.safetensors"):
        load(pulled, models.read_config(pulled), 0, 1, torch.float32, url)


def respelled(folder: Path, name: str, dtype: bytes) -> None:
    """From now on the file says that a tensor is of this dtype, and is as long as it was."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    at = data.index(f'"{name}":{{"dtype":"F32"'.encode()) + len(name) + 13
    assert data[at : at + 3] == b"F32" and len(dtype) == 3
    file.write_bytes(data[:at] + dtype + data[at + 3 :])


def test_a_tensor_of_a_million_dimensions_is_not_counted() -> None:
    """Their product has a million digits, and takes an hour."""
    header = b'{"a":{"dtype":"F32","shape":[9' + b",9" * 99 + b'],"data_offsets":[0,0]}}'
    with pytest.raises(UserError, match="here: tensor a has 100 dimensions"):
        parse_header(len(header).to_bytes(8, "little") + header, "file", 1000, "here")


def test_a_dtype_that_nobody_knows_is_refused_where_it_is_wanted(tmp_path: Path) -> None:
    """A file may have tensors that this model does not want; a folder with such a file is served, too."""
    folder = tmp_path / "model"
    save_model(folder, config_of("llama"))
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "other": torch.zeros(3)}, folder / "model.safetensors")
    respelled(folder, "other", b"Q4X")
    url = stored(folder)
    pulled = fetch_blocking(url, tmp_path / "one").directory
    found = load(pulled, models.read_config(pulled), 0, 1, torch.float32, url).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items() if name in found)
    respelled(folder, "model.norm.weight", b"Q4X")
    url = stored(folder)
    pulled = fetch_blocking(url, tmp_path / "two").directory
    with pytest.raises(UserError, match="model.safetensors: tensor model.norm.weight is Q4X, which is not supported"):
        load(pulled, models.read_config(pulled), 0, 1, torch.float32, url)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.float8_e4m3fn])
def test_numbers_of_every_kind_are_converted_as_from_a_folder(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(folder, config_of("llama"))
    tensors = load_file(folder / "model.safetensors")
    norm = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = torch.arange(norm.numel()).to(torch.float32).to(dtype)
    save_file(tensors, folder / "model.safetensors")
    url = stored(folder)
    pulled = fetch_blocking(url, tmp_path / "run").directory
    config = models.read_config(pulled)
    wanted = load(str(folder), config, 0, 1, torch.float32).model.norm.weight
    assert torch.equal(load(pulled, config, 0, 1, torch.float32, url).model.norm.weight, wanted) and wanted.sum()


def test_a_caller_that_stops_does_not_wait_for_readers_that_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. The first chunk is damaged, and the store breaks off at the others. 2. They would be tried again for hours."""
    monkeypatch.setattr(stored_model, "_PAUSES_S", (3600.0,))
    folder = tmp_path / "model"
    save_model(folder, config_of("llama"))
    with create_remote_connector(stored(folder)) as place:
        manifest = place.manifest_blocking()
        assert manifest is not None
        reached = threading.Event()

        def read(key: str, start: int = 0, size_bytes: int | None = None) -> bytes:
            if "/000000-" in key:
                assert reached.wait(60)
                return b"damaged"
            reached.set()
            raise StorageError("the connection broke", "io")

        monkeypatch.setattr(place, "read_blocking", read)
        with pytest.raises(StorageError, match="not the bytes"):
            list(StoredModel(place, manifest).fragments([Extent("model.safetensors", 0, 50_000)]))


def test_a_caller_that_stops_leaves_no_thread(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(folder, config_of("llama"))
    with create_remote_connector(stored(folder)) as place:
        manifest = place.manifest_blocking()
        assert manifest is not None
        pieces: Iterator[object] = StoredModel(place, manifest).fragments([Extent("model.safetensors", 0, 50_000)])
        next(pieces)
        del pieces  # the leak check of every test looks for what is left
