"""What hicachectl prints for people: tables, ages, and a little colour.

What a server says is shown, never obeyed: its texts quote backends and requests, and a control character among them
could move the cursor or rewrite the line above.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

#: Half a surrogate pair is among them: JSON can bring one, and no terminal takes it.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

#: Our own colours: all that a terminal gets to obey.
_COLOUR = re.compile(r"(\x1b\[(?:1|32|33|31;1|0)m)")

#: A terminal narrower than this is written past its edge.
_NARROWEST = 60


def printable(value: Any) -> str:
    """A text on one line, and nothing in it that a terminal would act upon."""
    return _CONTROL.sub(lambda match: " " if match[0] in "\n\t" else ascii(match[0])[1:-1], str(value))


def age(seconds: float | None) -> str:
    """A time span to the precision that somebody reads."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    for unit, next_unit, size, smaller in (("s", "", 1, 1), ("min", "s", 60, 1), ("h", "min", 3600, 60)):
        if seconds < {"s": 60, "min": 3600, "h": 86400}[unit]:
            rest = int(seconds % size // smaller)
            return f"{int(seconds // size)} {unit}" + (f" {rest} {next_unit}" if rest and next_unit else "")
    return f"{int(seconds // 86400)} d {int(seconds % 86400 // 3600)} h"


def moment(iso: str) -> str:
    """A time of the server to the second, in UTC as it told it."""
    return iso.replace("T", " ")[:19]


def amounts(counts: Mapping[str, Any] | None) -> str:
    """`write 2, read 1`: only what there is."""
    return ", ".join(f"{name} {number}" for name, number in (counts or {}).items() if number) or "-"


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Columns as wide as what is in them; None, and what a row lacks at its end, is shown as a dash."""
    lines = [list(headings)]
    for row in rows:
        cells = ["-" if cell is None or cell == "" else printable(cell) for cell in row]
        lines.append(cells + ["-"] * (len(headings) - len(cells)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]


class Screen:
    """Standard output, as wide and as colourful as it is."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        is_terminal = self._out.isatty()
        self._has_colour = is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        #: None: what reads this is no terminal, and a sentence stays on one line for it to search in.
        self._columns = max(_NARROWEST, shutil.get_terminal_size().columns) if is_terminal else None

    def line(self, text: str = "") -> None:
        """In our colours, and whatever else could steer the terminal made visible."""
        parts = _COLOUR.split(text) if self._has_colour else [text]
        print("".join(part if _COLOUR.fullmatch(part) else printable(part) for part in parts), file=self._out)

    def lines(self, texts: Iterable[str]) -> None:
        """The same for several."""
        for text in texts:
            self.line(text)

    def heading(self, text: str) -> None:
        """Begins a section."""
        self.line()
        self.line(self._coloured("1", text))

    def sentence(self, text: str, indent: str = "  ", first: str = "- ") -> None:
        """Wrapped where somebody reads it."""
        text = printable(text)
        if self._columns is None:
            self.line(indent + first + text)
        else:
            hanging = indent + " " * len(first)
            self.lines(textwrap.wrap(text, self._columns, initial_indent=indent + first, subsequent_indent=hanging))

    def good(self, text: str) -> str:
        """As it should be."""
        return self._coloured("32", text)

    def doubtful(self, text: str) -> str:
        """On its way, or not known."""
        return self._coloured("33", text)

    def bad(self, text: str) -> str:
        """Somebody should look."""
        return self._coloured("31;1", text)

    def _coloured(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._has_colour else text
