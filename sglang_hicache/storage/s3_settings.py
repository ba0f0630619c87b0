"""What the S3 backend is told: which bucket of which server, whose requests they are, how many at a time and how long.

Used by `registry.py` in every process that checks a command; the backend gets its record ready made.  Pure.  A text
with a placeholder is checked on its rank, when it is known.  No complaint repeats what may be a key.
"""

from __future__ import annotations

import msgspec

from sglang_hicache.remote.s3_address import (
    check_bucket,
    check_endpoint,
    check_key,
    check_prefix,
    check_region,
    with_bucket,
)
from sglang_hicache.storage.capacity import parse_size
from sglang_hicache.storage.object_name import DEFAULT_PREFIX
from sglang_hicache.storage.placeholders import has_placeholder
from sglang_hicache.storage.settings import BackendSettings

#: Keys have 1024 bytes in all, ours take 150.
_LONGEST_PREFIX = 700
_LONGEST_WAIT_S = 60.0
_MOST_REQUESTS = 256
_MOST_RETRIES = 10

#: No server takes smaller parts, or larger ones.
_SMALLEST_PART = 5 * 1024 * 1024
_LARGEST_PUT = 5 * 1024**3


class S3Settings(BackendSettings, frozen=True, kw_only=True):
    """One bucket of one server."""

    #: Where the pages are.  It must be there: we make none.
    bucket: str = ""
    #: Address of the server, http://host:port or https://...; "": AWS_ENDPOINT_URL, else Amazon's own for the region.
    endpoint: str = ""
    #: "": AWS_REGION, else that of the profile, else us-east-1.
    region: str = ""
    #: In front of every key.
    prefix: str = DEFAULT_PREFIX
    #: Whose requests they are; both "": the usual chain of environment, files, and roles.
    access_key: str = ""
    secret_key: str = ""
    #: Of keys that last for a while only.
    session_token: str = ""
    #: Is the bucket named in the path of a URL, not in its host?  null: on any server but Amazon's.
    path_style: bool | None = None
    #: Absolute path of a file of authorities that are trusted beside those of the machine; "": AWS_CA_BUNDLE.
    tls_ca_file: str = ""
    #: Is a page's content part of its signature?  null: without TLS only; it costs a third of the speed of a write.
    sign_payload: bool | None = None
    #: Requests at a time for one batch; look-ups and reads have as many of their own as writes.
    parallel: int = 16
    #: Seconds until a connection is there, and for one try of a request from its first byte to its last.
    connect_timeout_s: float = 2.0
    timeout_s: float = 5.0
    #: How often a request is tried again that the server put off or that broke, with growing, jittered waits; no try
    #: is begun later than `timeout_s` after the first.
    retries: int = 2
    #: Ask the server to refuse a page that is there already; one that does not know how is found out.
    conditional_put: bool = True
    #: Delete a thousand pages with one request; false for servers that cannot (Alibaba OSS is one).
    bulk_delete: bool = True
    #: Larger pages are sent in several parts at a time: a number of bytes, or a text such as "32MiB"; 0: never.
    multipart_size: int | str = "32MiB"

    def __post_init__(self) -> None:
        if not self.bucket:
            raise ValueError("bucket is missing; give the name of a bucket that is there")
        for text, check in (
            (self.bucket, check_bucket), (self.endpoint, check_endpoint), (self.prefix, check_prefix),
            (self.region, check_region),
        ):  # fmt: skip
            if text and not has_placeholder(text):
                check(text)
        if self.path_style is False and self.endpoint and not has_placeholder(self.endpoint):
            with_bucket(self.endpoint, self.bucket)
        if len(self.prefix.encode()) > _LONGEST_PREFIX:
            raise ValueError(f"prefix has {len(self.prefix.encode())} bytes; at most {_LONGEST_PREFIX} are allowed")
        if bool(self.access_key) != bool(self.secret_key):
            raise ValueError("access_key and secret_key go together; give both, or none for the usual chain")
        if self.session_token and not self.access_key:
            raise ValueError("session_token goes with access_key and secret_key; give all three, or none")
        for name in ("access_key", "secret_key", "session_token"):
            check_key(name, msgspec.structs.asdict(self)[name])
        path = self.tls_ca_file
        if path and not has_placeholder(path) and (not path.startswith("/") or "\0" in path):
            raise ValueError(f"tls_ca_file={path!r} is not allowed; it takes the absolute path of a file")
        if not has_placeholder(self.multipart_size):
            self.multipart_bytes()
        self._check_numbers()

    def __repr__(self) -> str:
        return f"<S3Settings {self.place()}>"

    def place(self) -> str:
        where = f"s3://{self.bucket}/{self.prefix}"
        return f"{where} on {self.endpoint}" if self.endpoint else where

    def multipart_bytes(self) -> int | None:
        """Above it a page goes in parts; None: never."""
        size = parse_size(self.multipart_size)
        if size and not _SMALLEST_PART <= size <= _LARGEST_PUT:
            raise ValueError(
                f"multipart_size={self.multipart_size!r} is not allowed; it takes 0 (never), or 5MiB to 5GiB"
            )
        return size or None

    def _check_numbers(self) -> None:
        for name, seconds in (("connect_timeout_s", self.connect_timeout_s), ("timeout_s", self.timeout_s)):
            if not 0.01 <= seconds <= _LONGEST_WAIT_S:
                raise ValueError(f"{name}={seconds} is not allowed; it takes seconds, 0.01 to {_LONGEST_WAIT_S:.0f}")
        if not 1 <= self.parallel <= _MOST_REQUESTS:
            raise ValueError(f"parallel={self.parallel} is not allowed; it takes 1 to {_MOST_REQUESTS} requests")
        if not 0 <= self.retries <= _MOST_RETRIES:
            raise ValueError(f"retries={self.retries} is not allowed; it takes 0 to {_MOST_RETRIES}")
