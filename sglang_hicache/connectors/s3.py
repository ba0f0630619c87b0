"""Models in a bucket of an S3 server: `s3://bucket/prefix[?endpoint=URL&region=NAME]`.

Keys and whatever else is not in the URL come from where other tools look for them: `AWS_ACCESS_KEY_ID` and its kin, or
a profile (`sglang_hicache/remote/s3_credentials.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from sglang_hicache.connectors.base import BaseFileSystemConnector, ConnectorType, Entry
from sglang_hicache.connectors.url import StoreUrl, check_options
from sglang_hicache.errors import IntegrityError, StorageError, UserError
from sglang_hicache.remote.s3_address import check_bucket, check_endpoint, check_prefix
from sglang_hicache.remote.s3_client import S3Bucket, S3Endpoint

_CONNECT_TIMEOUT_S, _TIMEOUT_S, _RETRIES = 5.0, 30.0, 3


class S3Connector(BaseFileSystemConnector):
    """The objects below a prefix."""

    type = ConnectorType.FS | ConnectorType.WEIGHT

    def __init__(self, url: StoreUrl) -> None:
        super().__init__(url)
        endpoint = _endpoint(url)
        try:
            self._opened: S3Bucket | None = S3Bucket(endpoint)
        except StorageError as error:
            raise UserError(f"{url.public}: {error}") from error

    def read_blocking(self, key: str, start: int = 0, size_bytes: int | None = None) -> bytes | memoryview:
        if start == 0 and size_bytes is None:
            data = self._bucket.get_blocking(key)
        elif size_bytes is None:
            whole = self._bucket.get_blocking(key)
            data = None if whole is None else whole[start:]
        elif size_bytes == 0:
            data = b""
        else:
            data = self._bucket.get_range_blocking(key, start, size_bytes)
        if data is None:
            raise self.missing(key)
        return data

    def write_blocking(self, key: str, data: bytes) -> None:
        self._bucket.put_blocking(key, [data])

    def entries_blocking(self, prefix: str = "") -> Iterator[Entry]:
        for key, size_bytes in self._bucket.list_blocking(prefix):
            yield Entry(key, size_bytes)

    def sizes_blocking(self, keys: Sequence[str]) -> list[int | None]:
        try:
            return [self._bucket.size_blocking(key) for key in keys]
        except StorageError as error:
            if error.reason == "refused":
                self._bucket.check_blocking()  # raises with the reason of the server, which the answer to HEAD lacks
            raise

    def delete_blocking(self, keys: Iterable[str]) -> None:
        self._bucket.delete_blocking(keys)

    def close(self) -> None:
        super().close()
        self._opened = None  # its connections end with it

    @property
    def _bucket(self) -> S3Bucket:
        if self._opened is None:
            raise IntegrityError(f"{self.url} was closed")
        return self._opened


def _endpoint(url: StoreUrl) -> S3Endpoint:
    check_options(url, "endpoint", "region", "path_style", "tls_ca_file")
    if url.login:
        raise UserError(
            f"{url.public}: an S3 URL holds no keys; they come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "from a profile"
        )
    path_style = url.options.get("path_style", "")
    if path_style not in ("", "yes", "no"):
        raise UserError(f"{url.public}: path_style is yes or no")
    prefix = f"{url.path}/" if url.path else ""
    try:
        check_bucket(url.netloc)
        check_prefix(prefix)
        if url.options.get("endpoint"):
            check_endpoint(url.options["endpoint"])
    except ValueError as error:
        raise UserError(f"{url.public}: {error}") from None
    return S3Endpoint(
        bucket=url.netloc,
        prefix=prefix,
        endpoint=url.options.get("endpoint", ""),
        region=url.options.get("region", ""),
        path_style={"yes": True, "no": False, "": None}[path_style],
        tls_ca_file=url.options.get("tls_ca_file", ""),
        connect_timeout_s=_CONNECT_TIMEOUT_S,
        timeout_s=_TIMEOUT_S,
        retries=_RETRIES,
    )
