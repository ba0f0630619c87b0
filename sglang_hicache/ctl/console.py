"""Where hicachectl speaks: results to standard output, for people or (`--json`) for scripts; notes to standard error.

A script reads standard output only, so with --json it holds one JSON value and nothing else, whatever happens.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from sglang_hicache.ctl.exits import Exit
from sglang_hicache.ctl.tables import Screen, printable


class Console:
    """Standard output and standard error of one command."""

    def __init__(self, *, is_json: bool) -> None:
        self.is_json = is_json
        self.screen = Screen()

    def json(self, value: Any) -> None:
        """One JSON value, in ASCII: it is read by programs, whatever they take their input for."""
        print(json.dumps(value, indent=2))

    def ended(self, code: Exit, message: str, **fields: Any) -> Exit:
        """A command is over: in JSON with what is known beside the words, else in words, failures to standard error."""
        if self.is_json:
            self.json({"ok": code is Exit.OK, "message": message, **fields})
        elif code is Exit.OK:
            self.screen.lines(message.splitlines())
        else:
            self.note(message)
        return code

    def note(self, text: str) -> None:
        """For whoever watches."""
        print("\n".join(map(printable, text.splitlines())), file=sys.stderr, flush=True)
