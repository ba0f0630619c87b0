"""Where a model comes from that is to be saved: a folder here, or another store."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path
from typing import NamedTuple, Protocol

from sglang_hicache.connectors.base import WEIGHTS, BaseWeightConnector
from sglang_hicache.connectors.manifest import CHUNK_BYTES, MANIFEST_NAME, Manifest
from sglang_hicache.connectors.stored_model import Buffer, StoredModel
from sglang_hicache.errors import UserError
from sglang_hicache.weights_digest import weight_files


class SourceFile(NamedTuple):
    """A file that is to be saved."""

    name: str
    size_bytes: int
    #: What is known of it without reading it; empty for nothing.
    sha256: str = ""
    chunks: tuple[str, ...] = ()


class Source(Protocol):
    """Files, read chunk by chunk."""

    chunk_bytes: int
    files: list[SourceFile]

    def read_blocking(self, file: SourceFile, number: int) -> Buffer:
        """A chunk; all have `chunk_bytes`, but for the last one of a file."""


class FolderSource:
    """A model directory: its weights, and whatever else is no weights of another form and is not hidden."""

    def __init__(self, directory: str, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes
        self._folder = Path(directory)
        weights = {file.name for file in weight_files(directory)}
        #: Names of files that are left out.
        self.left_out: list[str] = []
        self._status: dict[str, tuple[int, int]] = {}
        self.files = [self._file(name) for name in self._names(weights)]

    def read_blocking(self, file: SourceFile, number: int) -> bytes:
        """UserError: somebody has changed the file."""
        path = self._folder / file.name
        try:
            with open(path, "rb") as stream:
                stream.seek(number * self.chunk_bytes)
                data = stream.read(self.chunk_bytes)
                status = os.fstat(stream.fileno())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        expected = min(self.chunk_bytes, file.size_bytes - number * self.chunk_bytes)
        if len(data) != expected or (status.st_size, status.st_mtime_ns) != self._status[file.name]:
            raise UserError(f"{path} changed while it was read; try again when it is whole")
        return data

    def _names(self, weights: set[str]) -> list[str]:
        names: list[str] = []
        for where, folders, files in os.walk(self._folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            # A link to a folder is not followed: it may lead in a circle.
            links = [Path(where, name) for name in folders if Path(where, name).is_symlink()]
            self.left_out += [f"{path.relative_to(self._folder)}/" for path in links]
            for file in files:
                name = str(Path(where, file).relative_to(self._folder))
                is_wanted = (name in weights or not _is_left_out(name)) and Path(where, file).is_file()
                (names if is_wanted else self.left_out).append(name)
        self.left_out.sort()
        return sorted(names)

    def _file(self, name: str) -> SourceFile:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{self._folder}: the name of the file {name!r} is no UTF-8; rename it") from None
        status = (self._folder / name).stat()
        self._status[name] = status.st_size, status.st_mtime_ns
        return SourceFile(name, status.st_size)


class StoreSource:
    """A model that was saved somewhere: its chunks go on as they are."""

    def __init__(self, place: BaseWeightConnector, manifest: Manifest) -> None:
        self.chunk_bytes = manifest.chunk_bytes
        self.files = [SourceFile(file.name, file.size_bytes, file.sha256, file.chunks) for file in manifest.files]
        self._model = StoredModel(place, manifest)
        self._by_name = {file.name: file for file in manifest.files}

    def read_blocking(self, file: SourceFile, number: int) -> Buffer:
        """Checked, as everybody does who reads a chunk."""
        return self._model.read_chunk_blocking(self._by_name[file.name], number)


class PlainSource:
    """A folder that somebody copied into a store."""

    chunk_bytes = CHUNK_BYTES

    def __init__(self, place: BaseWeightConnector) -> None:
        self._place = place
        self.files = sorted(
            SourceFile(entry.key, entry.size_bytes)
            for entry in place.files_blocking()
            if entry.key.endswith(".safetensors") or not _is_left_out(entry.key)
        )
        if not any(file.name.endswith(".safetensors") for file in self.files):
            raise UserError(f"{place.url} holds no *.safetensors: there is no model to save")

    def read_blocking(self, file: SourceFile, number: int) -> Buffer:
        """UserError: it has another size by now."""
        start = number * self.chunk_bytes
        expected = min(self.chunk_bytes, file.size_bytes - start)
        data = self._place.read_blocking(file.name, start, expected)
        if len(data) != expected:
            raise UserError(f"{self._place.url}: {file.name!r} changed while it was read; try again")
        return data


def _is_left_out(name: str) -> bool:
    """Weights in other forms, and what is hidden."""
    parts = name.split("/")
    is_weights = any(fnmatch.fnmatchcase(parts[-1], pattern) for pattern in WEIGHTS)
    return is_weights or name == MANIFEST_NAME or any(part.startswith(".") for part in parts)
