"""A model in a store, as a server uses it: small files in a folder of the run, weights where they are.

`fetch_blocking` is the launcher's, once per start: it finds out what the model consists of, pulls what is no weights,
and leaves the manifest beside it.  Ranks read by that manifest (`open_blocking`), not by one that the store has by
then: all of them have the same weights, and those that the digest in a page's name stands for.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from sglang_hicache.connectors.base import SMALL_FILES, BaseWeightConnector, Entry, writing
from sglang_hicache.connectors.create import create_remote_connector
from sglang_hicache.connectors.manifest import (
    CHUNK_BYTES,
    CHUNKS,
    MANIFEST_NAME,
    Manifest,
    ModelFile,
    decode_manifest,
    encode_manifest,
    is_chunk_key,
)
from sglang_hicache.connectors.stored_model import patiently_blocking
from sglang_hicache.connectors.url import parse_url
from sglang_hicache.errors import StorageError, UserError
from sglang_hicache.weights_digest import INDEX_NAME, SINGLE_NAME, digest_of_files, names_in_index

_log = logging.getLogger(__name__)

#: Of everything that is pulled: a store must not be able to fill the disk of a server.
_MOST_PULLED_BYTES = 2 << 30


class RemoteModel(NamedTuple):
    """A model that was found in a store; the rest is empty where it turned out to be a folder here."""

    #: Folder here that has everything but the weights, and the manifest.
    directory: str
    #: With user and password.
    url: str = ""
    public_url: str = ""
    weights_bytes: int = 0
    weights_digest: str = ""


def fetch_blocking(url: str, folder: Path) -> RemoteModel:
    """Make `folder`, with the small files of the model.  UserError: there is none; StorageError: it cannot be had."""
    found = parse_url(url)
    with create_remote_connector(url) as place:
        manifest = place.manifest_blocking()
        if manifest is None:
            _refuse_half(place)
        if manifest is None and found.scheme == "file":
            return RemoteModel(f"/{found.path}")  # a plain folder: mapped into memory, and its digest remembered
        folder.mkdir(mode=0o700)
        place.pull_files(str(folder), allow=SMALL_FILES, manifest=manifest, most_bytes=_MOST_PULLED_BYTES)
        if manifest is None:
            manifest = scan_blocking(place, folder)
    with writing(folder, MANIFEST_NAME, found.public) as output:
        output.write(encode_manifest(manifest))
    files = weight_files(manifest, folder, found.public)
    return RemoteModel(
        str(folder),
        url,
        found.public,
        sum(file.size_bytes for file in files),
        digest_of_files((file.name, file.sha256) for file in files),
    )


def _refuse_half(place: BaseWeightConnector) -> None:
    """Chunks without a manifest are what an upload has left that was cut off."""
    first = next(place.entries_blocking(CHUNKS), None)
    if first is not None and is_chunk_key(first.key):
        raise UserError(
            f"{place.url} holds a model whose upload has not ended; run python -m sglang_hicache.save_model again, it "
            "goes on where it was"
        )


def open_blocking(url: str, directory: str) -> tuple[BaseWeightConnector, Manifest]:
    """What a rank streams from; `directory`: of `fetch_blocking`.  The connector is the caller's to close."""
    path = Path(directory, MANIFEST_NAME)
    return create_remote_connector(url), decode_manifest(path.read_bytes(), str(path))


def weight_files(manifest: Manifest, folder: Path, where: str) -> list[ModelFile]:
    """The files with weights in name order; `folder` has the index, if there is one."""
    known = {file.name: file for file in manifest.files}
    names = _weight_names(known, folder, where)
    missing = [name for name in names if name not in known]
    if missing:
        raise UserError(f"{where}: {missing[0]} is missing: {INDEX_NAME} names it; save the model again")
    return [known[name] for name in names]


def _weight_names(known: Iterable[str], folder: Path, where: str) -> list[str]:
    """As `weights_digest.weight_files` finds them in a folder: a server from a disk must come to the same digest."""
    index = folder / INDEX_NAME
    if index.is_file():
        return names_in_index(index, f"{where}, {INDEX_NAME}")
    if SINGLE_NAME in known:
        return [SINGLE_NAME]
    names = sorted(name for name in known if "/" not in name and name.endswith(".safetensors"))
    if not names:
        raise UserError(
            f"{where} holds no model: neither {MANIFEST_NAME} nor *.safetensors is there; put one there with "
            "python -m sglang_hicache.save_model"
        )
    return names


def scan_blocking(place: BaseWeightConnector, folder: Path) -> Manifest:
    """A manifest of the weights of a plain folder, which are read once for it; `folder` has its small files."""
    _log.info("%s was copied there and not saved: its weights are read twice; save_model spares that", place.url)
    entries = {entry.key: entry for entry in place.files_blocking()}
    names = _weight_names(entries, folder, place.url)
    missing = [name for name in names if name not in entries]
    if missing:
        raise UserError(f"{place.url}: {missing[0]} is missing: {INDEX_NAME} names it; copy the model again")
    return Manifest(
        chunk_bytes=CHUNK_BYTES,
        layout="whole",
        files=tuple(_scan_file_blocking(place, entries[name]) for name in names),
    )


def _scan_file_blocking(place: BaseWeightConnector, entry: Entry) -> ModelFile:
    whole, chunks = hashlib.sha256(), []
    for start in range(0, entry.size_bytes, CHUNK_BYTES):
        size_bytes = min(CHUNK_BYTES, entry.size_bytes - start)
        data = patiently_blocking(functools.partial(place.read_blocking, entry.key, start, size_bytes))
        if len(data) != size_bytes:
            raise StorageError(f"{place.url}, key {entry.key!r}: it changed while it was read; try again", "io")
        whole.update(data)
        chunks.append(hashlib.sha256(data).hexdigest())
    return ModelFile(entry.key, entry.size_bytes, whole.hexdigest(), tuple(chunks))
