"""What a drill says while it runs, and at its end.  Progress goes to standard error: with --json, standard output holds
one JSON value."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sglang_hicache.ctl.drill import report
from sglang_hicache.ctl.drill.result import Result, Verdict
from sglang_hicache.ctl.tables import Screen, printable

#: Seconds between two sayings of what is the case.
_INTERVAL_S = 0.2


class Voice:
    """Standard error: lines as things happen, and on a terminal, below them, what is the case just now."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._said_s = 0.0

    def tell(self, text: str) -> None:
        """Something has happened."""
        print(self._cleared() + printable(text), file=sys.stderr, flush=True)

    def now(self, text: str) -> None:
        """What is the case; the next thing that is said takes its place."""
        if self._is_terminal and time.monotonic() - self._said_s > _INTERVAL_S:
            self._said_s = time.monotonic()
            width = shutil.get_terminal_size().columns - 1
            print(self._cleared() + printable(text)[:width], end="", file=sys.stderr, flush=True)

    def _cleared(self) -> str:
        """What takes the line away on which the cursor is."""
        return "\r\x1b[K" if self._is_terminal else ""


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
