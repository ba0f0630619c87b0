"""The bytes of one page between memory and a file: in place, in pieces that stay in a core's cache, hashed on the way.

Used by `file.py`, in the threads of the lanes.  Knows no names and no folders' layout.
"""

from __future__ import annotations

import errno
import os

from sglang_hicache.storage.page_format import (
    CHUNK_BYTES,
    HEADER_BYTES,
    WRITE_CHUNK_BYTES,
    IncomingPage,
    OutgoingPage,
)


def fill_blocking(descriptor: int, page: IncomingPage) -> bool:
    """Read header and payload; False if the file has another size."""
    payload = page.payload
    size = len(payload)
    # One byte more than there should be: a file that is too long shows without a stat.
    beyond = bytearray(1)
    if size <= CHUNK_BYTES:
        if os.preadv(descriptor, [page.header, payload, beyond], 0) != HEADER_BYTES + size:
            return False
        page.arrived(size)
        return True
    # The first piece is shorter by the header, so that all later reads are aligned in the file.
    end = CHUNK_BYTES - HEADER_BYTES
    if os.preadv(descriptor, [page.header, payload[:end]], 0) != CHUNK_BYTES:
        return False
    page.arrived(end)
    while end < size:
        start, end = end, min(end + CHUNK_BYTES, size)
        tail = [beyond] if end == size else []
        if os.preadv(descriptor, [payload[start:end], *tail], HEADER_BYTES + start) != end - start:
            return False
        page.arrived(end)
    return True


def pour_blocking(descriptor: int, page: OutgoingPage) -> None:
    """Write header and payload.  The header comes last, because it holds the hash of the rest."""
    if len(page.payload) <= WRITE_CHUNK_BYTES:
        _write_all(descriptor, [page.header(), page.payload], 0)
        return
    for start, chunk in page.chunks():
        _write_all(descriptor, [chunk], HEADER_BYTES + start)
    _write_all(descriptor, [page.header()], 0)


def _write_all(descriptor: int, buffers: list[bytes | memoryview], offset: int) -> None:
    wanted = sum(map(len, buffers))
    written = os.pwritev(descriptor, buffers, offset)
    if written != wanted:
        # A regular file takes less than asked when the disk is full; asking again would only say so by errno.
        raise OSError(errno.ENOSPC, f"only {written} of {wanted} bytes were taken")
