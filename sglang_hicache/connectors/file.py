"""Models in a folder: `file:///absolute/path`."""

from __future__ import annotations

import errno
import itertools
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sglang_hicache.connectors.base import BaseFileSystemConnector, ConnectorType, Entry
from sglang_hicache.connectors.manifest import check_name
from sglang_hicache.connectors.url import StoreUrl, check_options
from sglang_hicache.errors import StorageError, UserError
from sglang_hicache.private_file import sync_folder_blocking

#: How the name of a file begins that is not whole yet.
_PARTIAL = ".partial-"
_IS_PARTIAL = re.compile(r"\.partial-[0-9a-f]{16}")

#: What a system says of a name under which nothing is.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class FileConnector(BaseFileSystemConnector):
    """A folder and everything below it."""

    type = ConnectorType.FS | ConnectorType.WEIGHT

    def __init__(self, url: StoreUrl) -> None:
        super().__init__(url)
        check_options(url)
        if url.netloc not in ("", "localhost") or not url.path:
            raise UserError(
                f"{url.public}: a file URL has an absolute path behind three slashes, as in file:///models/m"
            )
        self.root = Path("/", url.path)

    def read_blocking(self, key: str, start: int = 0, size_bytes: int | None = None) -> bytes:
        try:
            with open(self._path(key), "rb") as stream:
                stream.seek(start)
                return stream.read(-1 if size_bytes is None else size_bytes)
        except (FileNotFoundError, NotADirectoryError):
            raise self.missing(key) from None
        except OSError as error:
            raise self._failed("read", key, error) from error

    def write_blocking(self, key: str, data: bytes) -> None:
        path = self._path(key)
        temporary = path.with_name(f"{_PARTIAL}{secrets.token_hex(8)}")
        try:
            new = list(itertools.takewhile(lambda folder: not folder.exists(), path.parents))
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "xb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            # A new folder is a name in another one: without that a chunk could be lost with the power, and the list of
            # all chunks, which is written later, be there.
            for folder in (path.parent, *(folder.parent for folder in new)):
                sync_folder_blocking(folder)
        except OSError as error:
            raise self._failed("write", key, error) from error

    def entries_blocking(self, prefix: str = "") -> Iterator[Entry]:
        folder = self._path(prefix.rpartition("/")[0]) if "/" in prefix else self.root
        for where, folders, names in os.walk(folder, onerror=self._unlisted):
            folders.sort()
            for name in sorted(names):
                path = Path(where, name)
                key = str(path.relative_to(self.root))
                if key.startswith(prefix) and not name.startswith(_PARTIAL):
                    size_bytes = self._size(path, key)
                    if size_bytes is not None:
                        yield Entry(key, size_bytes)

    def sizes_blocking(self, keys: Sequence[str]) -> list[int | None]:
        return [self._size(self._path(key), key) for key in keys]

    def delete_blocking(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._path(key)
            try:
                path.unlink(missing_ok=True)
                for folder in path.parents:
                    if folder == self.root or any(folder.iterdir()):
                        break
                    folder.rmdir()
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise self._failed("delete", key, error) from error

    def tidy_blocking(self) -> None:
        for where, _, names in os.walk(self.root, onerror=self._unlisted):
            for name in filter(_IS_PARTIAL.fullmatch, names):
                self.delete_blocking([str(Path(where, name).relative_to(self.root))])

    def _path(self, key: str) -> Path:
        check_name(key)
        return self.root / key

    def _size(self, path: Path, key: str) -> int | None:
        """Of a file; None: there is none."""
        try:
            found = path.stat()
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise self._failed("look up", key, error) from error
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def _unlisted(self, error: OSError) -> None:
        """A folder that cannot be read must not pass for an empty one."""
        if error.errno not in _ABSENT:
            raise self._failed("list", os.path.relpath(error.filename, self.root), error) from error

    def _failed(self, what: str, key: str, error: OSError) -> StorageError:
        reason = "no_space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "io"
        return StorageError(f"{self.url}: cannot {what} the key {key!r}: {error.strerror or error}", reason)
