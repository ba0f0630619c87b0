"""Drills: a scenario of load, faults and changes is run against a live server, and judged.

`hicachectl drill SCENARIO.toml ...` is the only way in; `docs/drills.md` says how a scenario is written.  A drill
talks to a server over HTTP, and breaks storage through the control file of a saboteur that the server was started with.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sglang_hicache.ctl.access import URL_ENV, client_of, key_of_environment
from sglang_hicache.ctl.drill import report, session
from sglang_hicache.ctl.drill.progress import Voice, show
from sglang_hicache.ctl.drill.result import Result, Verdict
from sglang_hicache.ctl.drill.scenario import Scenario
from sglang_hicache.ctl.drill.scenario_file import read
from sglang_hicache.ctl.drill.stream import StreamClient
from sglang_hicache.ctl.exits import Exit
from sglang_hicache.errors import UserError
from sglang_hicache.storage.registry import ALLOW_FAULTY_ENV

_LOAD_KEY_ENV = "HICACHECTL_LOAD_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `hicachectl drill`, on top of those that say where a server is."""
    add = parser.add_argument
    add("scenarios", nargs="+", type=Path, metavar="SCENARIO.toml", help="scripts/drills has some to begin with")
    add("--short", action="store_true", help="with the smaller figures of the scenario's [short]")
    add("--report", type=Path, metavar="DIR", help="write DIR/NAME.html for each drill, and DIR/junit.xml")
    add("--i-mean-it", action="store_true", help="with --url: yes, that server, whoever it serves")
    parser.epilog = (
        f"Without --url ({URL_ENV} does not count) each drill starts a server of its own and stops it at the end.\n"
        "With it, faults are injected only through a fault wrapper that the server was started with;\n"
        f"{_LOAD_KEY_ENV} of the environment holds its ordinary key, if it has one."
    )


def run(args: argparse.Namespace) -> int:
    """Run the drills and tell about them; the exit code."""
    # The saboteur's settings are checked here as the drill's own server checks them.
    os.environ[ALLOW_FAULTY_ENV] = "1"
    scenarios = [read(path, is_short=args.short) for path in args.scenarios]
    _check_names(scenarios)
    if args.i_mean_it and not args.url:
        raise UserError("--i-mean-it is for a server that is not the drill's own; name it with --url")
    results = _run_foreign(scenarios, args) if args.url else _run_own(scenarios)
    written = report.write(args.report, results) if args.report else []
    show(results, written, is_json=args.json)
    return _exit_of(results)


def _check_names(scenarios: Sequence[Scenario]) -> None:
    names = [found.name for found in scenarios]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two scenarios have the name {twice[0]!r}; their reports would be one file")


def _run_own(scenarios: Sequence[Scenario]) -> list[Result]:
    """In a folder of their own, which is kept for whoever asks why a drill did not pass."""
    folder = Path(tempfile.mkdtemp(prefix="hicache-drill-"))
    results = session.run_all_own(scenarios, folder, Voice())
    if all(result.verdict in (Verdict.PASSED, Verdict.SKIPPED) for result in results):
        shutil.rmtree(folder, ignore_errors=True)
    return results


def _run_foreign(scenarios: Sequence[Scenario], args: argparse.Namespace) -> list[Result]:
    client = client_of(args, StreamClient)
    if not args.i_mean_it:
        raise UserError(
            f"a drill puts load on {client.url}, breaks its storage and may slow it down for everybody; give "
            "--i-mean-it if that is what you want, or leave --url out: then the drill starts a server of its own"
        )
    voice = Voice()
    key = key_of_environment(_LOAD_KEY_ENV)
    return [session.run_foreign(found, client, key, voice) for found in scenarios]


def _exit_of(results: Sequence[Result]) -> Exit:
    verdicts = {result.verdict for result in results}
    if Verdict.ERROR in verdicts:
        return Exit.REFUSED
    return Exit.DRILL_FAILED if Verdict.FAILED in verdicts else Exit.OK
