"""A dry run of a file store: a store of its own, in the temporary folder that a process of the real one would have.

Same disk, same calls, and nothing of the real store is touched: its pages are neither counted nor deleted, whatever
limits are being tried, and its processes do not hear of this one.  A trial that is killed leaves a temporary folder
without a living owner, which the next process to open the store removes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

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

#: In `tmp/`: the folders that a trial has made, the innermost first.  Of several ranks that try a new folder at once
#: the last one to leave is not always the one that made it.
_MADE = "made-by-trial"


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
    try:
        place = _move_in(root, context.rank)
    except OSError as error:
        raise fault(f"cannot use {root} as storage folder", error) from error
    try:
        own = msgspec.structs.replace(settings, file_storage_path=str(place.path / "store"))
        yield _Trial(own, context, root)
    finally:
        place.close()
        with contextlib.suppress(OSError):
            _remove_what_was_made(root)


def _move_in(root: Path, rank: int) -> TemporaryFolder:
    """A temporary folder in the store, which is made if there is none."""
    missing = [folder for folder in (root / TMP, root, *root.parents) if not folder.exists()]
    with contextlib.ExitStack() as undo:
        undo.callback(_remove, missing)
        make_private(root)
        refuse_unsafe(root)
        make_private(root / TMP)
        if missing:
            with contextlib.suppress(FileExistsError), open(root / TMP / _MADE, "x", encoding="utf-8") as note:
                note.write("\n".join(map(str, missing)))
        place = TemporaryFolder.create(root / TMP, rank)
        undo.pop_all()
    return place


def _remove_what_was_made(root: Path) -> None:
    """The last of several trials leaves no folder where there was none; somebody who has begun to use it keeps it."""
    note = root / TMP / _MADE
    if os.listdir(root / TMP) == [_MADE]:
        made = note.read_text(encoding="utf-8").splitlines()
        note.unlink()
        _remove(map(Path, made))


def _remove(folders: Iterable[Path]) -> None:
    """The innermost first, and none that has something in it."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
