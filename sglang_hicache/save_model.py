"""`python -m sglang_hicache.save_model SRC URL`: put a model into a store, see what is there, and check it.

Reads flags, reports progress on stderr, and turns the result into an exit code (`_EPILOG`); the work is done by
`connectors/upload.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sglang_hicache.connectors.base import BaseWeightConnector
from sglang_hicache.connectors.create import create_remote_connector
from sglang_hicache.connectors.manifest import MANIFEST_NAME, Manifest, ModelFile
from sglang_hicache.connectors.progress import Progress, size
from sglang_hicache.connectors.stored_model import StoredModel
from sglang_hicache.connectors.upload import Saved, Upload
from sglang_hicache.connectors.upload_source import FolderSource, PlainSource, Source, StoreSource
from sglang_hicache.connectors.url import filled_in, is_url, parse_url, shows_password
from sglang_hicache.errors import StorageError, UserError
from sglang_hicache.model_facts import model_directory, read_model_facts

_EPILOG = """\
examples:
  python -m sglang_hicache.save_model /models/my-model redis://10.0.0.5:6379/my-model
  python -m sglang_hicache.save_model owner/name 's3://models/my-model?endpoint=http://10.0.0.7:9000'
  python -m sglang_hicache.save_model redis://10.0.0.5/my-model file:///backup/my-model
  python -m sglang_hicache.save_model /models/new 'redis://:${env.REDIS_PASSWORD}@10.0.0.5/my-model' --overwrite
  python -m sglang_hicache.save_model --verify redis://10.0.0.5:6379/my-model

${env.NAME} in a URL is filled in from the environment: other users can read a password on the command line.

exit codes:
  0    done, or the model was there already
  1    the store failed, or --verify found damage: a model is served only when it is whole; run it again, it goes on
  2    a mistake in the command, or a file of SRC that changed meanwhile: nothing that is served was changed
  130  interrupted: nothing half is served; run it again, it goes on
"""

_EXIT_FAILED, _EXIT_USAGE, _EXIT_INTERRUPTED = 1, 2, 130

#: More names than this are counted, not listed.
_MOST_LISTED = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Edge of the process."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if args.list or args.verify:
            if args.target or (args.list and args.verify) or args.overwrite:
                raise UserError("--list and --verify take one URL and nothing else")
            return _list(args.source) if args.list else _verify(args.source)
        if not args.target:
            raise UserError("say what to save and where to: SRC URL (--help has examples)")
        return _save(args.source, args.target, overwrite=args.overwrite)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_USAGE
    except StorageError as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted: nothing half is served; the same command goes on where this one was", file=sys.stderr)
        return _EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_hicache.save_model",
        description="Save a model to file:///path, redis://host/model or s3://bucket/prefix, to serve it from there.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="directory, hub id, or URL of a model; with --list and --verify: its URL")
    add("target", metavar="URL", nargs="?", default="", help="where to save it")
    add("--overwrite", "--force", action="store_true",
        help="replace another model that is there, in one step; chunks that are there are checked, and damaged ones "
        "replaced")  # fmt: skip
    add("--list", action="store_true", help="print the files of a saved model, and do nothing")
    add("--verify", action="store_true", help="read every byte of a saved model, and check it")
    return parser


def _save(source_name: str, target: str, *, overwrite: bool) -> int:
    with contextlib.ExitStack() as stack:
        place = _open(target, stack)
        source = _source(source_name, stack)
        progress = Progress(sum(file.size_bytes for file in source.files), sys.stderr)
        try:
            saved = Upload(source, place, progress.tell, overwrite=overwrite).run_blocking()
        finally:
            progress.end()
        print(_told(saved, place, progress), file=sys.stderr)
    return 0


def _told(saved: Saved, place: BaseWeightConnector, progress: Progress) -> str:
    if not saved.written_bytes and not saved.removed:
        return f"{place.url} has this model already: {len(saved.manifest.files)} files"
    text = f"saved {len(saved.manifest.files)} files to {place.url}: {progress.line()}"
    return f"{text}; {saved.removed} chunks of earlier uploads removed" if saved.removed else text


def _open(url: str, stack: contextlib.ExitStack) -> BaseWeightConnector:
    if not is_url(url):
        raise UserError(f"{url!r} is no URL; a folder is file:///absolute/path")
    if shows_password(url):
        hint = "warning: other users of this machine can see that password in ps; ${env.NAME} in its place hides it"
        print(hint, file=sys.stderr)
    return stack.enter_context(create_remote_connector(filled_in(url, os.environ)))


def _source(name: str, stack: contextlib.ExitStack) -> Source:
    if not is_url(name):
        return _folder_source(model_directory(name, "SRC"))
    place = _open(name, stack)
    manifest = place.manifest_blocking()
    if manifest is not None:
        return StoreSource(place, manifest)
    path = parse_url(name)
    return _folder_source(f"/{path.path}") if path.scheme == "file" else PlainSource(place)


def _folder_source(directory: str) -> FolderSource:
    read_model_facts(directory)  # a folder that nobody could serve is not worth the hours
    source = FolderSource(directory)
    if source.left_out:
        names = ", ".join(source.left_out[:_MOST_LISTED])
        more = f" and {len(source.left_out) - _MOST_LISTED} more" if len(source.left_out) > _MOST_LISTED else ""
        print(f"left out, as no server reads them: {names}{more}", file=sys.stderr)
    return source


def _saved_model(url: str, stack: contextlib.ExitStack) -> tuple[BaseWeightConnector, Manifest]:
    place = _open(url, stack)
    manifest = place.manifest_blocking()
    if manifest is None:
        next(place.entries_blocking(), None)  # a bucket that is not there is said to be that
        raise StorageError(f"{place.url} holds no model that was saved to its end: it has no {MANIFEST_NAME}")
    return place, manifest


def _list(url: str) -> int:
    with contextlib.ExitStack() as stack:
        _, manifest = _saved_model(url, stack)
    for file in manifest.files:
        # Whoever wrote the list may want to steer the terminal that shows it.
        name = file.name if file.name.isprintable() else repr(file.name)
        print(f"{file.size_bytes:>15} {file.sha256} {name}")
    print(f"{len(manifest.files)} files, {size(manifest.size_bytes)}", file=sys.stderr)
    return 0


def _verify(url: str) -> int:
    with contextlib.ExitStack() as stack:
        place, manifest = _saved_model(url, stack)
        progress = Progress(manifest.size_bytes, sys.stderr)
        model = StoredModel(place, manifest)
        faults = [fault for file in manifest.files for fault in _faults(model, file, progress.tell)]
        progress.end()
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{place.url}: {len(faults)} faults in {len(manifest.files)} files", file=sys.stderr)
    return _EXIT_FAILED if faults else 0


def _faults(model: StoredModel, file: ModelFile, told: Callable[[int, int], None]) -> Iterator[str]:
    """What is wrong with a file."""
    whole, is_whole = hashlib.sha256(), True
    for number in range(len(file.chunks)):
        try:
            data = model.read_chunk_blocking(file, number)
        except StorageError as error:
            if error.reason == "io":
                raise  # the store cannot be asked, which says nothing about what it holds
            is_whole = False
            yield str(error)
            continue
        whole.update(data)
        told(len(data), 0)
    if is_whole and whole.hexdigest() != file.sha256:
        yield f"{Path(file.name).name}: its chunks are right, but together they are another file than was saved"


if __name__ == "__main__":
    sys.exit(main())
