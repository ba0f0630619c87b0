"""Puts a model into a store: chunks first, each unless it is there; then the manifest; then what is left of others.

Used by `save_model`.  Reads and hashes on the caller's thread and writes on threads of its own, a few chunks at a
time.  Nobody is served what is not whole: a reader begins with the manifest, which is replaced in one step when all
that it lists is there.  An upload that was cut off leaves chunks, which the next one uses or removes.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from sglang_hicache.connectors.base import BaseWeightConnector
from sglang_hicache.connectors.manifest import (
    CHUNKS,
    MANIFEST_NAME,
    Manifest,
    ModelFile,
    Place,
    check_name,
    chunk_key,
    encode_manifest,
    is_chunk_key,
)
from sglang_hicache.connectors.stored_model import Buffer, patiently_blocking
from sglang_hicache.connectors.upload_source import Source
from sglang_hicache.errors import StorageError, UserError

_WRITERS = 4

#: Called with bytes that were written, and bytes that were there already.
Told = Callable[[int, int], None]


class Saved(NamedTuple):
    """What an upload has done."""

    manifest: Manifest
    written_bytes: int
    #: Chunks that were in the store already.
    skipped_bytes: int
    #: Chunks of other models, and of uploads that were cut off, that are gone now.
    removed: int


class Upload:
    """One model on its way into one place.  `overwrite`: another one there is replaced, and chunks that are there are
    read before they are believed."""

    def __init__(self, source: Source, place: BaseWeightConnector, told: Told, *, overwrite: bool) -> None:
        self._source = source
        self._place = place
        self._told = told
        self._overwrite = overwrite
        self._written_bytes = self._skipped_bytes = 0
        #: Nobody waits for a write any more.
        self._given_up = threading.Event()
        self._writing: deque[tuple[Future[None], int]] = deque()

    def run_blocking(self) -> Saved:
        """UserError: nothing was changed.  StorageError, KeyboardInterrupt: another run goes on where this one was."""
        for file in self._source.files:
            check_name(file.name)
        old = self._old_blocking()
        there = self._what_is_there_blocking(old)
        if old is not None and not self._overwrite and _shape(old) != _shape_of_source(self._source):
            raise self._another()
        pool = ThreadPoolExecutor(_WRITERS, thread_name_prefix="model-write")
        try:
            files = tuple(self._files(pool, there, may_write=old is None or self._overwrite))
            while self._writing:
                self._settle_one_blocking()
        finally:
            self._given_up.set()
            pool.shutdown(wait=True, cancel_futures=True)
        manifest = Manifest(chunk_bytes=self._source.chunk_bytes, files=files)
        keys = {place.key: place.size_bytes for file in files for place in _places(manifest, file)}
        found = {entry.key: entry.size_bytes for entry in self._place.entries_blocking(CHUNKS)}
        lost = next((key for key, size_bytes in keys.items() if found.get(key) != size_bytes), None)
        if lost is not None:
            raise StorageError(
                f"{self._place.url}: the key {lost!r} is not there although it was written: another upload removed it, "
                "or the store drops what it is given",
                "contract",
            )
        if old != manifest:
            patiently_blocking(lambda: self._place.write_blocking(MANIFEST_NAME, encode_manifest(manifest)))
        stale = sorted(key for key in found if key not in keys and is_chunk_key(key))
        self._place.delete_blocking(stale)
        self._place.tidy_blocking()
        return Saved(manifest, self._written_bytes, self._skipped_bytes, len(stale))

    def _old_blocking(self) -> Manifest | None:
        """What was saved there to its end.  A manifest that cannot be read is replaced only by who asks for it."""
        try:
            return self._place.manifest_blocking()
        except StorageError as error:
            if not self._overwrite or error.code not in ("foreign_format", "corrupt"):
                raise
            return None

    def _what_is_there_blocking(self, old: Manifest | None) -> dict[str, int]:
        """Sizes of the chunks that are there.  A place that holds something else is refused before it is written to:
        what is no chunk of ours is somebody's, wherever it lies."""
        there = {}
        for entry in self._place.entries_blocking(CHUNKS if old is not None else ""):
            if is_chunk_key(entry.key):
                there[entry.key] = entry.size_bytes
            elif old is None and not (self._overwrite and entry.key == MANIFEST_NAME):
                raise UserError(
                    f"{self._place.url} holds something else ({entry.key!r:.200}); give the model a place of its own"
                )
        return there

    def _files(self, pool: ThreadPoolExecutor, there: dict[str, int], *, may_write: bool) -> Iterator[ModelFile]:
        """Every file, once its last chunk is on its way."""
        unit = self._source.chunk_bytes
        for file in self._source.files:
            whole, chunks = hashlib.sha256(), []
            for number in range(-(-file.size_bytes // unit)):
                size_bytes = min(unit, file.size_bytes - number * unit)
                data: Buffer | None = None
                digest = file.chunks[number] if file.chunks else ""
                if not digest:
                    data = self._source.read_blocking(file, number)
                    digest = hashlib.sha256(data).hexdigest()
                    whole.update(data)
                chunks.append(digest)
                key = chunk_key(file.name, number, digest)
                if there.get(key) == size_bytes and self._is_right_blocking(key, digest):
                    self._skipped_bytes += size_bytes
                    self._told(0, size_bytes)
                elif not may_write:
                    raise self._another()
                else:
                    self._write(pool, key, self._source.read_blocking(file, number) if data is None else data)
            yield ModelFile(file.name, file.size_bytes, file.sha256 or whole.hexdigest(), tuple(chunks))

    def _is_right_blocking(self, key: str, digest: str) -> bool:
        """Does a chunk hold what its name says?  Nobody writes another one, so only who repairs a model looks."""
        if not self._overwrite:
            return True
        data = patiently_blocking(lambda: self._place.read_blocking(key))
        return hashlib.sha256(data).hexdigest() == digest

    def _write(self, pool: ThreadPoolExecutor, key: str, data: Buffer) -> None:
        if len(self._writing) >= _WRITERS:
            self._settle_one_blocking()
        call = pool.submit(patiently_blocking, lambda: self._place.write_blocking(key, bytes(data)), self._given_up)
        self._writing.append((call, len(data)))

    def _settle_one_blocking(self) -> None:
        call, size_bytes = self._writing.popleft()
        call.result()
        self._written_bytes += size_bytes
        self._told(size_bytes, 0)

    def _another(self) -> UserError:
        return UserError(
            f"{self._place.url} holds another model; --overwrite replaces it, and whoever is served from it meanwhile "
            "has the old one or the new one, never a mixture"
        )


def _places(manifest: Manifest, file: ModelFile) -> Iterator[Place]:
    return (manifest.place(file, number) for number in range(len(file.chunks)))


def _shape(manifest: Manifest) -> list[tuple[str, int]]:
    return sorted((file.name, file.size_bytes) for file in manifest.files)


def _shape_of_source(source: Source) -> list[tuple[str, int]]:
    return sorted((file.name, file.size_bytes) for file in source.files)
