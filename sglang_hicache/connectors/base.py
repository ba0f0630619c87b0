"""What a connector can do: bytes under keys in some place, and on top of that a model.

A connector is made by `create_remote_connector`, used by the launcher, by ranks and by `save_model`, and closed by
whoever made it.  Its calls block, for a bounded time each; any thread may make them.  It installs no signal handlers
and starts no thread that outlives a call.  What the outside does wrong is a `StorageError` whose text names the place
and the key, and no secret.
"""

from __future__ import annotations

import contextlib
import enum
import fnmatch
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, ClassVar, NamedTuple, Self

from sglang_hicache.connectors.manifest import (
    LARGEST_MANIFEST_BYTES,
    MANIFEST_NAME,
    Manifest,
    check_name,
    decode_manifest,
)
from sglang_hicache.connectors.stored_model import Buffer, Extent, Fragment, StoredModel
from sglang_hicache.connectors.url import StoreUrl
from sglang_hicache.errors import StorageError, UserError

#: What a server reads of a model beside its weights.
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.vocab")

#: Files that hold weights: they are streamed, or not read at all, and never pulled.
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack")

#: A file of a model that is no weights is read in one piece.
_LARGEST_PULLED_BYTES = 1 << 30

#: A folder that was copied there has a few dozen.
_MOST_FILES = 100_000


class ConnectorType(enum.Flag):
    """What a connector is good for.  Kinds combine, so ask with `&`: a comparison would miss those that can more."""

    #: Values under keys.
    KV = enum.auto()
    #: Files in folders.
    FS = enum.auto()
    #: It can hold a model, and give each rank its share.
    WEIGHT = enum.auto()


class Entry(NamedTuple):
    """Something in the place."""

    key: str
    size_bytes: int


