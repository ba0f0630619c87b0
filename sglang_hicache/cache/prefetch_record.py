"""What one request asked of storage, and how far that has come.  Changed by `prefetch.py` alone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sglang_hicache.cache.op import Op


class PrefetchPhase(Enum):
    LOOKUP = "lookup"
    READ = "read"
    STOPPING = "stopping"  # revoked; the next plan says what counts
    OVER = "over"


#: Phases in which pages may still arrive.
RUNNING = (PrefetchPhase.LOOKUP, PrefetchPhase.READ)


@dataclass(slots=True, eq=False)
class Prefetch:
    """What one request asked of storage."""

    rid: str
    seed: bytes
    #: Flat key of the prompt up to the end of the wanted span.
    key: bytes
    #: Pages of the prompt that device or host held already.
    start_page: int
    keys: list[bytes]
    op: Op
    phase: PrefetchPhase = PrefetchPhase.LOOKUP
    #: Leader's clock when the request was first held back by this prefetch.
    blocked_since_us: int | None = None
    #: Tokens that were being read for others when the look-up, then when the read began.
    ahead: int = 0
    #: Leader's clock when the read should have ended long since; None: nobody knows how long it takes.
    read_by_us: int | None = None
    #: Nobody waits for it.
    is_probe: bool = False
    #: Pages of the span that are now in the tree because storage had them, and the backend that had them.
    published: int = 0
    backend: str = ""
