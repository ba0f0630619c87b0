"""hicachectl in this process, against a fake server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from sglang_hicache.ctl import main
from tests.unit.ctl.fake import FakeServer


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """Its address is in the environment, as an operator's may be, and so is a key."""
    fake = FakeServer()
    monkeypatch.setenv("HICACHECTL_URL", fake.url)
    monkeypatch.setenv("HICACHECTL_KEY", "the-admin-key")
    yield fake
    fake.close()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs a command line."""

    def call(*argv: str) -> Ran:
        capsys.readouterr()
        try:
            code = main.main(argv)
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
        return Ran(code, *capsys.readouterr())

    return call
