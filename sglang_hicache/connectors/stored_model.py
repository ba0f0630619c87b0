"""A model in a place: chunks that are read, checked against the manifest, and handed on a few at a time.

Used by connectors, the launcher, ranks and `save_model`.  `fragments` reads ahead on threads of its own, which are gone
when the iteration ends, however it ends; the caller's thread gets the bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

from sglang_hicache.connectors.manifest import Manifest, ModelFile
from sglang_hicache.errors import StorageError

T = TypeVar("T")

Buffer = bytes | memoryview

#: Chunks that are being read or wait for the caller, beside the one that it has.
READ_AHEAD = 4

#: A connection may break in the hour that a large model takes: what may get better by itself is tried again.
_PAUSES_S = (0.2, 1.0, 4.0)


class Extent(NamedTuple):
    """A part of a file."""

    file: str
    start: int
    end: int


class Fragment(NamedTuple):
    """Some of the bytes of an extent.  The memory is the next one's afterwards: copy out of it what you need."""

    #: Which of the extents, by its place in the list.
    index: int
    #: Where in the extent these bytes begin.
    offset: int
    data: memoryview


class Reader(Protocol):
    """What is needed of a connector."""

    url: str

    def read_blocking(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        """Bytes under a key."""


class StoredModel:
    """The files of one manifest."""

    def __init__(self, place: Reader, manifest: Manifest) -> None:
        self._place = place
        self._manifest = manifest

    def read_chunk_blocking(self, file: ModelFile, number: int, given_up: threading.Event | None = None) -> Buffer:
        """A chunk whose bytes are those that were saved.  StorageError with the key: they are not to be had."""
        key, start, size_bytes, sha256 = self._manifest.place(file, number)
        data = self._read_patiently_blocking(key, start, size_bytes, given_up)
        if len(data) != size_bytes or hashlib.sha256(data).hexdigest() != sha256:
            raise StorageError(
                f"{self._place.url}, key {key!r}: these are not the bytes of {file.name!r} that were saved "
                f"({len(data)} bytes, expected {size_bytes}, checksum {sha256[:16]}...); "
                "save the model again with --overwrite",
                "contract",
                "corrupt",
            )
        return data

    def read_file_blocking(self, file: ModelFile, most_bytes: int) -> bytes:
        """The beginning of a file, in whole chunks, at least this much where it has so much."""
        count = min(len(file.chunks), -(-most_bytes // self._manifest.chunk_bytes))
        return b"".join(self.read_chunk_blocking(file, number) for number in range(count))

    def chunks(self, wanted: Iterable[tuple[ModelFile, int]]) -> Iterator[tuple[ModelFile, int, Buffer]]:
        """These chunks in their order, read ahead."""
        rest = iter(wanted)
        pool = ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="model-read")
        waiting: deque[tuple[ModelFile, int, Future[Buffer]]] = deque()
        given_up = threading.Event()

        def ask(count: int) -> None:
            for file, number in itertools.islice(rest, count):
                waiting.append((file, number, pool.submit(self.read_chunk_blocking, file, number, given_up)))

        try:
            ask(READ_AHEAD)
            while waiting:
                file, number, future = waiting.popleft()
                data = future.result()
                del future  # it would keep the bytes until the next chunk is there
                ask(1)
                yield file, number, data
                del data
        finally:
            given_up.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def fragments(self, extents: Sequence[Extent]) -> Iterator[Fragment]:
        """The bytes of all extents, in the order in which they are stored; every chunk is read once."""
        unit = self._manifest.chunk_bytes
        by_file: dict[str, list[int]] = {}
        for index, extent in enumerate(extents):
            if extent.end > extent.start:
                by_file.setdefault(extent.file, []).append(index)
        wanted: list[tuple[ModelFile, int]] = []
        for name in sorted(by_file):
            file = self._manifest.file(name)
            if file is None or any(extents[index].end > file.size_bytes for index in by_file[name]):
                raise StorageError(f"{self._place.url} has no such part of {name!r}", "refused", "not_found")
            by_file[name].sort(key=lambda index: extents[index].start)
            spans = (range(extents[i].start // unit, -(-extents[i].end // unit)) for i in by_file[name])
            wanted.extend((file, number) for number in sorted(set(itertools.chain.from_iterable(spans))))
        for file, number, data in self.chunks(wanted):
            start, view = number * unit, memoryview(data)
            for index in by_file[file.name]:
                extent = extents[index]
                if extent.start >= start + len(data):
                    break
                first, last = max(extent.start, start), min(extent.end, start + len(data))
                if first < last:
                    yield Fragment(index, first - extent.start, view[first - start : last - start])
            # Those that end here are never looked at again: a file may have ten thousand tensors.
            by_file[file.name] = [i for i in by_file[file.name] if extents[i].end > start + len(data)]

    def _read_patiently_blocking(
        self, key: str, start: int, size_bytes: int, given_up: threading.Event | None
    ) -> Buffer:
        try:
            return patiently_blocking(lambda: self._place.read_blocking(key, start, size_bytes), given_up)
        except StorageError as error:
            if error.code != "not_found":
                raise
            raise StorageError(
                f"{self._place.url}: the key {key!r} of this model is gone; it was replaced while it was read, or the "
                "store drops what it is given",
                "refused",
                "not_found",
            ) from error


def patiently_blocking(call: Callable[[], T], given_up: threading.Event | None = None) -> T:
    """What the call returns; what may get better by itself is tried again, a few seconds long, unless somebody has
    given up meanwhile."""
    pause = given_up or threading.Event()
    for pause_s in _PAUSES_S:
        try:
            return call()
        except StorageError as error:
            if error.reason != "io" or pause.wait(pause_s):
                raise
    return call()
