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
from tests.storage.composite_world import Composite
from tests.storage.store_folder import write
from tests.storage.store_world import House

Open = Callable[..., StorageBackend]
Start = Callable[..., House]


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
def start(root: Path) -> Iterator[Start]:
    """Starts houses over the root and ends them after the test."""
    houses: list[House] = []

    def start_one(**kwargs: Any) -> House:
        houses.append(House(root, **kwargs))
        return houses[-1]

    yield start_one
    for house in houses:
        house.close()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A gate to hold a backend at."""
    folder = tmp_path / "gate"
    folder.mkdir()
    made = Gate(folder)
    yield made
    made.close()


@pytest.fixture
def backend(open_backend: Open, root: Path) -> StorageBackend:
    """An open file store, as a server has it."""
    return open_backend("file", {"file_storage_path": str(root)})


@pytest.fixture
def elsewhere(tmp_path: Path, open_backend: Open) -> Path:
    """A store of somebody else, to which links may lead."""
    other = tmp_path / "elsewhere"
    write(open_backend("file", {"file_storage_path": str(other)}), 3)
    return other


@pytest.fixture
def composite() -> Iterator[Callable[..., Composite]]:
    """Opens stores of stores and closes them after the test."""
    made: list[Composite] = []

    def open_one(name: str, **config: Any) -> Composite:
        made.append(Composite(name, **config))
        made[-1].backend.open_blocking()
        return made[-1]

    yield open_one
    for one in made:
        one.backend.close_blocking()
