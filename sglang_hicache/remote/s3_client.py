"""From settings to a bucket of an S3 server, and from what its library and the server say to values.

Used by the storage backend and by the connectors of models, each with buckets of its own.  A bucket may be used by
several threads at a time, and it is meant to be: one request waits for its server most of the time.  The library works
on threads of its own, one set for the process, and lets go of the interpreter while it does.

Every call ends: a request that hangs after `timeout_s`, one that the server puts off (503, 429, a connection that
breaks) is tried again after a wait that grows and is jittered, but none is begun later than `timeout_s` after the
first.  Whatever goes wrong is a StorageError that has the words of the server, and neither keys nor tokens.
"""

from __future__ import annotations

import datetime
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from obstore.exceptions import AlreadyExistsError, BaseError, InvalidPathError
from obstore.store import S3Store

from sglang_hicache.errors import StorageError
from sglang_hicache.remote.s3_address import (
    check_bucket,
    check_endpoint,
    check_key,
    check_prefix,
    check_region,
    with_bucket,
)
from sglang_hicache.remote.s3_credentials import (
    GivenKeys,
    NoCredentials,
    ProfileKeys,
    endpoint_of,
    profile_keys,
    region_of,
)
from sglang_hicache.remote.s3_errors import does_not_do_ranges, is_about_the_bucket, is_behind_the_end, storage_error

#: Pieces of a body are handed over as they come from the connection: larger ones would be put together first.
_PIECE_BYTES = 1

#: Keys of one answer to a listing, and of one request that deletes; no server takes more.
_LIST_KEYS = 1000

#: Content above this goes in parts, each with a time of its own.
PART_BYTES = 64 * 1024 * 1024

_FIRST_WAIT = datetime.timedelta(milliseconds=50)
_LONGEST_WAIT = datetime.timedelta(seconds=2)

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Endpoint:
    """One bucket of one server, whose requests they are, and how long one may take.  Its repr has no secrets."""

    bucket: str
    #: In front of every key; the caller never sees it.
    prefix: str = ""
    #: "": what the environment says, else Amazon's own for the region.
    endpoint: str = ""
    #: "": what the environment or the profile says, else us-east-1.
    region: str = ""
    #: "": the usual chain (`s3_credentials.py`).
    access_key: str = field(default="", repr=False)
    secret_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)
    #: Is the bucket named in the path of a URL, not in its host?  None: on any server but Amazon's.
    path_style: bool | None = None
    #: File of authorities that are trusted beside those of this machine; "": AWS_CA_BUNDLE, else none.
    tls_ca_file: str = ""
    #: Is the content of what is sent part of its signature?  None: only without TLS, as with other clients.
    sign_payload: bool | None = None
    #: May one request delete a thousand objects?  Not every server knows it.
    bulk_delete: bool = True
    connect_timeout_s: float = 2.0
    #: Of a request from its first byte to its last.
    timeout_s: float = 10.0
    #: Tries after the first one.
    retries: int = 2

    def place(self) -> str:
        """For an operator: no secret."""
        where = self.endpoint or endpoint_of()
        try:
            check_endpoint(where)
        except ValueError:
            where = ""  # it may hold a password, and nothing is asked there
        return f"s3://{self.bucket}/{self.prefix}" + (f" on {where}" if where else "")


