"""Stores that are open during a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache.storage import registry
from sglang_hicache.storage.backend import StorageBackend
from sglang_hicache.storage.faulty import Gate
from tests.storage import pages

Open = Callable[..., StorageBackend]


@pytest.fixture(autouse=True)
def allow_faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may attach the saboteur."""
    monkeypatch.setenv(registry.ALLOW_FAULTY_ENV, "1")


@pytest.fixture
def open_backend() -> Iterator[Open]:
    """Opens backends and closes them after the test."""
    opened: list[StorageBackend] = []

    def open_one(name: str, config: dict[str, Any] | None = None, rank: int = 0) -> StorageBackend:
        backend = pages.backend(name, config or {}, rank)
        opened.append(backend)
        backend.open_blocking()
        return backend

    yield open_one
    for backend in opened:
        backend.close_blocking()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folder of a file store."""
    return tmp_path / "store"


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A gate to hold a backend at."""
    folder = tmp_path / "gate"
    folder.mkdir()
    made = Gate(folder)
    yield made
    made.close()
