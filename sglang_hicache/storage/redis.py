"""Pages in Redis or Valkey: one value for each page, header and payload, under the name that all key stores use.

Who owns what: the lane that calls owns its call; of its connections each is used by one thread at a time, and the two
lanes share none while they use them.  A batch goes over several connections side by side, on threads of the lane that
called.  A value is set whole, so that no reader sees a part of a page; which server has it, `redis_servers.py` knows.

What the server throws out is a miss, whenever it does so.  Two servers of ours that write one page at a time write the
same bytes: `write` asks for sizes first and sends what is not there, and if somebody was quicker in between, one value
takes the place of the same value.  A value of another size is no page of ours, and gives way.

It never deletes what is not below its prefix, never blocks a server with one long command, and says nothing of a
password.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import redis

from sglang_hicache.errors import StorageError
from sglang_hicache.observe import SharedCounters
from sglang_hicache.remote.redis_client import REDIS_ERRORS, storage_error
from sglang_hicache.storage import redis_facts
from sglang_hicache.storage.backend import OpenContext, PageOutcome, PageResult, StorageBackend
from sglang_hicache.storage.object_name import namespace_prefix, object_name, parse_object_name
from sglang_hicache.storage.page_format import IncomingPage, OutgoingPage, PageName
from sglang_hicache.storage.redis_batch import Batch, ReadBatch, WriteBatch, is_demoted, is_redirected, is_wrong_type
from sglang_hicache.storage.redis_servers import Group, make_servers
from sglang_hicache.storage.redis_settings import RedisSettings
from sglang_hicache.storage.redis_wire import Line, Reply, line_of, packed
from sglang_hicache.storage.side_by_side import SideBySide

_logger = logging.getLogger(__name__)

#: A connection more is worth its thread for so many bytes.
_SHARE_BYTES = 4 * 1024 * 1024

#: Commands sent before their replies are read: they must fit into the buffers of a connection, or both sides would
#: wait for the other one to read.
_MOST_COMMANDS = 1000

#: Nodes of a cluster that a batch is sent to, or comes from, at the same time.
_NODES_AT_ONCE = 8

#: How old what is known of the servers' memory may become while pages are written.
_FACTS_S = 10.0

_GLOB = str.maketrans({character: f"\\{character}" for character in "\\*?[]^-"})


class RedisBackend(StorageBackend):
    """One server, a cluster, or the master of some sentinels."""

    def __init__(
        self, settings: RedisSettings, context: OpenContext, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._place = settings.place()
        self._servers = make_servers(settings)
        threads = settings.connections * (_NODES_AT_ONCE if settings.mode == "cluster" else 1)
        self._readers = SideBySide("redis read", threads)
        self._writers = SideBySide("redis write", threads)
        self._counters = SharedCounters()
        self._facts: list[redis_facts.ServerFacts] = []
        self._facts_lock = threading.Lock()
        self._facts_due_s = 0.0

    def __repr__(self) -> str:
        return f"<RedisBackend {self._place}>"

    def open_blocking(self) -> None:
        settings = self._settings
        with self._faults():
            for path in filter(None, (settings.tls_ca_file, settings.tls_cert_file, settings.tls_key_file)):
                open(path, "rb").close()  # the library would name the server, and not the file that is missing
            self._servers.open_blocking()
            self._facts_due_s = self._clock() + _FACTS_S
            self._learn_blocking()
        for words in redis_facts.warnings(self._facts, self._place, self._settings.ttl_s):
            _logger.warning("%s", words)

    def exists_blocking(self, names: Sequence[PageName]) -> int:
        replies = self._ask_blocking(b"EXISTS", [self._name(name) for name in names])
        for index, reply in enumerate(replies):
            if self._number(reply) == 0:
                return index
        return len(replies)

    def read_blocking(self, pages: Sequence[IncomingPage]) -> list[PageOutcome]:
        if not pages:
            return []
        names = [self._name(page.name) for page in pages]
        batch = ReadBatch(self._servers, self._place, names, pages)
        return self._carry_blocking(batch, self._readers, names, range(len(names)), pages[0].size_bytes)

    def write_blocking(self, pages: Sequence[OutgoingPage]) -> list[PageOutcome]:
        if not pages:
            return []
        names = [self._name(page.name) for page in pages]
        batch = WriteBatch(self._servers, self._place, names, pages, self._settings.ttl_s)
        for number, reply in enumerate(self._ask_blocking(b"STRLEN", names)):
            if not is_wrong_type(reply) and self._number(reply) == pages[number].size_bytes:
                batch.outcomes[number] = PageResult.PRESENT
        self._keep_blocking(pages, [names[n] for n, outcome in enumerate(batch.outcomes) if outcome is not None])
        missing = [number for number, outcome in enumerate(batch.outcomes) if outcome is None]
        outcomes = self._carry_blocking(batch, self._writers, names, missing, pages[0].size_bytes)
        refused = sum(isinstance(outcome, StorageError) and outcome.reason == "no_space" for outcome in outcomes)
        self._counters.add("no_space_pages", refused)
        self._refresh_facts_blocking()
        return outcomes

    def delete_blocking(self, names: Sequence[PageName]) -> int:
        return self._unlink_blocking([self._name(name) for name in names])

    def clear_blocking(self, namespace: str) -> int:
        prefix = self._settings.prefix
        pattern = f"{namespace_prefix(prefix, namespace).translate(_GLOB)}*".encode()
        removed = 0
        with self._faults():
            for names in self._servers.scan_blocking(pattern):
                removed += self._unlink_blocking([name for name in names if _is_page(prefix, name)])
        return removed

    def touch_blocking(self, names: Sequence[PageName]) -> None:
        # From the last to the first: in the order of use a parent is never older than what hangs on it.
        self._touch_blocking([self._name(name) for name in reversed(names)])

    def info(self) -> dict[str, str]:
        return {"url": self._place, "mode": self._settings.mode, **redis_facts.shown(self._facts)}

    def stats(self) -> dict[str, int]:
        with self._facts_lock:
            return self._counters.snapshot() | redis_facts.counted(self._facts)

    def close_blocking(self) -> None:
        self._readers.close_blocking()
        self._writers.close_blocking()
        self._servers.close_blocking()

    def _name(self, name: PageName) -> bytes:
        return object_name(self._settings.prefix, name).encode()

    def _carry_blocking(
        self, batch: Batch, helpers: SideBySide, names: Sequence[bytes], numbers: Sequence[int], size_bytes: int
    ) -> list[PageOutcome]:
        """These pages of a batch, side by side over some connections; outcomes of the whole batch."""
        with self._faults():
            groups = self._servers.groups_blocking([names[number] for number in numbers]) if numbers else []
        shares = max(1, min(self._settings.connections, len(numbers) * size_bytes // _SHARE_BYTES))
        jobs = [
            Group(group.pool, [numbers[place] for place in group.numbers[first::shares]])
            for group in groups
            for first in range(min(shares, len(group.numbers)))
        ]
        helpers.run_blocking(batch.run_blocking, jobs, lambda _: True)
        self._counters.add("redirected_pages", batch.redirected)
        return batch.finished()

    def _ask_blocking(self, verb: bytes, names: Sequence[bytes], *more: bytes) -> list[Reply]:
        """One command about each name, all on their way at once; replies in the order of the names."""
        replies: list[Reply] = []
        with self._faults():
            for first in range(0, len(names), _MOST_COMMANDS):
                replies += self._ask_some_blocking(verb, names[first : first + _MOST_COMMANDS], more)
        return replies

    def _ask_some_blocking(self, verb: bytes, names: Sequence[bytes], more: Sequence[bytes]) -> list[Reply]:
        replies: list[Reply] = [None] * len(names)
        with contextlib.ExitStack() as stack:
            lines: list[tuple[Line, list[int]]] = []
            for pool, numbers in self._servers.groups_blocking(names):
                lines.append((stack.enter_context(line_of(pool)), numbers))
            for line, numbers in lines:
                line.send([b"".join(packed(verb, names[number], *more) for number in numbers)])
            for line, numbers in lines:
                for number in numbers:
                    replies[number] = line.reply()
        for number, reply in enumerate(replies):
            if is_redirected(reply):
                replies[number] = self._servers.follow_blocking(verb.decode(), names[number], *more)
                self._counters.add("redirected_commands")
        return replies

    def _number(self, reply: Reply) -> int:
        """A reply that is a number of something; the library makes a truth of some."""
        if isinstance(reply, int) and reply >= 0:
            return int(reply)
        error = reply if isinstance(reply, redis.ResponseError) else redis.InvalidResponse("the reply is no number")
        with self._faults():
            raise error

    def _unlink_blocking(self, names: Sequence[bytes]) -> int:
        return sum(self._number(reply) for reply in self._ask_blocking(b"UNLINK", names))

    def _touch_blocking(self, names: Sequence[bytes]) -> None:
        ttl_s = self._settings.ttl_s
        verb, more = (b"EXPIRE", [b"%d" % ttl_s]) if ttl_s else (b"TOUCH", [])
        for reply in self._ask_blocking(verb, names, *more):
            self._number(reply)

    def _keep_blocking(self, pages: Sequence[OutgoingPage], present: list[bytes]) -> None:
        """A write is a use, of what is there already, and of the page that all of these hang on."""
        first = pages[0]
        parent = [self._name(first.name._replace(key=first.parent))] if first.depth else []
        self._touch_blocking([*reversed(present), *parent])

    def _learn_blocking(self) -> None:
        facts = [redis_facts.facts_blocking(client) for client in self._servers.nodes_blocking()]
        with self._facts_lock:
            self._facts = facts

    def _refresh_facts_blocking(self) -> None:
        """Now and then, on the lane that writes; whether it works or not says nothing of the pages."""
        if self._clock() >= self._facts_due_s:
            # Also if a server does not tell: each write would wait for one that is not there.
            self._facts_due_s = self._clock() + _FACTS_S
            with contextlib.suppress(*REDIS_ERRORS):
                self._learn_blocking()

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """What the library throws is a fault of the whole call."""
        try:
            yield
        except REDIS_ERRORS as error:
            if is_demoted(error) or not isinstance(error, redis.ResponseError):
                self._servers.lost()
            raise storage_error(error, self._place) from error


def _is_page(prefix: str, name: bytes) -> bool:
    """Something else may stand below our prefix, and is left alone."""
    return parse_object_name(prefix, name.decode(errors="replace")) is not None
