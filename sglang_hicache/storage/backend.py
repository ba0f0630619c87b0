"""The one interface of a storage backend: batches of pages, values for everything that is not a defect.

A backend runs in the storage process of a rank.  Two lane threads call it, at most one call per lane at a time:

    prefetch lane   exists, read, touch, and set_aside (of a page that turned out to be corrupt)
    backup lane     write, delete, clear

so any two of these may run at once, and open, stats and close come from the main thread.  Whatever blocks says so in
its name.  A page that is not there, or has another size, is a value (`PageResult`).  So is a fault that concerns one
page: the list then holds a `StorageError` at its place.  A fault of the whole call is raised as `StorageError`.
Anything else that leaves a backend is a defect; the lane survives it, and the op that met it fails.

A backend neither looks into a page nor checks it: headers and checksums belong to `checked.py`, the only caller.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.page_format import IncomingPage, OutgoingPage, PageName


class PageResult(enum.Enum):
    """What became of one page of a batch."""

    #: read: header and payload are filled.
    HIT = "hit"
    #: read: no such page.
    MISS = "miss"
    #: read: an object of another size; what is in the buffers is worthless.
    WRONG_SIZE = "wrong size"
    #: write: stored, and whole for every reader from now on.
    WRITTEN = "written"
    #: write: an object of this name and size was there already.
    PRESENT = "present"


PageOutcome = PageResult | StorageError


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a caller must know about a backend before it trusts it."""

    #: Hardware or helpers may write into host memory after the process was killed: its pages go to quarantine.
    late_io: bool = False
    #: Pages outlive the process.
    durable: bool = True


@dataclass(frozen=True, slots=True)
class OpenContext:
    """For whom a backend is opened."""

    rank: int
    namespace: str
    page_bytes: int
    #: Ranks of the server, and the name under which it serves its model; no name of a page depends on them.
    tp_size: int = 1
    model_name: str = ""
    #: The rank's whole host pool, for a backend whose library must know memory before it transfers; None: a dry run, or
    #: a backend without a rank.
    host_memory: memoryview | None = None


class StorageBackend(ABC):
    """One attached store, as one rank sees it."""

    capabilities = Capabilities()

    @abstractmethod
    def open_blocking(self) -> None:
        """Connect and make ready.  StorageError says why not; the process then exits."""

    @abstractmethod
    def exists_blocking(self, names: Sequence[PageName]) -> int:
        """How many pages, counted from the first one, are there without a gap."""

    @abstractmethod
    def read_blocking(self, pages: Sequence[IncomingPage]) -> list[PageOutcome]:
        """Fill header and payload of every page; one outcome per page, in order.  May stop at the first that is no
        HIT, and returns a list that ends there: nobody uses a page behind a gap.  Going on behind a WRONG_SIZE is
        better, where it is cheap: the caller then removes every damaged page of the batch at once."""

    @abstractmethod
    def write_blocking(self, pages: Sequence[OutgoingPage]) -> list[PageOutcome]:
        """Store every page, the first one first; one outcome per page.  A reader never sees a part of a page.  May
        stop at the first failure, and returns a list that ends there: a page is of no use without its parents."""

    @abstractmethod
    def delete_blocking(self, names: Sequence[PageName]) -> int:
        """Remove these pages; how many were there."""

    def set_aside_blocking(self, name: PageName) -> bool:
        """Move a bad page out of every reader's way; False if it is gone already.  A store that keeps it for whoever
        looks into the damage bounds what it keeps."""
        return self.delete_blocking([name]) == 1

    @abstractmethod
    def clear_blocking(self, namespace: str) -> int:
        """Remove every page of this namespace and nothing else; how many there were."""

    def touch_blocking(self, names: Sequence[PageName]) -> None:  # noqa: B027 - most stores keep their own order
        """These pages were used: keep them longer.  The first page is the parent of the rest."""

    def use_namespace(self, namespace: str) -> None:  # noqa: B027 - names bring their namespace with them
        """New weights: what is written from now on is named by this instead of `OpenContext.namespace`.  The names say
        it themselves; only a backend that declares whose pages it uses has to follow.  Never waits: main thread."""

    def info(self) -> dict[str, str]:
        """What status pages show; never a secret."""
        return {}

    def stats(self) -> dict[str, int]:
        """Counters of this process."""
        return {}

    @abstractmethod
    def close_blocking(self) -> None:
        """Give everything back.  Called once, also after an open that failed."""
