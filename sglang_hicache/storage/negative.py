"""Pages that a store says it has and does not give: asked for once per while, not once per request.

One object per storage process; the prefetch lane adds and asks, the backup lane asks and removes.  Pure but for its
lock: it is given the clock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

#: Keys that are remembered; the oldest go first.  Some 10 MiB when full.
MOST_KEYS = 65_536


class NegativeCache:
    """Keys that could not be read.

    For `ttl_s` a look-up ends in front of such a key.  After that the key may be tried again, and is still known: the
    page under it must not count as stored when it is written and found to be there.
    """

    def __init__(self, clock: Callable[[], float], ttl_s: float, most_keys: int = MOST_KEYS) -> None:
        self._clock = clock
        self._ttl_s = ttl_s
        self._most_keys = most_keys
        #: Key to the time until which it ends look-ups; the oldest first.
        self._until_s: dict[bytes, float] = {}
        self._lock = threading.Lock()

    def fresh(self) -> NegativeCache:
        """An empty one like it: the same keys mean other pages under another namespace."""
        return NegativeCache(self._clock, self._ttl_s, self._most_keys)

    def __len__(self) -> int:
        return len(self._until_s)

    def __contains__(self, key: bytes) -> bool:
        return key in self._until_s

    def add(self, key: bytes) -> None:
        """This page could not be read."""
        with self._lock:
            self._until_s.pop(key, None)
            if len(self._until_s) >= self._most_keys:
                del self._until_s[next(iter(self._until_s))]
            self._until_s[key] = self._clock() + self._ttl_s

    def discard(self, keys: Sequence[bytes]) -> None:
        """These pages were read or written."""
        if not self._until_s:
            return
        with self._lock:
            for key in keys:
                self._until_s.pop(key, None)

    def readable(self, keys: Sequence[bytes]) -> int:
        """How many keys, counted from the first one, come before one that is not worth a try."""
        if not self._until_s:
            return len(keys)
        now_s = self._clock()
        return next((i for i, key in enumerate(keys) if self._until_s.get(key, now_s) > now_s), len(keys))
