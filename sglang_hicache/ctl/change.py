"""Commands that change something: attach, switch, detach, dry-run, clear.

A change is begun with the asynchronous form and then followed: the operator has the operation's id at once, and
neither Ctrl-C nor a connection that breaks leaves anybody guessing what became of it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from typing import Any

from sglang_hicache.config import PREFETCH_POLICIES, WRITE_POLICIES
from sglang_hicache.ctl.access import add_command, client_of
from sglang_hicache.ctl.client import QUESTION_TIMEOUT_S, UNKNOWN_STATUS, Client, Reply, refusal
from sglang_hicache.ctl.console import Console
from sglang_hicache.ctl.dry_run import show_report
from sglang_hicache.ctl.exits import Exit
from sglang_hicache.ctl.operations import follow
from sglang_hicache.errors import UserError
from sglang_hicache.extra_config import extra_config_json
from sglang_hicache.observe import secrets_in, without_logins

STORAGE = "/hicache/storage-backend"

_MODES = """\
modes:
  drain  (default) requests flow on; what the old storage is doing may end until --timeout (default: the server's, 30 s)
  force  the same with a short --timeout (default: the server's, 1 s)
  idle   refused unless nothing is under way, and no --timeout
"""

#: Seconds of a dry run unless asked for otherwise: told to the server, so that both wait for the same time.
_DRY_RUN_S = 30.0
#: Longest time that a server gives anything.
_LONGEST_S = 3600.0
#: Seconds that an answer may come later than the deadline of what it answers.
_GRACE_S = 15.0
#: Seconds for the deletion of all pages: its deadline is the server's own, which nobody here knows.
_CLEAR_S = 900.0

#: A value that names a secret where it is used, and holds none: `${env.NAME}`.
_PLACEHOLDER = re.compile(r"\$\{env\.\w+\}")


def add_commands(commands: Any) -> None:
    """The five."""
    attach = add_command(commands, "attach", run_attach, "attach a storage, or change the policies of the attached one")
    switch = add_command(commands, "switch", run_switch, "replace the attached storage by another, in one step")
    for parser in (attach, switch):
        _add_backend(parser)
        parser.add_argument("--prefetch-policy", choices=PREFETCH_POLICIES, help="from now on; default: as it is")
        parser.add_argument("--write-policy", choices=WRITE_POLICIES, help="from now on; default: as it is")
    detach = add_command(commands, "detach", run_detach, "detach the storage")
    for parser in (attach, switch, detach):
        _add_mode(parser)
    dry_run = add_command(commands, "dry-run", run_dry_run, "try a storage out on every rank, and attach nothing")
    _add_backend(dry_run)
    dry_run.add_argument(
        "--timeout", type=_seconds, default=_DRY_RUN_S, metavar="SECONDS", help=f"default: {_DRY_RUN_S:g}"
    )
    clear = add_command(commands, "clear", run_clear, "delete this server's pages from the attached storage")
    clear.add_argument("--yes", action="store_true", help="do not ask")


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backend", metavar="BACKEND", help="file, memory, ...")
    parser.add_argument(
        "--extra-config", metavar="JSON | @FILE | -",
        help="settings of the storage: a JSON object, or a file (.json, .toml, .yaml), or JSON on standard input; "
        "use a file, or ${env.NAME}, where it holds a secret",
    )  # fmt: skip


def _add_mode(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _MODES
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--mode", choices=("drain", "force", "idle"), default="drain", help="see below")
    how.add_argument("--force", dest="mode", action="store_const", const="force", help="--mode force")
    parser.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="until what is under way is cut off")
    parser.add_argument("--no-wait", action="store_true", help="print the operation's id and return at once")


def run_attach(args: argparse.Namespace, console: Console) -> Exit:
    """PUT."""
    return _change("PUT", _body(args), args, console)


def run_switch(args: argparse.Namespace, console: Console) -> Exit:
    """PUT with "switch"."""
    return _change("PUT", _body(args) | {"switch": True}, args, console)


def run_detach(args: argparse.Namespace, console: Console) -> Exit:
    """DELETE."""
    return _change("DELETE", {}, args, console)


def run_dry_run(args: argparse.Namespace, console: Console) -> Exit:
    """PUT with "dry_run": a report, good or bad."""
    body = _body(args) | {"dry_run": True, "timeout_s": args.timeout}
    reply = client_of(args).send("PUT", STORAGE, body, timeout_s=args.timeout + _GRACE_S)
    report = _report(reply)
    if console.is_json:
        console.json(report)
    else:
        show_report(report, console.screen)
    if reply.status == UNKNOWN_STATUS:
        return Exit.UNKNOWN
    return Exit.OK if report["ok"] else Exit.REFUSED


def run_clear(args: argparse.Namespace, console: Console) -> Exit:
    """POST .../clear."""
    client = client_of(args)
    if not args.yes:
        _agree(client)
    reply = client.command("POST", f"{STORAGE}/clear", timeout_s=_CLEAR_S)
    return console.ended(Exit.OK, reply.message, operation_id=reply.operation_id)


def _change(method: str, body: dict[str, Any], args: argparse.Namespace, console: Console) -> Exit:
    client = client_of(args)
    body |= {"mode": args.mode, "async": True} | ({} if args.timeout is None else {"timeout_s": args.timeout})
    reply = client.command(method, STORAGE, body, timeout_s=QUESTION_TIMEOUT_S)
    if args.no_wait:
        words = f"operation {reply.operation_id} has begun; see: hicachectl operations wait {reply.operation_id}"
        return console.ended(Exit.OK, words, operation_id=reply.operation_id)
    return follow(client, reply.operation_id, console)


def _body(args: argparse.Namespace) -> dict[str, Any]:
    """What is common to everything that names a backend.  The config is a text, as clients have always sent it."""
    body = {"hicache_storage_backend": args.backend}
    config = _extra_config(args.extra_config)
    if config is not None:
        body["hicache_storage_backend_extra_config_json"] = config
    for flag, key in (("prefetch_policy", "hicache_storage_prefetch_policy"), ("write_policy", "hicache_write_policy")):
        if (policy := vars(args).get(flag)) is not None:
            body[key] = policy
    return body


def _extra_config(given: str | None) -> str | None:
    """As JSON; None: none was given, which is another thing than an empty one."""
    config = extra_config_json(sys.stdin.read() if given == "-" else given)
    if config is not None and "hicache_storage_backend" in json.loads(config):
        # Examples of the HTTP API are such files, and the server would only list the keys that it does not know.
        raise UserError(
            "--extra-config is the body of an attach over HTTP; give what stands in its "
            "hicache_storage_backend_extra_config alone"
        )
    if config is not None and given != "-" and not given.lstrip().startswith("@") and _shows_a_secret(config):
        raise UserError(
            "--extra-config holds a secret, which every user of this machine can read in the process list; put the "
            'JSON into a file and give @FILE, or - and standard input, or name a variable of the server: "${env.NAME}"'
        )
    return config


def _shows_a_secret(config: str) -> bool:
    named = [text for text in secrets_in(json.loads(config)) if not _PLACEHOLDER.fullmatch(text)]
    return bool(named) or without_logins(config) != config


def _report(reply: Reply) -> dict[str, Any]:
    """The report of a dry run; a refusal before it began is one in words."""
    report = reply.json() if reply.text.startswith("{") else None
    if not isinstance(report, dict) or "ranks" not in report:
        raise refusal(reply)
    return report


def _agree(client: Client) -> None:
    if not sys.stdin.isatty():
        raise UserError("nobody is there to be asked; give --yes")
    print(f"deletes all pages of the model that {client.url} serves from its storage", file=sys.stderr)
    if input('type "yes" to delete them: ').strip() != "yes":
        raise UserError("nothing was deleted")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= _LONGEST_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0, at most {_LONGEST_S:g}")
    return value
