"""Which pages the store was known to hold: a Bloom filter of page keys, bounded in memory, alike on every rank.

Two filters of 1 MiB each: when one has taken 524,288 pages, the other is emptied and takes the next.  So the latest
524,288 pages at least are known (at 64 tokens a page 33 million tokens), 1,048,576 at most, and a page that was never
added is taken for known with a probability below 0.5 % (4 bits of each key: twice (1 - e^(-4/16))^4 for full filters).
Page keys are digests already: their own bytes are the hashes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_BITS = 1 << 23
_MOST = 1 << 19
_HASHES = 4


def _places(key: bytes) -> Iterator[tuple[int, int]]:
    """Byte and bit of each hash of a key."""
    for i in range(_HASHES):
        at = int.from_bytes(key[4 * i : 4 * i + 4]) % _BITS
        yield at >> 3, 1 << (at & 7)


class KnownPages:
    """Pages added lately."""

    def __init__(self) -> None:
        #: Takes new pages; and the one that was filled before.
        self._filters = (bytearray(), bytearray())
        self._count = 0

    def __bool__(self) -> bool:
        return bool(self._filters[0])

    def add(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            fresh = self._filters[0]
            if not fresh or self._count >= _MOST:
                fresh = bytearray(_BITS // 8)
                self._filters, self._count = (fresh, self._filters[0]), 0
            if not _holds(fresh, key):
                self._count += 1
                for byte, bit in _places(key):
                    fresh[byte] |= bit

    def __contains__(self, key: bytes) -> bool:
        return any(_holds(pages, key) for pages in self._filters)

    def forget(self) -> None:
        self._filters, self._count = (bytearray(), bytearray()), 0


def _holds(pages: bytearray, key: bytes) -> bool:
    return bool(pages) and all(pages[byte] & bit for byte, bit in _places(key))
