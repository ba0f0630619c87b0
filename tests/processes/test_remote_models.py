"""A model served from a store: the text of the one on disk, its pages shared with it, and nothing left or shown."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from sglang_hicache.connectors.create import create_remote_connector
from sglang_hicache.connectors.upload import Upload
from sglang_hicache.connectors.upload_source import FolderSource
from sglang_hicache.connectors.url import filled_in
from sglang_hicache.server_args import BUILTIN_MODEL_PATH
from tests.processes.server import Server, cached
from tests.servers import s3
from tests.servers.redis import RedisServer

PASSWORD = "pa/ss@word of a test"
PROMPT = "The module provides the classes that support the main interface of the library. " * 8
#: Several chunks, so that ranks read different ones.
CHUNK_BYTES = 1 << 17


class World(NamedTuple):
    """Stores that hold the built-in model, and how a server is told."""

    folder: Path
    urls: dict[str, str]
    redis: RedisServer
    #: What the disk's servers have computed, by tensor-parallel size.
    wanted: dict[int, list[int]]

    def flags(self, tp_size: int) -> tuple[str, ...]:
        """All servers of a size have a store of pages in common."""
        return (
            "--enable-deterministic-inference", "--page-size", "16", "--enable-hierarchical-cache",
            "--max-total-tokens", "4096", "--hicache-storage-backend", "file",
            "--file-storage-path", str(self.folder / f"pages{tp_size}"),
            "--hicache-storage-prefetch-policy", "wait_complete",
            "--hicache-storage-backend-extra-config", '{"prefetch_threshold": 16}',
        )  # fmt: skip

    def from_disk(self, tp_size: int) -> list[int]:
        """Tokens of the prompt, computed by a server that has the model on its disk; its pages are stored."""
        if tp_size not in self.wanted:
            with Server(self.folder / f"disk{tp_size}", *self.flags(tp_size), tp_size=tp_size) as server:
                reply = server.generate(PROMPT)
                assert not cached(reply)["device"]
                server.quiesce()
            self.wanted[tp_size] = reply["output_ids"]
        return self.wanted[tp_size]


ENVIRONMENT = {
    "MODEL_PASSWORD": PASSWORD, "AWS_ACCESS_KEY_ID": s3.ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": s3.SECRET_KEY,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Servers that run, and a model in each."""
    folder = tmp_path_factory.mktemp("remote")
    rclone = s3.RcloneServer(folder)
    with (
        pytest.MonkeyPatch.context() as patch,
        RedisServer(folder / "redis", password=PASSWORD) as redis,
        s3.warm(rclone),
    ):
        assert isinstance(redis, RedisServer)
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        urls = {
            "redis": f"redis://:${{env.MODEL_PASSWORD}}@127.0.0.1:{redis.port}/models/builtin?db=2",
            "s3": f"s3://{s3.BUCKET}/models/builtin?endpoint=http://127.0.0.1:{rclone.port}",
            "file": f"file://{folder}/models/builtin",
        }
        for url in urls.values():
            with create_remote_connector(filled_in(url, ENVIRONMENT)) as place:
                source = FolderSource(BUILTIN_MODEL_PATH, CHUNK_BYTES)
                Upload(source, place, lambda *told: None, overwrite=False).run_blocking()
        yield World(folder, urls, redis, {})


@pytest.mark.parametrize(
    ("kind", "tp_size"),
    [
        ("redis", 1),
        ("file", 1),
        ("s3", 2),
        pytest.param("redis", 2, marks=pytest.mark.long),
        pytest.param("s3", 1, marks=pytest.mark.long),
    ],
)
def test_a_model_in_a_store_says_the_same_and_finds_the_pages_of_the_one_on_disk(
    kind: str, tp_size: int, world: World, tmp_path: Path
) -> None:
    wanted = world.from_disk(tp_size)
    flags = ("--model-path", world.urls[kind], *world.flags(tp_size))
    with Server(tmp_path / "server", *flags, tp_size=tp_size, env=ENVIRONMENT) as server:
        (run,) = (tmp_path / "server").glob("hicache-*")
        pulled = {path.name for path in (run / "model").rglob("*")}
        assert "config.json" in pulled and not [name for name in pulled if name.endswith((".safetensors", ".bin"))]
        assert stat.S_IMODE((run / "model").stat().st_mode) == 0o700
        reply = server.generate(PROMPT)
        assert reply["output_ids"] == wanted
        assert cached(reply)["storage"] > 50, "the pages of the same weights have another name"
        told = server.http.get("/model_info").text + server.admin("GET", "/server_info").text
        assert "/models/builtin" in told and PASSWORD not in told and run.name not in told
        assert server.http.get("/model_info").json()["served_model_name"] == "builtin"
    assert not run.exists()
    assert "pa/ss" not in server.log and "pa%2Fss" not in server.log
    assert "streamed" in server.log


def test_a_damaged_chunk_stops_the_start_and_is_named_without_the_password(world: World, tmp_path: Path) -> None:
    """1. A byte of the weights flips in the store. 2. No rank may compute with it."""
    with world.redis.client(db=2) as client:
        key = sorted(client.scan_iter("models/builtin/files/model.safetensors/*"))[5]
        data = client.get(key)
        client.set(key, data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
        try:
            server = Server(tmp_path / "server", "--model-path", world.urls["redis"], env=ENVIRONMENT)
            assert server.finish() == 1
        finally:
            client.set(key, data)
    assert key.decode().removeprefix("models/builtin/") in server.log
    assert f"redis://127.0.0.1:{world.redis.port}/models/builtin" in server.log and "pa/ss" not in server.log
