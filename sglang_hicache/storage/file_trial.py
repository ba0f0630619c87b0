"""A dry run of a file store: a store of its own, in the temporary folder that a process of the real one would have.

Same disk, same calls, and nothing of the real store is touched: its pages are neither counted nor deleted, whatever
limits are being tried, and its processes do not hear of this one.  A trial that is killed leaves a temporary folder
without a living owner, which the next process to open the store removes.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.backend import OpenContext
from sglang_hicache.storage.file import FileBackend, fault
from sglang_hicache.storage.file_folder import (
    TemporaryFolder,
    make_private,
    refuse_unsafe,
    storage_folder,
    with_environment,
)
from sglang_hicache.storage.file_pages import TMP
from sglang_hicache.storage.settings import FileSettings

#: In the outermost folder that a trial has made: whatever is empty from there on goes.  Of several ranks that try a new
#: folder at once the last one to leave is not always the one that made it.
_MADE = "made-by-trial"

#: Where a page is written that has no name yet.
_BY_CHANCE = re.compile(rf"/{TMP}/[0-9]+-[0-9a-f]{{16}}(/[0-9]+)?")


class _Trial(FileBackend):
    """Says where the store is that is being tried."""

    def __init__(self, settings: FileSettings, context: OpenContext, root: Path) -> None:
        super().__init__(settings, context)
        self._real_root = root

    def info(self) -> dict[str, str]:
        return super().info() | {"path": str(self._real_root)}


@contextlib.contextmanager
def trial_blocking(settings: FileSettings, context: OpenContext) -> Iterator[FileBackend]:
    """A backend that is not open yet, for as long as it is tried; what was made for it goes with it."""
    settings = with_environment(settings)
    root = storage_folder(settings.file_storage_path)
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_what_was_made, root)
        try:
            place = _move_in(root, context.rank)
        except OSError as error:
            raise fault(f"cannot use {root} as storage folder", error) from error
        stack.callback(place.close)
        own = str(place.path / "store")
        with _in_the_name_of(root, own):
            yield _Trial(msgspec.structs.replace(settings, file_storage_path=own), context, root)


@contextlib.contextmanager
def _in_the_name_of(root: Path, own: str) -> Iterator[None]:
    """Errors speak of the store that is tried.  The name of the trial's own folder is drawn by chance: it would help
    nobody, and of two ranks that meet the same obstacle each would seem to meet another."""
    try:
        yield
    except StorageError as error:
        said = _BY_CHANCE.sub(f"/{TMP}", str(error).replace(own, str(root)))
        raise StorageError(said, error.reason, error.code) from error


def _move_in(root: Path, rank: int) -> TemporaryFolder:
    """A temporary folder in the store, which is made if there is none."""
    missing = [folder for folder in _from_inside(root) if not folder.exists()]
    if missing and _noted(root) is None:
        _make_outermost(missing[-1])
    make_private(root)
    refuse_unsafe(root)
    make_private(root / TMP)
    try:
        return TemporaryFolder.create(root / TMP, rank)
    except OSError as error:
        raise _about(root / TMP, error) from error


def _about(folder: Path, error: OSError) -> OSError:
    """The same of a folder that everybody knows: the name that could not be made was drawn by chance."""
    return OSError(error.errno, error.strerror, str(folder))


def _make_outermost(folder: Path) -> None:
    """With its note from the first moment on: a rank that finds it must find both."""
    try:
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise _about(folder, error) from error
    (made / _MADE).touch(mode=0o600)
    try:
        made.rename(folder)
    except OSError:  # another rank was faster
        (made / _MADE).unlink()
        made.rmdir()


def _remove_what_was_made(root: Path) -> None:
    """The last of several trials leaves no folder where there was none; somebody who has begun to use it keeps it."""
    with contextlib.suppress(OSError):
        outermost = _noted(root)
        for folder in _from_inside(root) if outermost else ():
            if folder == outermost:
                if os.listdir(folder) == [_MADE]:
                    (folder / _MADE).unlink()
                    folder.rmdir()
                return
            if folder.exists():
                folder.rmdir()


def _noted(root: Path) -> Path | None:
    """The folder with the note, if a trial has made this store or a folder around it."""
    return next((folder for folder in _from_inside(root) if (folder / _MADE).exists()), None)


def _from_inside(root: Path) -> tuple[Path, ...]:
    """The folders of a store that may have to be made, the innermost first."""
    return (root / TMP, root, *root.parents)
