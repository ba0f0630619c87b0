"""Stores that live in servers of their own, for `bench_storage.py`: the server, the extra config of our backend for it,
and the plainest loop over the client library that a page can go through.

The plain side moves the same bytes between the same memory and the same server, one object after the other, with
nothing around them: no header, no checksum, no look whether the page is there already.
"""

from __future__ import annotations

import ctypes
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import obstore
import redis
from botocore.config import Config
from mooncake.store import MooncakeDistributedStore
from obstore.store import S3Store

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sglang_hicache.cache.pools import HostPool
from sglang_hicache.storage.mooncake_client import keep_quiet
from tests.servers.mooncake import Mooncake
from tests.servers.redis import RedisServer
from tests.servers.s3 import ACCESS_KEY, BUCKET, SECRET_KEY, RcloneServer
from tests.servers.s3 import config as s3_config


class Plain(ABC):
    """The client library alone, between a pool and a store."""

    def __init__(self, pool: HostPool) -> None:
        self._pool = pool
        self._names = [f"plain/{page}" for page in range(pool.pages)]

    def write(self) -> None:
        for page, name in enumerate(self._names):
            self.put(name, page)

    def read(self) -> None:
        for page, name in enumerate(self._names):
            self.get(name, page)

    @abstractmethod
    def put(self, name: str, page: int) -> None:
        """Store a page of the pool."""

    @abstractmethod
    def get(self, name: str, page: int) -> None:
        """Bring it back into the pool."""

    @abstractmethod
    def clear(self) -> None:
        """Delete every object."""

    def close(self) -> None:  # noqa: B027 - some clients have nothing to give back
        """Leave the store."""


class PlainRedis(Plain):
    """redis-py with hiredis."""

    def __init__(self, pool: HostPool, url: str) -> None:
        super().__init__(pool)
        self._client = redis.Redis.from_url(url)

    def put(self, name: str, page: int) -> None:
        self._client.set(name, self._pool.page(page))

    def get(self, name: str, page: int) -> None:
        self._pool.page(page)[:] = self._client.get(name)

    def clear(self) -> None:
        self._client.delete(*self._names)

    def close(self) -> None:
        self._client.close()


class PlainObstore(Plain):
    """obstore."""

    def __init__(self, pool: HostPool, server: RcloneServer) -> None:
        super().__init__(pool)
        self._store = S3Store(
            BUCKET, endpoint=f"http://127.0.0.1:{server.port}", region="us-east-1", access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY, client_options={"allow_http": True}, virtual_hosted_style_request=False,
        )  # fmt: skip

    def put(self, name: str, page: int) -> None:
        obstore.put(self._store, name, self._pool.page(page), use_multipart=False)

    def get(self, name: str, page: int) -> None:
        self._pool.page(page)[:] = memoryview(obstore.get(self._store, name).bytes())

    def clear(self) -> None:
        obstore.delete(self._store, self._names)


class PlainBoto3(Plain):
    """boto3, which most programs for S3 are written with."""

    def __init__(self, pool: HostPool, server: RcloneServer) -> None:
        super().__init__(pool)
        self._client = boto3.client(
            "s3", endpoint_url=f"http://127.0.0.1:{server.port}", region_name="us-east-1", aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY, config=Config(s3={"addressing_style": "path"}),
        )  # fmt: skip

    def put(self, name: str, page: int) -> None:
        self._client.put_object(Bucket=BUCKET, Key=name, Body=bytes(self._pool.page(page)))

    def get(self, name: str, page: int) -> None:
        self._pool.page(page)[:] = self._client.get_object(Bucket=BUCKET, Key=name)["Body"].read()

    def clear(self) -> None:
        for name in self._names:
            self._client.delete_object(Bucket=BUCKET, Key=name)

    def close(self) -> None:
        self._client.close()


class PlainMooncake(Plain):
    """The library with the pool's memory registered: no copy on the way."""

    def __init__(self, pool: HostPool, store: Mooncake) -> None:
        super().__init__(pool)
        keep_quiet()  # or the library tells about itself in the middle of the tables
        self._client = MooncakeDistributedStore()
        failed = self._client.setup(
            "127.0.0.1", "P2PHANDSHAKE", 0, 64 << 20, "tcp", "", store.config()["master_server_address"]
        )
        if failed:
            raise SystemExit(f"the mooncake client does not start: {failed}")
        self._memory = (ctypes.c_char * len(pool.buffer)).from_buffer(pool.buffer)
        self._start = ctypes.addressof(self._memory)
        self._client.register_buffer(self._start, len(pool.buffer))

    def put(self, name: str, page: int) -> None:
        size = self._pool.page_bytes
        if self._client.put_from(name, self._start + page * size, size):
            raise SystemExit(f"mooncake does not take {name}")

    def get(self, name: str, page: int) -> None:
        size = self._pool.page_bytes
        if self._client.get_into(name, self._start + page * size, size) != size:
            raise SystemExit(f"mooncake does not give {name}")

    def clear(self) -> None:
        self._client.batch_remove(self._names, True)

    def close(self) -> None:
        self._client.unregister_buffer(self._start)
        self._client.close()
        del self._memory


class Remote(NamedTuple):
    """A store to measure: our backend and its extra config, and the plain sides; the first is the one to compare."""

    backend: str
    config: dict[str, Any]
    plain: dict[str, Callable[[HostPool], Plain]]


@contextmanager
def running(folder: Path, total_bytes: int) -> Iterator[list[Remote]]:
    """Every store whose server can be started here."""
    with ExitStack() as stack:
        redis_server = stack.enter_context(RedisServer(folder / "redis"))
        (folder / "s3").mkdir()
        rclone = stack.enter_context(RcloneServer(folder / "s3"))
        store = stack.enter_context(Mooncake(folder / "mooncake", held_bytes=4 * total_bytes))
        yield [
            Remote("redis", {"url": redis_server.url}, {"redis-py": lambda pool: PlainRedis(pool, redis_server.url)}),
            Remote(
                "s3",
                s3_config(rclone.port),
                {"obstore": lambda pool: PlainObstore(pool, rclone), "boto3": lambda pool: PlainBoto3(pool, rclone)},
            ),
            Remote("mooncake", store.config(), {"put_from": lambda pool: PlainMooncake(pool, store)}),
        ]