class BaseConnector(ABC):
    """A place below a URL: bytes under keys, which are relative, with forward slashes."""

    type: ClassVar[ConnectorType]

    def __init__(self, url: StoreUrl) -> None:
        #: Where this is, without user and password.
        self.url = url.public
        self._folder: str | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the place, and remove what was pulled without naming a folder.  Harmless when it is closed."""
        folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def local_folder(self) -> str:
        """A private folder (0700) that is removed with the connector."""
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="hicache-model-")
        return self._folder

    @abstractmethod
    def read_blocking(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        """The bytes under a key, or a part of them.  StorageError `not_found`: there is nothing."""

    @abstractmethod
    def write_blocking(self, key: str, data: bytes) -> None:
        """All of it or nothing, whenever this process ends."""

    @abstractmethod
    def entries_blocking(self, prefix: str = "") -> Iterator[Entry]:
        """Everything whose key begins with this, in no order, page by page."""

    @abstractmethod
    def sizes_blocking(self, keys: Sequence[str]) -> list[int | None]:
        """How large these are; None: there is no such key."""

    @abstractmethod
    def delete_blocking(self, keys: Iterable[str]) -> None:
        """They are gone.  Harmless where they are not there."""

    def tidy_blocking(self) -> None:  # noqa: B027 - most places have nothing to do
        """Remove what writes have left that were cut off.  Called when nobody writes."""

    def find_blocking(self, key: str) -> Buffer | None:
        """The bytes under a key; None: there is nothing."""
        try:
            return self.read_blocking(key)
        except StorageError as error:
            if error.code != "not_found":
                raise
            return None

    def missing(self, key: str) -> StorageError:
        """What `read_blocking` raises where nothing is."""
        return StorageError(f"{self.url} has nothing under the key {key!r}", "refused", "not_found")


class BaseWeightConnector(BaseConnector):
    """A place that can hold a model."""

    def manifest_blocking(self) -> Manifest | None:
        """What the model consists of; None: nothing was saved here, or not to its end."""
        (size_bytes,) = self.sizes_blocking([MANIFEST_NAME])
        if size_bytes is None:
            return None
        where = f"{self.url}, key {MANIFEST_NAME!r},"
        if size_bytes > LARGEST_MANIFEST_BYTES:
            raise StorageError(f"{where} has {size_bytes} bytes: that is no manifest", "refused", "foreign_format")
        data = self.find_blocking(MANIFEST_NAME)
        return None if data is None else decode_manifest(data, where)

    def pull_files(
        self,
        folder: str | None = None,
        *,
        allow: Sequence[str] = ("*",),
        ignore: Sequence[str] = WEIGHTS,
        manifest: Manifest | None = None,
        most_bytes: int | None = None,
    ) -> str:
        """Files that match one of `allow` and none of `ignore`, written below a folder (by default a private one, which
        is removed with the connector); the folder.  `manifest`: of the model, where it was read already, as another one
        may be there by now.  UserError: they have more than `most_bytes`, and nothing was written."""
        into = Path(folder if folder is not None else self.local_folder())
        manifest = manifest or self.manifest_blocking()
        if manifest is None:
            entries = [entry for entry in self.files_blocking() if _is_wanted(entry.key, allow, ignore)]
            self._check_amount(sum(entry.size_bytes for entry in entries), most_bytes)
            for entry in entries:
                self._pull_blocking(into, entry)
            return str(into)
        model = StoredModel(self, manifest)
        files = [file for file in manifest.files if _is_wanted(file.name, allow, ignore)]
        self._check_amount(sum(file.size_bytes for file in files), most_bytes)
        for file in files:
            with writing(into, file.name, self.url) as output:
                for number in range(len(file.chunks)):
                    output.write(model.read_chunk_blocking(file, number))
        return str(into)

    def weight_iterator(self, extents: Sequence[Extent], manifest: Manifest | None = None) -> Iterator[Fragment]:
        """The bytes of these parts of weight files: what one rank wants.  They come in the order in which they are
        stored, each chunk is read once and checked, and few are in memory at a time."""
        manifest = manifest or self.manifest_blocking()
        if manifest is None:
            raise StorageError(f"{self.url} holds no model that was saved to its end", "refused", "not_found")
        return StoredModel(self, manifest).fragments(extents)

    def files_blocking(self) -> list[Entry]:
        """Files of a plain folder.  Names that end in a slash are what some tools make for folders.  UserError: so
        many that somebody has named a whole bucket."""
        found: list[Entry] = []
        for entry in self.entries_blocking():
            if len(found) == _MOST_FILES:
                raise UserError(f"{self.url} holds more than {_MOST_FILES} files: that is no model")
            if not entry.key.endswith("/"):
                found.append(entry)
        return found

    def _check_amount(self, size_bytes: int, most_bytes: int | None) -> None:
        if most_bytes is not None and size_bytes > most_bytes:
            raise UserError(
                f"{self.url}: its files beside the weights have {size_bytes} bytes; more than {most_bytes} are no part "
                "of a model"
            )

    def _pull_blocking(self, into: Path, entry: Entry) -> None:
        if entry.size_bytes > _LARGEST_PULLED_BYTES:
            raise UserError(f"{self.url}, key {entry.key!r}: a file of {entry.size_bytes} bytes is no part of a model")
        with writing(into, entry.key, self.url) as output:
            output.write(self.read_blocking(entry.key))


class BaseKVConnector(BaseWeightConnector):
    """Values under keys."""

    def get(self, key: str) -> bytes | None:
        """The value; None: there is none."""
        value = self.find_blocking(key)
        return None if value is None else bytes(value)

    def getstr(self, key: str) -> str | None:
        """The value as text."""
        value = self.get(key)
        return None if value is None else value.decode()

    def set(self, key: str, value: bytes) -> None:
        """Put a value."""
        self.write_blocking(key, value)

    def setstr(self, key: str, value: str) -> None:
        """Put a text."""
        self.set(key, value.encode())

    def list(self, prefix: str = "") -> Iterator[str]:
        """Every key that begins with this, however many there are."""
        return (entry.key for entry in self.entries_blocking(prefix))

    def exists(self, key: str) -> bool:
        """Is there such a key?"""
        return self.sizes_blocking([key]) != [None]

    def delete(self, *keys: str) -> None:
        """They are gone."""
        self.delete_blocking(keys)


class BaseFileSystemConnector(BaseWeightConnector):
    """Files in folders."""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Every file below, with its size, however many there are."""
        return self.entries_blocking(prefix)

    def glob(self, pattern: str = "*") -> list[str]:
        """Names of files that match, in order; a star matches slashes too."""
        return sorted(entry.key for entry in self.entries_blocking() if fnmatch.fnmatchcase(entry.key, pattern))

    def read(self, name: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        """A file, or a part of it."""
        return self.read_blocking(name, start, size_bytes)


def _is_wanted(name: str, allow: Sequence[str], ignore: Sequence[str]) -> bool:
    """By its last part or as a whole; the manifest of another layout is no file of a model."""

    def matches(patterns: Sequence[str]) -> bool:
        names = name, name.rpartition("/")[2]
        return any(fnmatch.fnmatchcase(text, pattern) for text in names for pattern in patterns)

    return name != MANIFEST_NAME and matches(allow) and not matches(ignore)


@contextlib.contextmanager
def writing(folder: Path, name: str, url: str) -> Iterator[BinaryIO]:
    """A new file below a folder.  UserError with the name: it would lead out of the folder, or cannot be made."""
    try:
        check_name(name)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file that is there, or a link, is never written through: two names may mean the same file.
        with open(path, "xb") as output:
            yield output
    except UserError as error:
        raise UserError(f"{url}: {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{url}, key {name!r:.200}: it cannot be written below {folder}: {error}") from error
