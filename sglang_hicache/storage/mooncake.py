"""Pages in a Mooncake store: memory that processes of many machines lend, and a master that knows what lies where.

Each page is one object, header and payload, under the name of `object_name.py`.  The master shows an object to readers
when its writer has ended, so that a reader meets a whole page or none; what it gives room for and what it evicts is its
own affair, and an evicted page is a miss.  Who owns what: the store belongs to whoever runs the master and the
processes that lend it memory (`docs/stores/mooncake.md`); this process lends some only if it is told so, and takes the
pages in it along when it ends.

Called by the two lanes of a storage process (see `backend.py`).  Large payloads that lie in the rank's host pool are
sent and received in place.  Never removes what has not our prefix.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Sequence

from sglang_hicache.errors import StorageError
from sglang_hicache.observe import SharedCounters
from sglang_hicache.storage.backend import Capabilities, OpenContext, PageOutcome, PageResult, StorageBackend
from sglang_hicache.storage.capacity import parse_size, size_text
from sglang_hicache.storage.mooncake_client import MooncakeClient
from sglang_hicache.storage.mooncake_memory import LEAST_DIRECT_BY_CARD_BYTES, LEAST_DIRECT_BYTES, HostSpan, Room
from sglang_hicache.storage.mooncake_settings import MooncakeSettings
from sglang_hicache.storage.mooncake_transfer import Doubt, Reading, TransferLane, Writing
from sglang_hicache.storage.object_name import namespace_prefix, object_name
from sglang_hicache.storage.page_format import IncomingPage, OutgoingPage, PageName

#: What a regular expression of the master takes for more than the character itself.
_SPECIAL = re.compile(r"[\\^$.|?*+()\[\]{}]")


class MooncakeBackend(StorageBackend):
    """One process's access to the store."""

    def __init__(self, settings: MooncakeSettings, context: OpenContext) -> None:
        self._settings = settings
        self._prefix = settings.name_prefix()
        least_bytes = LEAST_DIRECT_BYTES if settings.protocol == "tcp" else LEAST_DIRECT_BY_CARD_BYTES
        self._host = HostSpan.of(context.host_memory, least_bytes)
        self._client = MooncakeClient(settings)
        self._counters = SharedCounters()
        #: Held while pages are read and while they are removed; see `Reading`.
        self._removing = threading.Lock()
        reading = Reading(self._client, self._prefix, self._counters, self._removing)
        writing = Writing(self._client, self._prefix, self._counters)
        doubt = Doubt()
        self._reads = TransferLane(reading, self._host, self._room(), doubt)
        self._writes = TransferLane(writing, self._host, self._room(), doubt)
        self.capabilities = Capabilities(late_io=settings.may_write_late(), durable=settings.segment_bytes() == 0)

    def __repr__(self) -> str:
        return f"<MooncakeBackend {self._settings.master_server_address} protocol={self._settings.protocol}>"

    def open_blocking(self) -> None:
        self._client.open_blocking()
        if self._host.end:
            self._client.register(self._host.start, self._host.end - self._host.start)

    def exists_blocking(self, names: Sequence[PageName]) -> int:
        found = self._client.exists_blocking(self._keys(names)) if names else []
        return next((index for index, is_there in enumerate(found) if not is_there), len(found))

    def read_blocking(self, pages: Sequence[IncomingPage]) -> list[PageOutcome]:
        return self._reads.transfer_blocking(pages) if pages else []

    def write_blocking(self, pages: Sequence[OutgoingPage]) -> list[PageOutcome]:
        if not pages:
            return []
        present = self._present([page.name for page in pages], pages[0].size_bytes)
        outcomes: list[PageOutcome] = []
        for is_there, run in itertools.groupby(pages, lambda page: page.name in present):
            together = list(run)
            if is_there:
                outcomes += [PageResult.PRESENT] * len(together)
            else:
                outcomes += self._writes.transfer_blocking(together)
            if isinstance(outcomes[-1], StorageError):
                break
        return self._confirmed(pages, outcomes)

    def delete_blocking(self, names: Sequence[PageName]) -> int:
        if not names:
            return 0
        with self._removing:
            return self._client.remove_blocking(self._keys(names))

    def clear_blocking(self, namespace: str) -> int:
        begins = _SPECIAL.sub(r"\\\g<0>", namespace_prefix(self._prefix, namespace))
        with self._removing:
            return self._client.remove_matching_blocking(f"^{begins}")

    def info(self) -> dict[str, str]:
        lent = self._settings.segment_bytes()
        return {
            "master": self._settings.master_server_address,
            "protocol": self._settings.protocol,
            "prefix": self._prefix,
            "lends": f"{size_text(lent)}, whose pages go when it detaches" if lent else "nothing",
        }

    def stats(self) -> dict[str, int]:
        counted = self._counters.snapshot()
        return {name: counted.get(name, 0) for name in ("staged_pages", "direct_pages", "no_space_pages")}

    def close_blocking(self) -> None:
        self._reads.close()
        self._writes.close()
        if self._host.end:
            self._client.unregister(self._host.start)
        self._client.close_blocking()

    def _room(self) -> Room:
        return Room(parse_size(self._settings.local_buffer_size), self._client.register, self._client.unregister)

    def _keys(self, names: Sequence[PageName]) -> list[str]:
        return [object_name(self._prefix, name) for name in names]

    def _present(self, names: Sequence[PageName], size_bytes: int) -> set[PageName]:
        """Those that are stored.  One of another size is removed: the library would call a page written that it finds
        something under the name of."""
        found = self._client.exists_blocking(self._keys(names))
        there = {object_name(self._prefix, name): name for name, is_there in zip(names, found) if is_there}
        if not there:
            return set()
        sizes = self._client.sizes_blocking(list(there))
        wrong = [key for key, size in sizes.items() if size != size_bytes]
        if wrong:
            with self._removing:
                self._client.remove_blocking(wrong)
        return {name for key, name in there.items() if sizes.get(key) == size_bytes}

    def _confirmed(self, pages: Sequence[OutgoingPage], outcomes: list[PageOutcome]) -> list[PageOutcome]:
        """What was written, if it is there: the library calls a page written whose name somebody else has begun to
        write, also if that one has died over it."""
        written = [page.name for page, outcome in zip(pages, outcomes) if outcome is PageResult.WRITTEN]
        if not written:
            return outcomes
        missing = {name for name, there in zip(written, self._client.exists_blocking(self._keys(written))) if not there}
        for index, page in enumerate(pages[: len(outcomes)]):
            if page.name in missing:
                lost = StorageError(f"page {page.name} is not there after it was written: somebody else is writing it")
                return [*outcomes[:index], lost]
        return outcomes
