"""Where the server is and what opens it: the flags that every command has, and the client made of them.

A key never comes from the command line, where every user of the machine can read it in the process list.
"""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from sglang_hicache import __version__
from sglang_hicache.ctl.client import Client
from sglang_hicache.ctl.console import Console
from sglang_hicache.ctl.exits import Refused
from sglang_hicache.errors import UserError

#: `Client`, or one that can do more.
AnyClient = TypeVar("AnyClient", bound=Client)

URL_ENV, KEY_ENV, KEY_FILE_ENV = "HICACHECTL_URL", "HICACHECTL_KEY", "HICACHECTL_KEY_FILE"
DEFAULT_URL = "http://127.0.0.1:30000"

Run = Callable[[argparse.Namespace, Console], int]

#: Flags that other tools take a key with: refused in words, before they become part of a habit.
_KEY_FLAGS = ("--key", "--api-key", "--admin-key", "--admin-api-key")

_LARGEST_KEY_BYTES = 4096


class _KeyRefused(argparse.Action):
    """Says why, without repeating what it was given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> NoReturn:
        parser.error(
            f"{option_string}: a key on the command line can be read by every user of this machine; put it into a file "
            f"that only you can read (chmod 600) and give --key-file, or set {KEY_ENV}; and take this one out of use"
        )


def add_common(parser: argparse.ArgumentParser, **default: Any) -> None:
    """The flags; `default=argparse.SUPPRESS` for a command, whose parser must not undo what came before its name."""
    group = parser.add_argument_group("common flags, before or after the command")
    add = group.add_argument
    add("--url", metavar="URL", help=f"default: {URL_ENV} of the environment, else {DEFAULT_URL}", **default)
    add("--key-file", metavar="FILE", help=f"holds the admin key, mode 0600; default: {KEY_FILE_ENV}", **default)
    add("--cacert", metavar="PEM", help="check the server's certificate with this one (https)", **default)
    add("--json", action="store_true", help="one JSON value on standard output, for scripts", **default)
    for flag in _KEY_FLAGS:
        add(flag, action=_KeyRefused, nargs="?", help=argparse.SUPPRESS, default=argparse.SUPPRESS)


def add_command(commands: Any, name: str, run: Run | None, about: str) -> argparse.ArgumentParser:
    """A command, or one of a group of them; `run` gets the flags and the console, and returns the exit code."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_common(parser, default=argparse.SUPPRESS)
    if run is not None:
        parser.set_defaults(run=lambda args, console: _asked(run, args, console))
    return parser


def _asked(run: Run, args: argparse.Namespace, console: Console) -> int:
    """Whatever is at the URL may answer; what a command cannot make head or tail of is no answer of ours."""
    try:
        return run(args, console)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        why = f"({type(error).__name__}: {error}); is --url that of a server?"
        raise Refused(f"the answer is not one that hicachectl {__version__} knows {why}") from error


def client_of(args: argparse.Namespace, kind: type[AnyClient] = Client) -> AnyClient:
    """The client that the flags and the environment describe."""
    url = args.url or os.environ.get(URL_ENV) or DEFAULT_URL
    return kind(url, _key(args.key_file or os.environ.get(KEY_FILE_ENV)), cacert=args.cacert or "")


def key_of_environment(name: str) -> str:
    """A key where at least nobody but this user and root can see it; "": there is none."""
    return _checked(os.environ.get(name, "").strip(), name)


def _key(path: str | None) -> str:
    return _checked(_key_of_file(path), path) if path else key_of_environment(KEY_ENV)


def _checked(key: str, where: str) -> str:
    """Refused in words without it: what refuses it later would quote it."""
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"the key of {where} holds characters that no key has (blanks, or none of ASCII)")
    return key


def _key_of_file(path: str) -> str:
    """The key in a file that nobody else can read; looked at once it is open, for a name can change what it means."""
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise UserError(f"the key file {path} has mode {mode:04o}: others can read it; run: chmod 600 {path}")
            content = file.read(_LARGEST_KEY_BYTES)
    except OSError as error:
        raise UserError(f"the key file {path} cannot be read: {error.strerror}") from error
    key = content.decode(errors="replace").strip()
    if not key:
        raise UserError(f"the key file {path} is empty")
    return key
