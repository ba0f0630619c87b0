"""Tiers: a small near store in front of a large far one.

Reads ask the nearest first, and what came from farther away is copied into the nearer tiers; writes go to all.  The
last tier keeps what the others lose, so its word counts: a page is written when the last tier has it, whether or not
the others had room, and without it nothing opens.  With `required: "any"` any tier will do, and a page may then be only
in a tier that soon evicts it.

What is shared, above all how a page is read, copied and healed, is in `composite.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.backend import StorageBackend
from sglang_hicache.storage.composite import Composite, Remake
from sglang_hicache.storage.composite_member import Member
from sglang_hicache.storage.composite_settings import TieredSettings


class TieredBackend(Composite):
    """Stores by distance."""

    def __init__(
        self,
        settings: TieredSettings,
        inside: Sequence[StorageBackend],
        remake: Remake | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        super().__init__(settings, inside, remake, clock)

    def _is_durable(self, durable: list[bool]) -> bool:
        return durable[-1] if self._settings.required == "last" else all(durable)

    def _is_enough(self, did: list[bool]) -> bool:
        return did[-1] if self._settings.required == "last" else any(did)

    def _main(self) -> Member:
        return self._members[-1]

    def _blamed(self, errors: Sequence[StorageError | None]) -> StorageError:
        last = errors[-1]
        return last if last is not None else super()._blamed(errors)

    def _copies(self) -> bool:
        return self._settings.promote
