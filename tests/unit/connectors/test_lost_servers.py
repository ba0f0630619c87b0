"""A server that dies while a model is read or written: it comes back in time, or the failure names key and place."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest

from sglang_hicache.connectors import stored_model
from sglang_hicache.connectors.create import create_remote_connector
from sglang_hicache.connectors.stored_model import Extent
from sglang_hicache.connectors.upload import Upload
from sglang_hicache.connectors.upload_source import FolderSource
from sglang_hicache.errors import StorageError
from tests.servers import s3
from tests.servers.redis import RedisServer
from tests.unit.connectors.conftest import CHUNK_BYTES, Places

#: It writes down whatever it is told before it answers.
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


@pytest.mark.parametrize("kind", ["redis", "s3"])
def test_a_server_that_is_killed_and_comes_back_is_only_a_delay(
    kind: str, places: Places, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. The server dies while a model is saved, and again while a rank reads it. 2. It is started again. 3. Nobody
    has to be told."""
    server = RedisServer(tmp_path / "redis", *DURABLE) if kind == "redis" else s3.RcloneServer(tmp_path)
    monkeypatch.setattr(stored_model, "_PAUSES_S", (0.2, 0.5, 1.0, 4.0, 4.0))
    url = f"redis://127.0.0.1:{server.port}/m"
    if kind == "s3":
        url = f"s3://{s3.BUCKET}/m?endpoint=http://127.0.0.1:{server.port}"
    turn = threading.Lock()
    with server, create_remote_connector(url) as place:

        def interrupted(name: str) -> None:
            """From now on the sixth call finds the server dead, and the ninth starts it again."""
            real, calls = getattr(place, name), itertools.count(1)

            def call(*args: object) -> object:
                # One at a time: the server must not be started while it is being killed.
                with turn:
                    number = next(calls)
                    if number == 6:
                        server.kill_blocking()
                    if number == 9:
                        server.start_blocking()
                return real(*args)

            monkeypatch.setattr(place, name, call)

        interrupted("write_blocking")
        upload = Upload(FolderSource(str(model), CHUNK_BYTES), place, lambda *told: None, overwrite=False)
        saved = upload.run_blocking().manifest
        interrupted("read_blocking")
        for number in (1, 2):
            file = saved.file(f"model-{number}.safetensors")
            assert file is not None
            extents = [Extent(file.name, 0, file.size_bytes)]
            data = b"".join(bytes(piece.data) for piece in place.weight_iterator(extents, saved))
            assert data == (model / file.name).read_bytes()


def test_a_server_that_stays_away_is_named_with_the_key(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_model, "_PAUSES_S", (0.01,))
    server = RedisServer(tmp_path / "redis")
    with server, create_remote_connector(f"{server.url}/n") as place:
        upload = Upload(FolderSource(str(model), CHUNK_BYTES), place, lambda *told: None, overwrite=False)
        saved = upload.run_blocking().manifest
        server.kill_blocking()
        with pytest.raises(StorageError) as caught:
            list(place.weight_iterator([Extent("model-1.safetensors", 5000, 5001)], saved))
    assert f"{server.url}/n: cannot read the key 'files/model-1.safetensors/000001-" in str(caught.value)
