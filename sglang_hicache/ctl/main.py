"""The command line of hicachectl: flags in, one command run, an exit code out (`_EPILOG` has them).

Nothing is decided here: `change`, `operations`, `status`, `incidents` and `audit` hold one function per command, which
gets the parsed flags and the console and returns the exit code.  Drills come in through a lazy door.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from sglang_hicache.ctl import audit, change, incidents, operations, status
from sglang_hicache.ctl.access import add_command, add_common
from sglang_hicache.ctl.console import Console
from sglang_hicache.ctl.exits import Exit, OutcomeUnknown, Refused, Unreachable
from sglang_hicache.errors import HiCacheError, UserError

_EPILOG = """\
examples:
  hicachectl status
  hicachectl dry-run file --extra-config @new-store.json
  hicachectl switch file --extra-config @new-store.json --timeout 10
  hicachectl detach --force
  hicachectl operations list
  hicachectl audit verify /var/log/hicache-audit.jsonl --expect "$HEAD"

exit codes:
  0    done
  1    refused, or failed; flaws in an audit log
  2    a mistake in the command line: nothing was sent
  3    the server cannot be reached: nothing was done
  4    sent, and how it ended is not known: look at `status` and `operations list` before trying again
  5    a drill's assertion failed
  130  interrupted: what was sent goes on in the server
"""

_CODES = {UserError: Exit.USAGE, Refused: Exit.REFUSED, Unreachable: Exit.UNREACHABLE, OutcomeUnknown: Exit.UNKNOWN}


def main(argv: Sequence[str] | None = None) -> int:
    """Edge of the process."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser(argv).parse_args(argv)
    console = Console(is_json=args.json)
    try:
        code = args.run(args, console)
        sys.stdout.flush()
        return code
    except HiCacheError as error:
        return console.ended(_CODES.get(type(error), Exit.REFUSED), f"error: {error}")
    except KeyboardInterrupt:
        console.note("interrupted; what was sent goes on in the server: hicachectl operations list")
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # `hicachectl ... | head`: the rest is not wanted.  Python would complain once more when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hicachectl",
        description="Look at, and change, the storage of a running server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # An abbreviated flag would let --key pass for --key-file, and a key with it.
        allow_abbrev=False,
    )
    add_common(parser)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for room in (status, change, operations, incidents, audit):
        room.add_commands(commands)
    drills = add_command(commands, "drill", None, "run a scenario of load, faults and changes, and judge it")
    if "drill" in argv:
        _open_drill_door(drills)
    return parser


def _open_drill_door(parser: argparse.ArgumentParser) -> None:
    from sglang_hicache.ctl import drill  # lazy door: a runner, a load and reports, which no other command needs

    drill.add_arguments(parser)
    parser.set_defaults(run=lambda args, console: drill.run(args))
