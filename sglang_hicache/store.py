"""`python -m sglang_hicache.store`: what a file store holds, whether it is whole, and how to empty it.

Reads flags, asks before it deletes, prints, and turns the result into an exit code (`_EPILOG`); the work is done by
`storage/file_survey.py`.  Needs neither a server nor the encryption key, and may run beside servers.
"""

from __future__ import annotations

import argparse
import getpass
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from sglang_hicache.cache.page import namespace_seed
from sglang_hicache.errors import StorageError, UserError
from sglang_hicache.storage.capacity import size_text
from sglang_hicache.storage.file_folder import refuse_unsafe, storage_folder, sweep
from sglang_hicache.storage.file_pages import TMP
from sglang_hicache.storage.file_quarantine import set_aside_blocking, trim_blocking
from sglang_hicache.storage.file_survey import (
    Doomed,
    Selection,
    Survey,
    Tally,
    check_blocking,
    namespaces_blocking,
    users_blocking,
)

_EPILOG = """\
examples:
  python -m sglang_hicache.store du --path /fast/disk/pages
  python -m sglang_hicache.store verify --path /fast/disk/pages --set-aside
  python -m sglang_hicache.store purge --path /fast/disk/pages --namespace 3f9a17c2
  python -m sglang_hicache.store purge --path /fast/disk/pages --extra-key customer-7 --cache-salt-file salt.txt
  python -m sglang_hicache.store purge --path /fast/disk/pages --all --yes

exit codes:
  0    done, and nothing bad was found
  1    verify found bad pages, or something could not be deleted
  2    a mistake in the command, or no consent to a purge: nothing was changed
  130  interrupted: what is left of the store is whole
"""

#: Bytes of a tenant's seed that a header holds.
_TENANT_BYTES = 12
_NO_TENANT = "none"

#: A shorter beginning of a namespace could mean another one tomorrow.
_SHORTEST_PREFIX = 8

#: More bad pages or failures than this are counted, not listed.
_MOST_LISTED = 50

_EXIT_BAD, _EXIT_USAGE, _EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Edge of the process."""
    args = _parser().parse_args(argv)
    try:
        root = _store(args)
        selection = Selection(_namespace(root, args.namespace), _tenant(args))
        return args.run(root, selection, args)
    except (UserError, StorageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_hicache.store",
        description="Look at, check and empty the folder of a file store, beside running servers or without any.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="du | verify | purge")
    for name, run, about in (
        ("du", _du, "how many pages there are, how large, and when they were used, by namespace and tenant"),
        ("verify", _verify, "read every page and check its header, its place and its checksum"),
        ("purge", _purge, "delete pages, children before parents"),
    ):
        command = commands.add_parser(
            name, help=about, description=about[0].upper() + about[1:] + ".", epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        command.set_defaults(run=run)
        _add_selection(command)
        if name == "du":
            command.add_argument("--json", action="store_true", help="one JSON object; sizes in bytes")
        elif name == "verify":
            command.add_argument(
                "--set-aside", action="store_true",
                help="move bad pages into the folder quarantine/ of the store, which keeps the latest 64",
            )  # fmt: skip
        else:
            command.add_argument("--all", action="store_true", help="every page in the store")
            command.add_argument("--yes", action="store_true", help="do not ask")
    return parser


def _add_selection(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--path", default="", metavar="FOLDER", help="folder of the store; default: the one a server takes by itself"
    )
    command.add_argument(
        "--namespace", default="", metavar="HEX",
        help=f"only pages of this model: its digits as du shows them, or at least the first {_SHORTEST_PREFIX}",
    )  # fmt: skip
    command.add_argument(
        "--tenant", default="", metavar="HEX",
        help=f'only pages of this tenant, as du shows it; "{_NO_TENANT}": of those without',
    )  # fmt: skip
    command.add_argument(
        "--extra-key", metavar="TEXT", help="only pages of requests with this extra_key (others can see it in ps)"
    )
    command.add_argument(
        "--cache-salt-file", metavar="FILE",
        help='only pages of requests with the cache_salt in this file, without its last line end; "-": standard input',
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------- what is meant


def _store(args: argparse.Namespace) -> Path:
    """The folder, if it is one of ours: nothing else is even read."""
    root = storage_folder(args.path)
    if not (root / TMP).is_dir() and not namespaces_blocking(root):
        raise UserError(f"{root} is no file store; name the folder that a server has as file_storage_path with --path")
    refuse_unsafe(root)
    return root


def _namespace(root: Path, prefix: str) -> str:
    """The one namespace that starts like this."""
    if not prefix:
        return ""
    there = namespaces_blocking(root)
    found = [name for name in there if name.startswith(prefix.lower())]
    if len(prefix) < _SHORTEST_PREFIX or len(found) != 1:
        known = ", ".join(name[:16] for name in there[:_MOST_LISTED]) or "none"
        raise UserError(
            f"--namespace {prefix!r} is the beginning of {len(found)} namespaces; it takes at least "
            f"{_SHORTEST_PREFIX} hex digits that only one begins with; here are: {known}"
        )
    return found[0]


def _tenant(args: argparse.Namespace) -> bytes | None:
    """What headers say of the tenant that is meant; None: all are."""
    is_by_text = args.extra_key is not None or args.cache_salt_file is not None
    if args.tenant and is_by_text:
        raise UserError("--tenant says it all: give either it, or --extra-key and --cache-salt-file")
    if is_by_text:
        salt = None if args.cache_salt_file is None else _salt(args.cache_salt_file)
        return namespace_seed(args.extra_key, salt)[:_TENANT_BYTES].ljust(_TENANT_BYTES, b"\0")
    if not args.tenant:
        return None
    if args.tenant == _NO_TENANT:
        return bytes(_TENANT_BYTES)
    try:
        tenant = bytes.fromhex(args.tenant)
    except ValueError:
        tenant = b""
    if len(tenant) != _TENANT_BYTES:
        raise UserError(
            f"--tenant {args.tenant!r} is no tenant; it takes the {2 * _TENANT_BYTES} hex digits that du shows, or "
            f'"{_NO_TENANT}"; where you know the text, give --extra-key and --cache-salt-file'
        )
    return tenant


def _salt(path: str) -> str:
    """A salt may be a secret: it comes from a file or a pipe, where `ps` and the shell's history do not see it."""
    if path == "-" and sys.stdin.isatty():
        return getpass.getpass("cache_salt: ")
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--cache-salt-file {path} is not UTF-8; a cache_salt is a text") from error
    return text.removesuffix("\n").removesuffix("\r")


