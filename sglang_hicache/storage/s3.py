"""Pages in a bucket of an S3 server: one object for each page, header and payload, under the name all key stores use.

Who owns what: the lane that calls owns its call, and threads of that lane's own help it, because a server far away
takes ten milliseconds for any answer, and only requests side by side make up for that.  An object is there whole or not
at all, so that no reader sees a part of a page; nothing is cached here that a server would miss when it comes back.

A batch is written side by side, and a page that fails does not take those back that come behind it.  They are harmless:
look-ups stop at the first gap, so nobody reaches them before their parent is there, and then they are what they say.

The library sends a page from where it is.  A request that was given up may read it for a moment more, when other bytes
are there already; what a server would make of that has a wrong checksum, and a wrong signature where there is one.

It makes no bucket, sets no lifecycle and deletes nothing but pages of ours below its prefix.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice

from sglang_hicache.errors import StorageError
from sglang_hicache.observe import SharedCounters
from sglang_hicache.remote.s3_client import S3Bucket, S3Endpoint
from sglang_hicache.storage.backend import OpenContext, PageOutcome, PageResult, StorageBackend
from sglang_hicache.storage.object_name import namespace_prefix, object_name, parse_object_name
from sglang_hicache.storage.page_format import HEADER_BYTES, IncomingPage, OutgoingPage, PageName
from sglang_hicache.storage.s3_settings import S3Settings
from sglang_hicache.storage.side_by_side import SideBySide

_logger = logging.getLogger(__name__)

#: Pages that one request deletes.
_DELETE_PAGES = 1000

#: A namespace is listed again until none of its pages is left: a server may leave out what moved while it was listed.
_MOST_PASSES = 5

#: Behind these a read goes on.
_READABLE = (PageResult.HIT, PageResult.WRONG_SIZE)


class S3Backend(StorageBackend):
    """One bucket."""

    def __init__(self, settings: S3Settings, context: OpenContext) -> None:
        self._settings = settings
        self._place = settings.place()
        self._readers = SideBySide("s3 read", settings.parallel)
        self._writers = SideBySide("s3 write", settings.parallel)
        self._counters = SharedCounters()
        self._bucket: S3Bucket | None = None
        self._part_bytes = settings.multipart_bytes()
        self._is_conditional = settings.conditional_put

    def __repr__(self) -> str:
        return f"<S3Backend {self._place}>"

    def open_blocking(self) -> None:
        bucket = S3Bucket(_endpoint(self._settings))
        self._place = bucket.place
        bucket.check_blocking()
        self._bucket = bucket

    def exists_blocking(self, names: Sequence[PageName]) -> int:
        return len(self._sizes_blocking(self._readers, names))

    def read_blocking(self, pages: Sequence[IncomingPage]) -> list[PageOutcome]:
        return self._readers.run_blocking(self._read_blocking, pages, lambda outcome: outcome in _READABLE)

    def write_blocking(self, pages: Sequence[OutgoingPage]) -> list[PageOutcome]:
        if not pages:
            return []
        # Without its parent a page is most likely not there either, so that one question does for a batch; if the first
        # page is there, the rest may be, and a page that is there need not travel.
        sizes = self._sizes_blocking(self._writers, [pages[0].name])
        if sizes:
            sizes += self._sizes_blocking(self._writers, [page.name for page in pages[1:]])
        is_there = [size == page.size_bytes for size, page in zip(sizes, pages)]
        is_there += [False] * (len(pages) - len(is_there))
        return self._writers.run_blocking(
            lambda pair: PageResult.PRESENT if pair[1] else self._write_blocking(pair[0]),
            list(zip(pages, is_there)),
            lambda outcome: isinstance(outcome, PageResult),
        )

    def delete_blocking(self, names: Sequence[PageName]) -> int:
        # Nobody counts what a request deletes.  Behind a gap there may be more.
        sizes = self._writers.run_blocking(
            self._try_size_blocking, names, lambda size: not isinstance(size, StorageError)
        )
        found = [_key(name) for name, size in zip(names, _raised(sizes)) if size is not None]
        self._delete_blocking(found)
        return len(found)

    def clear_blocking(self, namespace: str) -> int:
        removed = 0
        for _ in range(_MOST_PASSES):
            keys = self._keys_blocking(namespace)
            before = removed
            while some := list(islice(keys, _DELETE_PAGES)):
                self._delete_blocking(some)
                removed += len(some)
            if removed == before:
                break
        return removed

    def info(self) -> dict[str, str]:
        settings = self._settings
        keys = "extra config" if settings.access_key else "environment, files or role"
        return {"place": self._place, "prefix": settings.prefix, "credentials": keys}

    def stats(self) -> dict[str, int]:
        return self._counters.snapshot()

    def close_blocking(self) -> None:
        self._readers.close_blocking()
        self._writers.close_blocking()
        if self._bucket is not None:
            self._bucket.close()

    @property
    def _open_bucket(self) -> S3Bucket:
        assert self._bucket is not None, "the backend is not open"
        return self._bucket

    def _count(self, request: str) -> None:
        """One more request, which somebody may have to pay."""
        self._counters.add(f"{request}_requests")

    def _size_blocking(self, name: PageName) -> int | None:
        self._count("head")
        return self._open_bucket.size_blocking(_key(name))

    def _try_size_blocking(self, name: PageName) -> int | None | StorageError:
        try:
            return self._size_blocking(name)
        except StorageError as error:
            return _told(error)

    def _sizes_blocking(self, threads: SideBySide, names: Sequence[PageName]) -> list[int]:
        """Sizes of pages up to the first that is not there.  A fault behind that one is no fault."""
        sizes = threads.run_blocking(self._try_size_blocking, names, lambda size: isinstance(size, int))
        return [size for size in _raised(sizes) if size is not None]

    def _read_blocking(self, page: IncomingPage) -> PageOutcome:
        self._count("get")
        try:
            opened = self._open_bucket.open_blocking(_key(page.name))
            if opened is None:
                return PageResult.MISS
            size, pieces = opened
            # An object of another size may be large: nothing of it is fetched.
            return _fill(page, pieces) if size == page.size_bytes else PageResult.WRONG_SIZE
        except StorageError as error:
            return _told(error)

    def _write_blocking(self, page: OutgoingPage) -> PageOutcome:
        try:
            is_new = self._put_blocking(page, only_new=self._is_conditional)
            if not is_new and self._size_blocking(page.name) != page.size_bytes:
                # What is there is no page of ours, whatever it is; a page takes its place.
                is_new = self._put_blocking(page, only_new=False)
        except StorageError as error:
            return _told(error)
        return PageResult.WRITTEN if is_new else PageResult.PRESENT

    def _put_blocking(self, page: OutgoingPage, only_new: bool) -> bool:
        bucket, key, content = self._open_bucket, _key(page.name), (page.header(), page.payload)
        self._count("put")
        in_parts = self._part_bytes is not None and page.size_bytes > self._part_bytes
        if in_parts or not only_new:
            # Parts are put together by one more request, which knows no condition.
            return bucket.put_blocking(key, content, part_bytes=self._part_bytes)
        try:
            return bucket.put_blocking(key, content, only_new=True)
        except StorageError as error:
            if error.code != "bad_config":
                raise
            self._count("put")
            bucket.put_blocking(key, content, part_bytes=self._part_bytes)
            self._is_conditional = False
            _logger.warning("the server does not know conditional writes (%s); it is not asked for them again", error)
            return True

    def _delete_blocking(self, keys: Sequence[str]) -> None:
        if keys:
            self._count("delete")
            self._open_bucket.delete_blocking(keys)

    def _keys_blocking(self, namespace: str) -> Iterator[str]:
        """Keys of all pages of a namespace, and of nothing else that somebody may have put there."""
        for key, _ in self._open_bucket.list_blocking(namespace_prefix("", namespace)):
            if parse_object_name("", key) is not None:
                yield key


def _key(name: PageName) -> str:
    """The bucket puts the prefix in front of it."""
    return object_name("", name)


def _endpoint(settings: S3Settings) -> S3Endpoint:
    return S3Endpoint(
        bucket=settings.bucket,
        prefix=settings.prefix,
        endpoint=settings.endpoint,
        region=settings.region,
        access_key=settings.access_key,
        secret_key=settings.secret_key,
        session_token=settings.session_token,
        path_style=settings.path_style,
        tls_ca_file=settings.tls_ca_file,
        sign_payload=settings.sign_payload,
        bulk_delete=settings.bulk_delete,
        connect_timeout_s=settings.connect_timeout_s,
        timeout_s=settings.timeout_s,
        retries=settings.retries,
    )


def _told(error: StorageError) -> StorageError:
    """A fault as a value.  What it went through is forgotten: the frames of its traceback have the pages of the batch
    in them, and the library's store with its connections; as a value it would be held by them, and they by it."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__
    return error


def _raised(sizes: list[int | None | StorageError]) -> list[int | None]:
    """Sizes, or the fault at their end."""
    if sizes and isinstance(sizes[-1], StorageError):
        raise sizes.pop()  # left in the list it would hold itself, by its traceback
    return sizes


def _fill(page: IncomingPage, pieces: Iterator[bytes]) -> PageResult:
    """Each piece goes to its place as it comes, and is hashed while it is in the cache of the core."""
    at = -HEADER_BYTES
    for piece in pieces:
        rest = memoryview(piece)
        if at < 0:
            part, rest = rest[:-at], rest[-at:]
            start = at + HEADER_BYTES
            page.header[start : start + len(part)] = part
            at += len(part)
        if rest:
            end = at + len(rest)
            page.payload[at:end] = rest
            page.arrived(end)
            at = end
    if at != len(page.payload):
        raise StorageError(f"page {page.name} ended after {at + HEADER_BYTES} of {page.size_bytes} bytes")
    return PageResult.HIT
