"""Pages for the tests of the S3 backend, and what they are called in a bucket."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.object_name import object_name
from sglang_hicache.storage.page_format import IncomingPage, OutgoingPage, PageName
from tests.servers import s3
from tests.storage import pages


def outgoing(count: int, namespace: str = pages.NAMESPACE, size: int = pages.PAGE_BYTES) -> list[OutgoingPage]:
    """Pages to be written; the same numbers are the same pages."""
    layout = pages.layout(namespace, size=size)
    keys = pages.keys(count)
    return [OutgoingPage(layout, key, pages.content(n, size), b"", n) for n, key in enumerate(keys)]


def incoming(count: int, size: int = pages.PAGE_BYTES) -> list[IncomingPage]:
    """Room for them."""
    layout = pages.layout(size=size)
    return [IncomingPage(layout, key, target) for key, target in zip(pages.keys(count), pages.empty(count, size))]


def names(count: int) -> list[PageName]:
    """Their names."""
    layout = pages.layout()
    return [layout.name(key) for key in pages.keys(count)]


def key(name: PageName) -> str:
    """What a page is called in the bucket."""
    return object_name("hicache/", name)


def fault(call: Callable[[], object]) -> StorageError:
    """The error that a call ends with, which shows no secret."""
    with pytest.raises(StorageError) as found:
        call()
    assert s3.SECRET_KEY not in str(found.value)
    return found.value