# ---------------------------------------------------------------------------------------------------- commands


def _du(root: Path, selection: Selection, args: argparse.Namespace) -> int:
    survey = Survey.take_blocking(root, selection)
    if args.json:
        print(msgspec.json.encode({"path": str(root), **msgspec.to_builtins(survey)}).decode())
        return 0
    print(f"{root}: {_users(root)}")
    print(f"{'namespace':18}{'tenant':26}{'pages':>10}{'size':>13}  {'oldest use, UTC':18}newest use, UTC")
    whole = Tally()
    for namespace, tenants in survey.pages.items():
        for tenant, tally in sorted(tenants.items()):
            shown = tenant if int(tenant, 16) else _NO_TENANT
            print(_row(namespace[:16], shown, tally), f" {_utc(tally.oldest_use)}  {_utc(tally.newest_use)}")
            whole.files += tally.files
            whole.bytes += tally.bytes
    print(_row("all", "", whole))
    for what, tally in (
        ("pages of another format", survey.other_formats), ("torn pages", survey.torn),
        ("being written", survey.temporary), ("set aside", survey.quarantine),
    ):  # fmt: skip
        if tally.files:
            print(f"{what}: {tally.files} files, {size_text(tally.bytes)}")
    if survey.foreign:
        print(f"not ours: {survey.foreign} files or folders, which nothing here touches")
    return 0


def _verify(root: Path, selection: Selection, args: argparse.Namespace) -> int:
    pages = size_bytes = bad = orphans = moved = 0
    begin = time.monotonic()
    for found in check_blocking(root, selection):
        pages += 1
        size_bytes += found.size_bytes
        orphans += found.is_orphan
        if not found.wrong:
            continue
        bad += 1
        if bad <= _MOST_LISTED:
            print(f"bad: {found.path}: {found.wrong}")
        if args.set_aside and found.name is not None:
            moved += set_aside_blocking(root, found.path, found.name)
    if moved:
        trim_blocking(root, 0)
    if bad > _MOST_LISTED:
        print(f"and {bad - _MOST_LISTED} more")
    took_s = max(time.monotonic() - begin, 1e-3)
    speed = size_text(int(size_bytes / took_s))
    print(f"{pages} pages, {size_text(size_bytes)}, {bad} bad; {took_s:.1f} s, {speed}/s")
    if args.set_aside:
        print(f"{moved} set aside; a server that needs them computes them again")
    if orphans:
        print(f"{orphans} whole pages lack the page before them: of no use until it is written again, and no harm")
    return _EXIT_BAD if bad else 0


def _purge(root: Path, selection: Selection, args: argparse.Namespace) -> int:
    if args.all == (selection != Selection()):
        raise UserError("say what to purge: either --all, or one or more of the flags that say which pages are meant")
    doomed = Doomed.find_blocking(root, selection)
    if not doomed.files:
        print("nothing to delete")
        return 0
    print(f"to be deleted from {root}: {doomed.files} files, {size_text(doomed.bytes)}")
    print(f"namespace: {selection.namespace or 'all'}; tenant: {_shown(selection.tenant)}; {_users(root)}")
    print("a running server goes on: it computes these pages again when it needs them, and writes them again")
    if not args.yes and not _agreed():
        print("nothing was deleted", file=sys.stderr)
        return _EXIT_USAGE
    if (root / TMP).is_dir():
        sweep(root / TMP)
    failed = _report(doomed.delete_blocking())
    print(f"{doomed.files - failed} files deleted")
    return _EXIT_BAD if failed else 0


def _report(steps: Iterator[OSError | None]) -> int:
    """Take every step; how many failed."""
    failed = 0
    for error in steps:
        if error is not None:
            failed += 1
            if failed <= _MOST_LISTED:
                print(f"cannot delete {error.filename}: {error.strerror}", file=sys.stderr)
    return failed


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise UserError("nobody is there to be asked; give --yes")
    return input('type "yes" to delete them: ').strip() == "yes"


def _users(root: Path) -> str:
    count = users_blocking(root)
    return f"open in {count} storage process{'es' if count > 1 else ''}" if count else "no storage process has it open"


def _shown(tenant: bytes | None) -> str:
    if tenant is None:
        return "all"
    return tenant.hex() if any(tenant) else _NO_TENANT


def _row(namespace: str, tenant: str, tally: Tally) -> str:
    return f"{namespace:18}{tenant:26}{tally.files:>10}{size_text(tally.bytes):>13}"


def _utc(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


if __name__ == "__main__":
    sys.exit(main())
