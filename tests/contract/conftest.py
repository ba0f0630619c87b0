"""A server per test, on one model folder per run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.fake_server import FakeServer, make_config, make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte tokenizer, a chat template and a config.json."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def serve(model: Path) -> Iterator[Callable[..., FakeServer]]:
    """Makes servers with other keys or switches than the usual."""
    servers: list[FakeServer] = []

    def make(**http: Any) -> FakeServer:
        servers.append(FakeServer(make_config(model, **http)))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def server(serve: Callable[..., FakeServer]) -> FakeServer:
    """The usual server."""
    return serve()
