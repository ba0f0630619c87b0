"""Why nothing is written to the store, or fetched from it, just now: sentences for whoever asks the status.

"Attached and useless" is the complaint that is hardest to follow up from outside: every bound that holds something
back is named here, with its number.  Reads only.
"""

from __future__ import annotations

from collections.abc import Iterator

from sglang_hicache import wire
from sglang_hicache.cache.backup_pace import MAX_WRITES, locked_with
from sglang_hicache.cache.controller import WRITE_THRESHOLD
from sglang_hicache.cache.op import COPIES, WRITES, OpKind
from sglang_hicache.cache.prefetch import CAPACITY_SHARE
from sglang_hicache.cache.tiers import Tiers
from sglang_hicache.words import counted

#: An operation that is under way for so long is worth a sentence.
STUCK_US = 1_000_000


def why(tiers: Tiers, now_us: int, breaker: wire.BreakerStatus) -> list[str]:
    """One sentence for each reason."""
    if tiers.slot.gate() is None:
        if breaker.state in ("open", "half_open"):
            return [_taken_out(breaker)]
        # Not "how it ended": the last error may be older than the detach of somebody who had enough of it.
        ended = "; last_error says what failed last, and an attach starts it again" if tiers.slot.last_error else ""
        return [f"storage is {tiers.slot.face().value}: nothing is written or fetched{ended}", *_stuck(tiers, now_us)]
    return [
        *_stuck(tiers, now_us), *_not_copied(tiers), *_not_written(tiers, now_us), *_not_fetched(tiers),
        *_not_the_primary(breaker),
    ]  # fmt: skip


def _taken_out(breaker: wire.BreakerStatus) -> str:
    """The server has done it, and what it does next."""
    if breaker.state == "half_open":
        after = "a store is being tried, and attached if it is well"
    elif breaker.next_try_s is not None:
        after = f"next try in {breaker.next_try_s:.1f} s"
    elif breaker.level == "auto_detach":
        after = "it stays out until a command attaches it (fault_tolerance.level is auto_detach)"
    else:
        after = "it is tried again when what is under way has ended"
    return f"storage is out since {breaker.out_s:.1f} s: {breaker.reason}; {after}"


def _not_the_primary(breaker: wire.BreakerStatus) -> Iterator[str]:
    if breaker.serving.startswith("standby"):
        tried = "is being tried" if breaker.next_try_s is None else f"is tried in {breaker.next_try_s:.1f} s"
        yield f"{breaker.serving} serves in the place of the primary, which {tried}: {breaker.reason}"


def _stuck(tiers: Tiers, now_us: int) -> Iterator[str]:
    """Until the time-out nothing else tells that a store has stopped to answer, and requests may wait for it."""
    ops = [op for op in tiers.ops if op.kind not in COPIES and tiers.slot.find(op.epoch) is not None]
    oldest = min(ops, key=lambda op: op.started_us, default=None)
    if oldest is not None and now_us - oldest.started_us >= STUCK_US:
        kind, lasted = oldest.kind.name.lower(), _seconds(now_us - oldest.started_us)
        yield (
            f"under way with the store: {counted(len(ops), 'operation')}, the oldest, a {kind}, for {lasted}; a store "
            "that ends none within --hicache-storage-op-timeout is hung"
        )


def _not_copied(tiers: Tiers) -> Iterator[str]:
    """A backup starts from the host copy: what keeps pages from getting one?"""
    controller = tiers.controller
    policy, counters = controller.write_policy, controller.counters
    if policy not in WRITE_THRESHOLD:
        yield f"write policy {policy}: a page is copied to the host, and stored, when the device evicts it"
    elif WRITE_THRESHOLD[policy] > 1:
        yield (
            f"write policy {policy}: a page is copied to the host, and stored, at hit {WRITE_THRESHOLD[policy]}; "
            f"{counters['below_policy']} tokens were passed over so far"
        )
    if counters["dropped_host_pressure"]:
        yield f"host memory: no page was free for copies of {counters['dropped_host_pressure']} tokens so far"


def _not_written(tiers: Tiers, now_us: int) -> Iterator[str]:
    queue, writer = tiers.backup, tiers.writer
    line, full = queue.line, writer.full
    if not line.entries() and not queue.to_copy:
        yield "nothing waits to be written"
    if queue.is_held:
        yield "backups are held back: the weights are about to change"
    if full.since_us is not None:
        yield (
            f"the store has been full for {_seconds(now_us - full.since_us)} (last_error says how full): one write "
            f"tries again in {_seconds(full.probe_at_us - now_us)}"
        )
    due_us = line.next_due_us()
    if due_us is not None:
        wait = _seconds(due_us - now_us)
        nodes = f"{line.retrying()} nodes wait for another attempt, the first in {wait}"
        yield f"the store failed (last_error says how): {nodes}"
    if line.fresh.line and tiers.storage.count(OpKind.WRITE) >= MAX_WRITES:
        yield f"{len(line.fresh.line)} backups wait: {MAX_WRITES} writes are under way, the most that may be"
    elif (pages := _held_by_locks(tiers)) and full.since_us is None and not queue.is_held:
        yield (
            f"{len(line.fresh.line)} backups wait: with the next one {pages} host pages are in use, and at most "
            f"{writer.limits.locked_pages} may be"
        )
    left = queue.uploads_left()
    if left:
        yield (
            f"upload of what was cached before the attach: {left} of {queue.upload_pages} pages are left, at most "
            f"{1_000_000 // writer.limits.upload_page_us} pages a second, after all other backups"
        )


def _held_by_locks(tiers: Tiers) -> int:
    """Host pages that the next write would lock, too many; 0: it does not wait for them.  One that nothing holds up
    starts in a moment."""
    entry = tiers.backup.line.next(is_upload=False)
    writes = sum(tiers.storage.count(kind) for kind in WRITES)
    pages = locked_with(tiers.controller.tree, entry.node) if entry and writes else 0
    return pages if pages > tiers.writer.limits.locked_pages else 0


def _not_fetched(tiers: Tiers) -> Iterator[str]:
    prefetcher, host = tiers.prefetcher, tiers.controller.host
    short = prefetcher.counters["below_threshold"]
    yield (
        f"fewer than {prefetcher.threshold_pages * tiers.page_size} tokens in a row (prefetch_threshold) are not "
        f"fetched: {short} tokens so far"
    )
    if late := prefetcher.counters["deadline"]:
        yield (
            f"{late} tokens were not waited for so far: a look-up (--hicache-storage-lookup-timeout) or a read "
            f"(prefetch policy {prefetcher.policy}) took too long"
        )
    if spared := prefetcher.counters["not_worth"]:
        gate = prefetcher.waits.gate
        # The rates alone would not explain it: after a read that was late nobody waits, however quick they are.
        broken = "" if gate.keeps_its_word else "; the latest read took longer than it should, and nobody waits for one"
        yield (
            f"{spared} tokens were computed so far because fetching them should have taken longer (cost_gate); now: "
            f"computing {gate.prefill_rate() or 0:.0f} tokens/s, look-ups {1e3 * (gate.lookup_s() or 0):.1f} ms, reads "
            f"{gate.storage_rate() or 0:.0f} tokens/s, {100 * (gate.hit_share() or 0):.0f} % of what was asked for "
            f"lately was there{broken}"
        )
    if host is not None and prefetcher.occupied_pages >= host.total * CAPACITY_SHARE:
        yield f"prefetches hold {prefetcher.occupied_pages} of {host.total} host pages, and may hold no more"


def _seconds(us: int) -> str:
    return f"{max(us, 0) / 1e6:.1f} s"