class S3Bucket:
    """Objects by key.  Nothing is connected before the first request."""

    def __init__(self, endpoint: S3Endpoint) -> None:
        self.place = endpoint.place()
        self._prefix = endpoint.prefix
        try:
            self._library: S3Store | None = _store(endpoint)
        except NoCredentials as error:
            raise StorageError(f"S3 at {self.place}: {error}", "refused", "wrong_password") from error
        except _s3_errors() as error:
            raise StorageError(f"S3 at {self.place}: {error}", "refused", "bad_config") from error

    def __repr__(self) -> str:
        return f"<S3Bucket {self.place}>"

    def close(self) -> None:
        """Let go of all connections.  The library closes them soon, on a thread of its own."""
        self._library = None

    @property
    def _store(self) -> S3Store:
        assert self._library is not None, "the bucket is closed"
        return self._library

    def check_blocking(self, prefix: str = "") -> None:
        """Does the server know us and the bucket, and let us list it?  A listing is asked for, because the answer to
        anything else may lack the reason of a refusal."""
        try:
            for _ in self._list(f"{self._prefix}{prefix}", chunk=1):
                return
        except InvalidPathError:
            return  # the library cannot name a key that somebody else has put there, and so there was a list
        except _s3_errors() as error:
            raise self._error(error, "list", prefix) from error

    def size_blocking(self, key: str) -> int | None:
        """Bytes of an object; None: there is none."""
        try:
            return self._store.head(self._prefix + key)["size"]
        except _s3_errors() as error:
            return self._absent(error, "look up", key)

    def open_blocking(self, key: str) -> tuple[int, Iterator[bytes]] | None:
        """Bytes of an object and its content, piece by piece, each piece when it has come; None: there is none.
        Whoever lets go of the iterator early has downloaded only what had come by then."""
        try:
            answer = self._store.get(self._prefix + key)
        except _s3_errors() as error:
            return self._absent(error, "get", key)
        return answer.meta["size"], self._pieces(answer, key)

    def get_blocking(self, key: str) -> Buffer | None:
        """A whole object; None: there is none."""
        try:
            return memoryview(self._store.get(self._prefix + key).bytes())
        except _s3_errors() as error:
            return self._absent(error, "get", key)

    def get_range_blocking(self, key: str, start: int, length: int) -> Buffer | None:
        """Some bytes of an object, fewer if it ends before; None: there is no such object."""
        try:
            answer = self._store.get(self._prefix + key, options={"range": (start, start + length)})
        except _s3_errors() as error:
            if is_behind_the_end(error):
                return b""
            if does_not_do_ranges(error):
                return self._skip_blocking(key, start, length)
            return self._absent(error, "get a part of", key)
        # Not in one piece: that would be as large as the server likes.
        return _part(self._pieces(answer, key), 0, length)

    def put_blocking(
        self, key: str, content: Sequence[Buffer], *, only_new: bool = False, part_bytes: int | None = PART_BYTES
    ) -> bool:
        """Store an object that is these buffers one after the other; whole for every reader, or not there at all.

        `only_new`: False if there was one already; a server that does not know this condition replaces it.
        `part_bytes`: in parts of this size, several at a time, if it is larger and not `only_new`; None: in one piece,
        which no server takes above 5 GiB.  An upload in parts that breaks leaves some behind that nobody sees, and that
        a lifecycle rule should remove.
        """
        size = sum(map(len, content))
        options: dict[str, Any] = {"use_multipart": False}
        if only_new:
            options["mode"] = "create"
        elif part_bytes is not None and size > part_bytes:
            options = {"use_multipart": True, "chunk_size": part_bytes}
        try:
            self._store.put(self._prefix + key, content, **options)
        except AlreadyExistsError:
            return False
        except _s3_errors() as error:
            raise self._error(error, "put", key) from error
        return True

    def list_blocking(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Key and size of every object whose key begins so, page by page, in no order."""
        start = self._prefix + prefix
        # The library knows whole steps between slashes only.
        folder = start.rpartition("/")[0]
        try:
            for found in itertools.chain.from_iterable(self._list(folder, _LIST_KEYS)):
                if found["path"].startswith(start):
                    yield found["path"].removeprefix(self._prefix), found["size"]
        except _s3_errors() as error:
            raise self._error(error, "list", prefix) from error

    def delete_blocking(self, keys: Iterable[str]) -> None:
        """Remove objects, a thousand with one request; those that are not there are no error."""
        names = [self._prefix + key for key in keys]
        for start in range(0, len(names), _LIST_KEYS):
            try:
                self._store.delete(names[start : start + _LIST_KEYS])
            except _s3_errors() as error:
                raise self._error(error, "delete", names[start]) from error

    def _list(self, folder: str, chunk: int) -> Iterable[Sequence[Mapping[str, Any]]]:
        return self._store.list(folder.rstrip("/") or None, chunk_size=chunk)

    def _pieces(self, answer: Any, key: str) -> Iterator[bytes]:
        try:
            yield from answer.stream(min_chunk_size=_PIECE_BYTES)
        except _s3_errors() as error:
            raise self._error(error, "get", key) from error

    def _skip_blocking(self, key: str, start: int, length: int) -> Buffer | None:
        """For a server that answers a request for a part as if it were for the whole object (status 200): the library
        refuses that, so that the object is read from its beginning."""
        opened = self.open_blocking(key)
        if opened is None:
            return None
        return _part(opened[1], start, length)

    def _absent(self, error: BaseException, doing: str, key: str) -> None:
        """None for an object that is not there; anything else is raised."""
        if isinstance(error, FileNotFoundError) and not is_about_the_bucket(error):
            return
        raise self._error(error, doing, key) from error

    def _error(self, error: BaseException, doing: str, key: str) -> StorageError:
        return storage_error(error, f"{doing} {key}" if key else doing, self.place)


def _part(pieces: Iterable[bytes], start: int, length: int) -> Buffer:
    """Some bytes of a content, fewer if it ends before.  Nothing behind them is fetched."""
    found, at = bytearray(), 0
    for piece in pieces:
        found += piece[max(0, start - at) : max(0, start + length - at)]
        at += len(piece)
        if at >= start + length:
            break
    return found


def _s3_errors() -> tuple[type[BaseException], ...]:
    """Everything that a call of the library raises for what the outside does, or for a key that it cannot name, and its
    panics: something that it took for granted was not so, as in an answer that names a key nobody had asked about.
    Their class is made when the first one comes, is exported nowhere, and is no `Exception`: a lane would end by it."""
    panics = [kind for kind in BaseException.__subclasses__() if kind.__name__ == "PanicException"]
    return (BaseError, OSError, ValueError, *panics)


def _keys(endpoint: S3Endpoint, environment: Mapping[str, str]) -> GivenKeys | ProfileKeys | None:
    """Whose requests they are; None: the library knows.  ValueError, NoCredentials: nobody's."""
    given = (endpoint.access_key, endpoint.secret_key, endpoint.session_token)
    if bool(endpoint.access_key) != bool(endpoint.secret_key):
        raise ValueError("access_key and secret_key come together; give both or neither")
    if not endpoint.access_key:
        return profile_keys(environment)
    for name, text in zip(("access_key", "secret_key", "session_token"), given):
        check_key(name, text)
    return GivenKeys(*given)


def _store(endpoint: S3Endpoint, environment: Mapping[str, str] = os.environ) -> S3Store:
    """The library's object.  ValueError, OSError, NoCredentials: it cannot be made."""
    server = endpoint.endpoint or endpoint_of(environment)
    check_bucket(endpoint.bucket)
    check_prefix(endpoint.prefix)
    if server:
        check_endpoint(server)
    region = endpoint.region or region_of(environment)
    check_region(region)
    keys = _keys(endpoint, environment)
    timeout = datetime.timedelta(seconds=endpoint.timeout_s)
    is_plain = server.startswith("http://")
    by_path = bool(server) if endpoint.path_style is None else endpoint.path_style
    config: dict[str, Any] = {
        "disable_bulk_delete": not endpoint.bulk_delete,
        "region": region,
        "virtual_hosted_style_request": not by_path,
        "unsigned_payload": not (is_plain if endpoint.sign_payload is None else endpoint.sign_payload),
    }
    if server:
        config["endpoint"] = server if by_path else with_bucket(server, endpoint.bucket)
        # It comes before `endpoint` in the library, and could come from the environment.
        config["aws_endpoint_url_s3"] = config["endpoint"]
    if endpoint.access_key:
        config["skip_signature"] = False
    client: dict[str, Any] = {
        "allow_http": is_plain,
        "connect_timeout": datetime.timedelta(seconds=endpoint.connect_timeout_s),
        "timeout": timeout,
    }
    authorities = endpoint.tls_ca_file or environment.get("AWS_CA_BUNDLE", "")
    if authorities:
        client["root_certificate"] = Path(authorities).read_bytes()
    retry = {
        "max_retries": endpoint.retries,
        "retry_timeout": timeout,
        "backoff": {"init_backoff": _FIRST_WAIT, "max_backoff": _LONGEST_WAIT, "base": 2},
    }
    return S3Store(endpoint.bucket, config=config, client_options=client, retry_config=retry, credential_provider=keys)
