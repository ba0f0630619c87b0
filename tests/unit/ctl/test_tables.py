"""What is printed: ages to read, columns that line up, and nothing that a terminal would obey."""

from __future__ import annotations

import io

import pytest

from sglang_hicache.ctl.tables import Screen, age, amounts, moment, printable, table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"), (0.0, "0.0 s"), (9.94, "9.9 s"), (10.0, "10 s"), (59.9, "59 s"), (60.0, "1 min"),
        (61.0, "1 min 1 s"), (3599.0, "59 min 59 s"), (3600.0, "1 h"), (7860.0, "2 h 11 min"), (86399.0, "23 h 59 min"),
        (86400.0, "1 d 0 h"), (200000.0, "2 d 7 h"),
    ],
)  # fmt: skip
def test_age(seconds: float | None, text: str) -> None:
    assert age(seconds) == text


def test_moment() -> None:
    assert moment("2026-11-22T22:40:01.123Z") == "2026-11-22 22:40:01"


def test_amounts() -> None:
    assert amounts({"write": 2, "read": 0, "lookup": 1}) == "write 2, lookup 1"
    assert amounts({}) == amounts(None) == "-"


def test_a_table_lines_up() -> None:
    assert table(("a", "name"), [(1, "x"), (22, None), (333,), ("", "longer name")]) == [
        "a    name",
        "1    x",
        "22   -",
        "333  -",
        "-    longer name",
    ]


@pytest.mark.parametrize(
    "hostile",
    ["\x1b[2Jgone", "a\rb", "\x9b31m", "right to left \u202e", "bell\x07", "isolate\u2066", "\u2028", "half \ud800"],
)
def test_nothing_steers_the_terminal(hostile: str) -> None:
    """A backend's error text, quoted by the server, must not clear the screen or forge a line of it."""
    shown = "".join([printable(hostile), *table(("x",), [(hostile,)])])
    assert shown.isprintable()
    assert printable("two\nlines") == "two lines"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "out", "is_coloured"),
    [
        ({}, _Terminal, True),
        ({"NO_COLOR": "1"}, _Terminal, False),
        ({"NO_COLOR": ""}, _Terminal, True),
        ({"TERM": "dumb"}, _Terminal, False),
        ({}, io.StringIO, False),
    ],
)
def test_colour_is_for_terminals(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], out: type[io.StringIO], is_coloured: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Screen(out()).bad("x") == ("\x1b[31;1mx\x1b[0m" if is_coloured else "x")


def test_a_terminal_gets_our_colours_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    screen, plain = Screen(terminal := _Terminal()), Screen(file := io.StringIO())
    screen.line(f"{screen.bad('sick')} \x1b[2J\x1b[31;1;5m\x9b")
    plain.line("\x1b[32mwell")
    assert terminal.getvalue() == "\x1b[31;1msick\x1b[0m \\x1b[2J\\x1b[31;1;5m\\x9b\n"
    assert file.getvalue() == "\\x1b[32mwell\n"


def test_a_sentence_is_wrapped_for_people_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    words = "word " * 20
    terminal, pipe = _Terminal(), io.StringIO()
    Screen(terminal).sentence(words)
    Screen(pipe).sentence(words)
    lines = terminal.getvalue().splitlines()
    assert len(lines) > 1 and all(len(line) <= 60 for line in lines)
    assert lines[0].startswith("  - word") and lines[1].startswith("    word")
    assert len(pipe.getvalue().splitlines()) == 1
