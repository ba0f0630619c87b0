"""Tries a backend out for an operator, or for the leader that wants to know whether a store is well again.

Called by the storage process of a dry run on its main thread, with memory of its own: the rank's host pool is not
there.  The pages are nobody's - a namespace that no model has, keys drawn now - and are deleted whatever happens.  What
it costs is bounded by pages and by time, so that a slow store is measured with few pages and not with the patience of
whoever waits.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import statistics
import time
from collections.abc import Callable, Iterator

import msgspec

from sglang_hicache import wire
from sglang_hicache.errors import StorageError
from sglang_hicache.observe import without_secrets
from sglang_hicache.storage import registry
from sglang_hicache.storage.backend import OpenContext, StorageBackend
from sglang_hicache.storage.checked import BatchResult, CheckedStore, Shared
from sglang_hicache.storage.diagnosis import diagnose
from sglang_hicache.storage.encryption import open_cipher_blocking
from sglang_hicache.storage.page_format import PageLayout, Part
from sglang_hicache.storage.settings import BackendSettings, store_settings
from sglang_hicache.wire_parts import DryRunReport, DryRunStep

_logger = logging.getLogger(__name__)

#: No digest of a model comes out as this: its pages are nobody's.
NAMESPACE = hashlib.sha256(b"hicache dry run").hexdigest()

#: Single pages whose median is told, and pages of the batch.
SAMPLES = 5
BATCH_PAGES = 32

#: Seconds after which no further page is begun, for the single ones and for the batch.
SAMPLES_S = 1.0
BATCH_S = 1.0

#: Bytes of the batch; a page may have many MiB.
_BATCH_BYTES = 64 << 20

Clock = Callable[[], float]


class DryRun:
    """One try, step by step; `report` says how far it came.  `tell` hears of each step before it begins, because the
    store may hang in it."""

    def __init__(
        self, opened: wire.OpenBackend, tell: Callable[[DryRunReport], object], clock: Clock = time.monotonic
    ) -> None:
        self._opened = opened
        self._tell = tell
        self._clock = clock
        self._layout = PageLayout(NAMESPACE, opened.head_start, opened.head_end, (Part("kv", opened.page_bytes),))
        self._settings: BackendSettings | None = None
        #: Keys that may be in the store.
        self._written: list[bytes] = []
        self._step = ""
        self.report = DryRunReport()

    def run_blocking(self) -> DryRunReport:
        """Everything; a failure ends it and is in the report."""
        try:
            self._run()
        except Exception as error:  # process edge: whatever a backend's library throws is the answer of this dry run
            found = diagnose(error, self._opened.backend, self._settings)
            _logger.info("the dry run failed: %s: %s", self._step, found)
            reason = without_secrets(self._without_keys(found.text))
            self._note(failed_step=self._step, code=found.code, reason=reason)
        return self.report

    def _without_keys(self, text: str) -> str:
        """Drawn by chance, they would make ranks that meet the same obstacle say different things."""
        for key in self._written:
            text = text.replace(key.hex(), "<page>")
        return text

    def _run(self) -> None:
        opened = self._opened
        with contextlib.ExitStack() as stack:
            with self._timed("connect"):
                _, self._settings = registry.validate_extra_config(opened.backend, opened.extra_config_json)
                common = store_settings(opened.extra_config_json)
                shared = Shared(open_cipher_blocking(common.encryption))
                context = OpenContext(
                    rank=opened.rank,
                    namespace=NAMESPACE,
                    page_bytes=opened.page_bytes,
                    tp_size=opened.tp_size,
                    model_name=opened.model_name,
                )
                trial = registry.trial_blocking(opened.backend, self._settings, context)
                backend = stack.enter_context(trial)
                stack.callback(_close, backend)
                backend.open_blocking()
            stack.callback(self._clean_up, backend)
            store = CheckedStore(backend, self._layout, shared)
            self._try(store, backend)
            # A folder may have the value of a variable in its name that is nobody's business.
            self._note(info={name: without_secrets(value) for name, value in backend.info().items()})
            self._measure(store, backend)
            self._measure_batch(store)

    def _try(self, store: CheckedStore, backend: StorageBackend) -> None:
        """One page, there and back."""
        key = self._new_keys(1)
        content, target = secrets.token_bytes(self._opened.page_bytes), bytearray(self._opened.page_bytes)
        with self._timed("write"):
            _whole(store.write_blocking(key, [memoryview(content)], b"", 0), 1, "write a page")
        with self._timed("exists"):
            _expect(store.lookup_blocking(key) == 1, "the store does not find the page that it has just taken")
        with self._timed("read"):
            _whole(store.read_blocking(key, [memoryview(target)]), 1, "read back a page")
        with self._timed("compare"):
            _expect(bytes(target) == content, "the store gave back other bytes than it was given")
        with self._timed("delete"):
            deleted = backend.delete_blocking([self._layout.name(key[0])])
            _expect(deleted == 1, "the store deletes nothing")
            _expect(store.lookup_blocking(key) == 0, "the store still finds a page that was deleted")

    def _measure(self, store: CheckedStore, backend: StorageBackend) -> None:
        """Single pages, as long as there is time; each goes before the next one comes, so that little room will do."""
        size = self._opened.page_bytes
        content, target = memoryview(secrets.token_bytes(size)), memoryview(bytearray(size))
        times: dict[str, list[float]] = {"write": [], "exists": [], "read": []}
        until = self._clock() + SAMPLES_S
        while len(times["read"]) < SAMPLES and (not times["read"] or self._clock() < until):
            key = self._new_keys(1)
            with self._sampled("write", times):
                _whole(store.write_blocking(key, [content], b"", 0), 1, "write a page")
            with self._sampled("exists", times):
                store.lookup_blocking(key)
            with self._sampled("read", times):
                _whole(store.read_blocking(key, [target]), 1, "read back a page")
            backend.delete_blocking([self._layout.name(key[0])])
        write_s, lookup_s, read_s = (statistics.median(times[name]) for name in ("write", "exists", "read"))
        self._note(lookup_s=lookup_s, write_page_s=write_s, read_page_s=read_s)

    def _measure_batch(self, store: CheckedStore) -> None:
        """As many pages at once as single ones say that there is time for, and as there is room for."""
        size, page_s = self._opened.page_bytes, self.report.write_page_s + self.report.read_page_s
        most = min(BATCH_PAGES, _BATCH_BYTES // size, int(BATCH_S / page_s) if page_s > 0 else BATCH_PAGES)
        count = max(1, most)
        keys = self._new_keys(count)
        room = memoryview(bytearray(secrets.token_bytes(size)) * count)
        pages = [room[index * size : (index + 1) * size] for index in range(count)]
        times: dict[str, list[float]] = {"write": [], "read": []}
        with self._sampled("write", times):
            written = store.write_blocking(keys, pages, b"", 0)
            if not written.pages or not written.reason.startswith("no_space"):
                _whole(written, count, f"write {count} pages")
        count = written.pages
        with self._sampled("read", times):
            _whole(store.read_blocking(keys[:count], pages[:count]), count, f"read back {count} pages")
        rates = {name: count * size / max(took[0], 1e-9) for name, took in times.items()}
        self._note(write_rate=rates["write"], read_rate=rates["read"])

    @contextlib.contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        """A step that stands in the report once it has ended well."""
        began = self._begin(step)
        yield
        self._note(steps=[*self.report.steps, DryRunStep(name=step, took_s=self._clock() - began)])

    @contextlib.contextmanager
    def _sampled(self, step: str, times: dict[str, list[float]]) -> Iterator[None]:
        """The same for a measurement: should it fail, it is this step that did."""
        began = self._begin(step)
        yield
        times[step].append(self._clock() - began)

    def _begin(self, step: str) -> float:
        if step != self._step:
            self._tell(msgspec.structs.replace(self.report, failed_step=step))
        self._step = step
        return self._clock()

    def _note(self, **found: object) -> None:
        self.report = msgspec.structs.replace(self.report, **found)

    def _new_keys(self, count: int) -> list[bytes]:
        keys = [secrets.token_bytes(32) for _ in range(count)]
        self._written += keys
        return keys

    def _clean_up(self, backend: StorageBackend) -> None:
        """Nobody else knows these keys: what stays is in the way for good."""
        try:
            backend.delete_blocking([self._layout.name(key) for key in self._written])
        except StorageError as error:
            _logger.warning("pages of a dry run could not be deleted: %s", error)


def _close(backend: StorageBackend) -> None:
    """What was found out stays found out, however the backend takes its leave."""
    with contextlib.suppress(StorageError):
        backend.close_blocking()


def _whole(result: BatchResult, count: int, what: str) -> None:
    if result.pages != count:
        raise StorageError(f"could not {what}: {result.reason or 'nothing was said of why'}")


def _expect(is_so: bool, complaint: str) -> None:
    if not is_so:
        raise StorageError(complaint, "contract")
