"""Models in a Redis or Valkey server: `redis://[[user]:password@]host[:port]/model[?db=N]`.

A model has all keys below `model/`, so a database holds many, beside other things.  What is behind the host is the
model's name and no database: that is `?db=N`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from sglang_hicache.connectors.base import BaseKVConnector, ConnectorType, Entry
from sglang_hicache.connectors.manifest import check_name
from sglang_hicache.connectors.url import StoreUrl, check_options
from sglang_hicache.errors import StorageError, UserError
from sglang_hicache.remote.redis_client import REDIS_ERRORS, RedisEndpoint, Tls, connect, storage_error

_CONNECT_TIMEOUT_S, _TIMEOUT_S = 5.0, 30.0
#: Keys that one round trip asks for, and that one step of SCAN looks at.
_BATCH = 1000
_GLOB = re.compile(rb"([\\*?\[\]])")


class RedisConnector(BaseKVConnector):
    """The keys below a model's name."""

    type = ConnectorType.KV | ConnectorType.WEIGHT

    def __init__(self, url: StoreUrl) -> None:
        super().__init__(url)
        endpoint = _endpoint(url)
        try:
            self._client = connect(endpoint)
            self._place = endpoint.place()
        except ValueError as error:
            raise UserError(f"{url.public}: {error}") from None
        self._prefix = _bytes(url.path) + b"/"

    def read_blocking(self, key: str, start: int = 0, size_bytes: int | None = None) -> bytes:
        full = self._prefix + _bytes(key)
        try:
            if start == 0:
                data = self._client.get(full)
                if data is not None and size_bytes is not None:
                    data = data[:size_bytes]
            else:
                end = -1 if size_bytes is None else start + size_bytes - 1
                data = self._client.getrange(full, start, end) or (b"" if self._client.exists(full) else None)
        except REDIS_ERRORS as error:
            raise self._failed("read", key, error) from error
        if data is None:
            raise self.missing(key)
        return data

    def write_blocking(self, key: str, data: bytes) -> None:
        try:
            self._client.set(self._prefix + _bytes(key), data)
        except REDIS_ERRORS as error:
            raise self._failed("write", key, error) from error

    def entries_blocking(self, prefix: str = "") -> Iterator[Entry]:
        match = _GLOB.sub(rb"\\\1", self._prefix + _bytes(prefix)) + b"*"
        seen: set[bytes] = set()
        cursor = None
        while cursor != 0:
            try:
                cursor, found = self._client.scan(cursor or 0, match, count=_BATCH)
            except REDIS_ERRORS as error:
                raise self._failed("list", prefix, error) from error
            # SCAN may name a key twice while the server rearranges its table.
            fresh = [_text(key[len(self._prefix) :]) for key in dict.fromkeys(found) if key not in seen]
            seen.update(found)
            for key, size_bytes in zip(fresh, self.sizes_blocking(fresh)):
                if size_bytes is not None:
                    yield Entry(key, size_bytes)

    def sizes_blocking(self, keys: Sequence[str]) -> list[int | None]:
        sizes: list[int | None] = []
        for batch in _batches(keys):
            try:
                with self._client.pipeline(transaction=False) as pipe:
                    for key in batch:
                        pipe.strlen(self._prefix + _bytes(key))
                        pipe.exists(self._prefix + _bytes(key))
                    found = pipe.execute(raise_on_error=False)
            except REDIS_ERRORS as error:
                raise self._failed("ask for", batch[0], error) from error
            for key, size_bytes, exists in zip(batch, found[::2], found[1::2]):
                if isinstance(size_bytes, BaseException):
                    raise self._failed("ask for", key, size_bytes) from size_bytes
                sizes.append(size_bytes if exists else None)
        return sizes

    def delete_blocking(self, keys: Iterable[str]) -> None:
        for batch in _batches(keys):
            try:
                # Its memory is given back in the background: the server serves others meanwhile.
                self._client.unlink(*(self._prefix + _bytes(key) for key in batch))
            except REDIS_ERRORS as error:
                raise self._failed("delete", batch[0], error) from error

    def close(self) -> None:
        super().close()
        self._client.close()

    def _failed(self, what: str, key: str, error: BaseException) -> StorageError:
        found = storage_error(error, self._place)
        return StorageError(f"{self.url}: cannot {what} the key {key!r}: {found}", found.reason, found.code)


def _endpoint(url: StoreUrl) -> RedisEndpoint:
    check_options(url, "db", "tls_ca_file", "tls_cert_file", "tls_key_file", "tls_check_hostname")
    if not url.path or url.path.isdigit():
        raise UserError(
            f"{url.public}: behind the host stands the name of a model, as in redis://host:6379/my-model; a "
            "database is ?db=N"
        )
    try:
        check_name(url.path)
    except UserError as error:
        raise UserError(f"{url.public}: {error}") from None
    check_hostname = url.options.get("tls_check_hostname", "yes")
    if check_hostname not in ("yes", "no"):
        raise UserError(f"{url.public}: tls_check_hostname is yes or no")
    db = url.options.get("db", "0")
    if not (db.isascii() and db.isdigit()):
        raise UserError(f"{url.public}: db is the number of a database")
    tls = Tls(
        ca_file=url.options.get("tls_ca_file", ""),
        cert_file=url.options.get("tls_cert_file", ""),
        key_file=url.options.get("tls_key_file", ""),
        check_hostname=check_hostname == "yes",
    )
    return RedisEndpoint(
        f"{url.scheme}://{url.netloc}/{db}", tls=tls, connect_timeout_s=_CONNECT_TIMEOUT_S, timeout_s=_TIMEOUT_S
    )


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _text(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


def _batches(keys: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(keys)
    while batch := list(itertools.islice(rest, _BATCH)):
        yield batch
