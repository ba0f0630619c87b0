"""Memory that the transfers of the Mooncake library may touch: the rank's host pool, and a room for everything else.

A network card transfers only from and to memory that was registered before.  Pages of the host pool go from where they
lie; their headers, and pages that lie elsewhere, go through a room.  So do small pages, whose copy costs less than a
second transfer for the header.  Who owns what: a room belongs to one lane, the host pool to whoever mapped it; of the
latter only the address is kept here, never a view, because a view would keep the pool from being closed.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sglang_hicache.storage.page_format import HEADER_BYTES, IncomingPage, OutgoingPage

#: Over TCP pages below this are copied: the header of a page that is not copied is a transfer of its own, which waits
#: for an answer like any other, and up to here a copy costs less.
LEAST_DIRECT_BYTES = 2 << 20

#: The same for network cards, which work on both at once and are slowed down by a copy.
LEAST_DIRECT_BY_CARD_BYTES = 64 * 1024

#: Objects in a room begin at multiples of this, as the library's own buffers do.
_ALIGNMENT = 64

Page = IncomingPage | OutgoingPage
Register = Callable[[int, int], None]


def address_of(view: memoryview | mmap.mmap) -> int:
    """Where writable memory begins.  Keeps nothing of it: while a view of ctypes lives, the memory cannot be closed."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


@dataclass(frozen=True, slots=True)
class HostSpan:
    """Where the host pool lies."""

    start: int = 0
    end: int = 0
    #: Smaller payloads are not worth it.
    least_bytes: int = 0

    @classmethod
    def of(cls, memory: memoryview | None, least_bytes: int = 0) -> HostSpan:
        """The span of a pool; an empty one if there is none."""
        if memory is None or not len(memory) or memory.readonly:
            return cls()
        start = address_of(memory)
        return cls(start, start + len(memory), least_bytes)

    def find(self, payload: memoryview) -> int:
        """Address of a payload that lies in the pool and may go from there; 0: it is to be copied."""
        if self.start == self.end or payload.readonly or len(payload) < max(1, self.least_bytes):
            return 0
        address = address_of(payload)
        return address if self.start <= address and address + len(payload) <= self.end else 0


class Pieces:
    """Where the objects of one call lie, in the order of its pages: what the library is told."""

    __slots__ = ("addresses", "is_direct", "sizes")

    def __init__(self, *, is_direct: bool) -> None:
        #: Header and payload apart, the payload where it is; otherwise each object in one piece, in the room.
        self.is_direct = is_direct
        self.addresses: list[list[int]] = []
        self.sizes: list[list[int]] = []


class Room:
    """Registered memory of one lane, as large as was asked for, and as one page at least."""

    def __init__(self, size_bytes: int, register: Register, unregister: Callable[[int], None]) -> None:
        self._size_bytes = size_bytes
        self._register = register
        self._unregister = unregister
        self._memory: mmap.mmap | None = None
        self._view = memoryview(b"")
        self._address = 0

    def fits(self, size_bytes: int) -> int:
        """How many objects of this size it holds at once: one at least."""
        return max(1, self._size_bytes // _aligned(size_bytes))

    def place(self, pages: Sequence[Page], direct: Sequence[int]) -> Pieces:
        """A place for each of these pages, which are of one size.  `direct`: addresses of their payloads, [] if they go
        through the room."""
        each = HEADER_BYTES if direct else _aligned(pages[0].size_bytes)
        self._make_room(each * len(pages))
        pieces = Pieces(is_direct=bool(direct))
        for index, page in enumerate(pages):
            at = self._address + index * each
            if direct:
                pieces.addresses.append([at, direct[index]])
                pieces.sizes.append([HEADER_BYTES, len(page.payload)])
            else:
                pieces.addresses.append([at])
                pieces.sizes.append([page.size_bytes])
        return pieces

    def pour(self, page: OutgoingPage, pieces: Pieces, index: int) -> None:
        """Put in what must be sent from here."""
        at = pieces.addresses[index][0] - self._address
        if not pieces.is_direct:
            for start, chunk in page.chunks():
                into = at + HEADER_BYTES + start
                self._view[into : into + len(chunk)] = chunk
        header = page.header()
        self._view[at : at + len(header)] = header

    def drain(self, page: IncomingPage, pieces: Pieces, index: int) -> None:
        """Take out what has arrived."""
        at = pieces.addresses[index][0] - self._address
        page.header[:] = self._view[at : at + HEADER_BYTES]
        if not pieces.is_direct:
            page.payload[:] = self._view[at + HEADER_BYTES : at + page.size_bytes]

    def close(self) -> None:
        """Give the memory back."""
        if self._memory is not None:
            self._unregister(self._address)
            self._view.release()
            self._memory.close()
            self._memory = None

    def _make_room(self, size_bytes: int) -> None:
        if self._memory is not None and size_bytes <= len(self._memory):
            return
        self.close()
        self._memory = mmap.mmap(-1, max(size_bytes, self._size_bytes))
        self._view = memoryview(self._memory)
        self._address = address_of(self._memory)
        self._register(self._address, len(self._memory))


def _aligned(size_bytes: int) -> int:
    return max(1, -(-size_bytes // _ALIGNMENT)) * _ALIGNMENT
