"""Places that hold models: a folder, a Redis server and an S3 server, all of them real."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sglang_hicache.connectors import BaseWeightConnector, create_remote_connector
from tests.servers import s3
from tests.servers.redis import RedisServer

KINDS = ("file", "redis", "s3")
PASSWORD = "p@ss/w#rd"
#: Chunks so small that every file of a test has several.
CHUNK_BYTES = 4096

#: Makes a connector for a new place of a kind, or for a URL; closed after the test.
Open = Callable[..., BaseWeightConnector]


class Places:
    """URLs of places that nobody has used yet."""

    def __init__(self, folder: Path, redis: RedisServer, rclone: s3.RcloneServer) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self.redis = redis
        self.rclone = rclone

    def new(self, kind: str) -> str:
        """One of this kind."""
        return self.at(kind, f"place-{next(self._numbers)}/a model")

    def at(self, kind: str, name: str) -> str:
        """One with this name."""
        name = name.replace(" ", "%20")
        if kind == "file":
            return f"file://{self._folder}/{name}"
        if kind == "redis":
            return f"redis://:p%40ss%2Fw%23rd@127.0.0.1:{self.redis.port}/{name}"
        return f"s3://{s3.BUCKET}/{name}?endpoint=http://127.0.0.1:{self.rclone.port}"


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    """Servers that run as long as the tests do."""
    folder = tmp_path_factory.mktemp("places")
    with RedisServer(folder / "redis", password=PASSWORD) as redis, s3.warm(s3.RcloneServer(folder)) as rclone:
        assert isinstance(redis, RedisServer) and isinstance(rclone, s3.RcloneServer)
        yield Places(folder, redis, rclone)


@pytest.fixture(autouse=True)
def aws_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are where other tools look for them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.SECRET_KEY)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Every kind of place in turn."""
    return request.param


@pytest.fixture
def connect(places: Places) -> Iterator[Open]:
    """`connect(kind)` or `connect(url=...)`."""
    opened: list[BaseWeightConnector] = []

    def open_one(kind: str = "", url: str = "") -> BaseWeightConnector:
        opened.append(create_remote_connector(url or places.new(kind)))
        return opened[-1]

    yield open_one
    for connector in opened:
        connector.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that passes for a model: two weight files, an index, a binary file, and what nobody wants to have."""
    folder = tmp_path / "model"
    write_model(folder, seed=1)
    return folder


def write_model(folder: Path, seed: int) -> None:
    """Weights of a seed; all else is equal."""
    folder.mkdir()
    chance = np.random.default_rng(seed)
    index = {}
    for number in (1, 2):
        tensors = {f"t{number}{letter}": chance.random((50, 60), np.float32) for letter in "ab"}
        save_file(tensors, folder / f"model-{number}.safetensors")
        index |= dict.fromkeys(tensors, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {
        "architectures": ["LlamaForCausalLM"], "dtype": "float32", "max_position_embeddings": 64, "vocab_size": 9,
        "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(bytes(range(256)) * 40)
    (folder / "empty.txt").write_bytes(b"")
    odd = folder / "templates ü"
    odd.mkdir()
    (odd / "100% #?&=+.jinja").write_text("{{ odd }}")
    (folder / "pytorch_model.bin").write_bytes(b"other weights")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("secret")


#: What `save_model` takes of it.
SAVED = [
    "config.json", "empty.txt", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json",
    "templates ü/100% #?&=+.jinja", "tokenizer.model",
]  # fmt: skip
