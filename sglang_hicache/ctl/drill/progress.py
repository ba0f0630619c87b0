"""What a drill says while it runs, and at its end.  Progress goes to standard error: with --json, standard output holds
one JSON value."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sglang_hicache.ctl.drill import report
from sglang_hicache.ctl.drill.result import Result, Verdict
from sglang_hicache.ctl.tables import Screen, printable


def tell(text: str) -> None:
    """Something has happened."""
    print(printable(text), file=sys.stderr, flush=True)


def show(results: Sequence[Result], written: Sequence[Path], *, is_json: bool) -> None:
    """The verdicts."""
    if is_json:
        reports = [str(path) for path in written]
        print(json.dumps({"drills": [report.as_json(result) for result in results], "reports": reports}, indent=2))
        return
    screen = Screen()
    for result in results:
        _show_one(result, screen)
    for path in written:
        screen.line(f"report: {path}")


def _show_one(result: Result, screen: Screen) -> None:
    screen.heading(f"{result.name}: {result.verdict.value}")
    if result.message:
        screen.sentence(result.message)
    for item in result.assertions:
        colour = {Verdict.PASSED: screen.good, Verdict.FAILED: screen.bad}.get(item.verdict, screen.doubtful)
        screen.line(f"  {colour(item.verdict.value.ljust(7))} {printable(item.name)}: {printable(item.detail)}")
