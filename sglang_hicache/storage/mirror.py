"""A mirror: every page in several stores, so that one of them may go.

Reads ask the first store that is well, page by page the next one for what it lacks; writes go to all that are well.  A
page is written when `min_writes` stores have it.  A store that was away gets what it missed when a page is written or
read again, and not before: nobody compares whole stores.

What is shared, above all how a page is read, copied and healed, is in `composite.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from sglang_hicache.storage.backend import StorageBackend
from sglang_hicache.storage.composite import Composite, Remake
from sglang_hicache.storage.composite_settings import MirrorSettings


class MirrorBackend(Composite):
    """Stores that hold the same."""

    def __init__(
        self,
        settings: MirrorSettings,
        inside: Sequence[StorageBackend],
        remake: Remake | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        super().__init__(settings, inside, remake, clock)

    def _is_durable(self, durable: list[bool]) -> bool:
        # Among any `min_writes` stores there is one that keeps its pages.
        return durable.count(False) < self._settings.min_writes

    def _is_enough(self, did: list[bool]) -> bool:
        return sum(did) >= self._settings.min_writes

    def _copies(self) -> bool:
        return self._settings.repair
