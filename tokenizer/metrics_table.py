"""Which metrics there are, and how each is read from what a rank says of itself: the list of `docs/metrics.md`.

What every rank has alike is told once, with tp_rank 0, so that a sum over the ranks is right; what differs (bytes, the
processes of the storage) by every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from sglang_hicache.cache import measures
from sglang_hicache.cache.loss import Loss
from sglang_hicache.cache.op import COPIES, OpKind
from sglang_hicache.config import ServerConfig
from sglang_hicache.errors import STOP_CODES
from sglang_hicache.storage.attachment_events import State
from sglang_hicache.tokenizer.metrics_series import (
    KNOWN,
    OWN,
    RANK_UP,
    Scope,
    Series,
    by,
    counter,
    each,
    gauge,
    histogram,
    pool,
)
from sglang_hicache.wire_parts import BreakerState

#: Reasons as other servers name them, all told from the first scrape on: an alert on one that never came must not fail.
UNFULFILLED = (
    "below_threshold", "host_capacity", "device_capacity", "device_covered", "storage_transfer", "deadline",
    "anchor_lost", "aux_window_trim", "device_overlap", "cache_admission_shortfall", "dropped", "not_worth",
)  # fmt: skip
DEFERRED = ("host_capacity", "device_capacity")
DROPPED = ("host_pressure", "write_through_unbacked_eviction")
#: What the cost gate says, and why storage was missed: values of `wire.FetchDecision` and `wire.Incident`.
VERDICTS = ("fetch", "recompute", "probe")
INCIDENTS = ("outage", "refusal", "cold_start")
#: Counters of the storage processes: name among their stats, and meaning.
PROCESS_COUNTERS = (
    ("lookup_pages", "Pages that look-ups found"),
    ("read_pages", "Pages that were read whole"),
    ("read_bytes", "Bytes of pages that were read whole"),
    ("written_pages", "Pages that were written"),
    ("written_bytes", "Bytes of pages that were written"),
    ("present_pages", "Pages that were there already when they were to be written"),
    ("corrupt_pages", "Pages that were refused for their size, header or checksum"),
    ("set_aside_pages", "Corrupt pages that were moved out of every reader's way"),
    ("other_key_pages", "Pages that were refused because another encryption key, or none, made them"),
    ("replaced_pages", "Pages that could not be read and were written anew"),
    ("negative_hits", "Look-ups that ended at a page which is known to be unreadable"),
    ("retried_calls", "Calls of the backend that were tried again"),
    ("recovered_calls", "Calls that a second try saved"),
    ("contract_faults", "Answers of the backend that its interface does not allow"),
    ("raised_calls", "Calls of a plug-in that ended in an exception"),
    ("wrong_answers", "Answers of a plug-in that its interface does not allow"),
    ("failed_calls", "Calls of a store inside a tiered store or a mirror that failed"),
    ("healed_pages", "Damaged pages in a store inside another that a whole copy elsewhere stood in for"),
    ("copied_pages", "Pages that were copied to a store inside another that lacked them"),
    ("dropped_copies", "Pages that were not copied there because too many waited"),
    ("redirected_pages", "Pages that a node of a cluster sent on to another one"),
    ("redirected_commands", "Commands without pages that a node of a cluster sent on to another one"),
    ("head_requests", "Requests to an S3 server that ask for an object"),
    ("get_requests", "Requests to an S3 server that read an object"),
    ("put_requests", "Requests to an S3 server that write an object"),
    ("delete_requests", "Requests to an S3 server that delete objects"),
    ("direct_pages", "Pages that the library of Mooncake moved from or to the host pool in place"),
    ("staged_pages", "Pages that went through memory of the storage process on the way to or from Mooncake"),
    ("evicted_pages", "Pages that were deleted to stay below the size limit"),
    ("expired_pages", "Pages that were deleted because of their age"),
    ("no_space_pages", "Pages that were refused for want of space"),
)


def scheduler_series() -> Iterator[Series]:
    """The running requests, the device pool, and where prompts came from."""
    scope = Scope.SCHEDULER
    used = ("device_pages", "-device_pages_free", "-device_pages_evictable")
    yield gauge(KNOWN + "num_running_reqs", scope, "Requests that run.", lambda v: v.load("running-req"))
    yield gauge(KNOWN + "num_queue_reqs", scope, "Requests that wait.", lambda v: v.load("queue-req"))
    yield gauge(KNOWN + "cache_hit_rate", scope, "Share of the latest prompts that was cached.",
                lambda v: v.load("latest_cached_tokens") / max(1, v.load("latest_prompt_tokens")))  # fmt: skip
    for name in ("token_usage", "full_token_usage"):
        yield gauge(KNOWN + name, scope, "Share of the device pool that running requests use.",
                    lambda v: v.tokens(*used) / max(1, v.tokens("device_pages")))  # fmt: skip
    for name in ("kv_used_tokens", "num_used_tokens"):
        yield gauge(KNOWN + name, scope, "Tokens on the device that running requests use.", lambda v: v.tokens(*used))
    yield gauge(KNOWN + "kv_available_tokens", scope, "Free tokens of the device pool.",
                lambda v: v.tokens("device_pages_free"))  # fmt: skip
    yield gauge(KNOWN + "kv_evictable_tokens", scope, "Tokens on the device that are cached and may be evicted.",
                lambda v: v.tokens("device_pages_evictable"))  # fmt: skip
    yield counter(KNOWN + "prompt_tokens_total", scope, "Tokens of prompts, when their first token is out.",
                  lambda v: v.counter("served_prompt_tokens"))  # fmt: skip
    yield counter(KNOWN + "generation_tokens_total", scope, "Tokens that were generated.",
                  lambda v: v.counter("served_generation_tokens"))  # fmt: skip
    yield by("cache_source", ("device", "host", "storage"), counter(
        KNOWN + "cached_tokens_total", scope, "Prompt tokens that were not computed, by the tier that had them.",
        lambda v: v.counter(f"served_cached_{v.case}_tokens"),
    ))  # fmt: skip
    yield histogram(KNOWN + "uncached_prompt_tokens_histogram", scope, "Prompt tokens that were computed, per request.",
                    measures.PROMPT_TOKENS)  # fmt: skip


def host_series() -> Iterator[Series]:
    """The host pool."""
    scope = Scope.SCHEDULER
    yield gauge(KNOWN + "hicache_host_used_tokens", scope, "Tokens of the host pool that are in use.",
                lambda v: v.tokens("host_pages", "-host_pages_free"))  # fmt: skip
    yield gauge(KNOWN + "hicache_host_total_tokens", scope, "Size of the host pool in tokens.",
                lambda v: v.tokens("host_pages"))  # fmt: skip


def cache_series() -> Iterator[Series]:
    """Between device and host."""
    scope = Scope.CACHE
    yield counter(KNOWN + "evicted_tokens_total", scope, "Tokens that left the device to make room.",
                  lambda v: v.counter("cache_evicted_tokens"))  # fmt: skip
    for name, key, meaning in (
        ("load_back", "cache_load_back_tokens", "loaded from the host to the device"),
        ("hicache_backup", "cache_backup_tokens", "copied from the device to the host"),
    ):
        yield pool(counter(f"{KNOWN}{name}_tokens_total", scope, f"Tokens {meaning}.",
                           lambda v, key=key: v.counter(key)))  # fmt: skip
        yield each(counter(f"{KNOWN}{name}_bytes_total", scope, f"Bytes {meaning}, on each rank.",
                           lambda v, key=key: v.bytes_of(v.counter(key))))  # fmt: skip
    yield by("reason", DROPPED, pool(counter(
        KNOWN + "hicache_dropped_tokens_total", scope, "Cached tokens that were given up without a host copy.",
        lambda v: v.counter(f"cache_dropped_{v.case}_tokens"),
    )))  # fmt: skip
    yield histogram(KNOWN + "load_back_duration_seconds", scope, "Time of a copy from the host to the device.",
                    measures.LOAD_BACK_SECONDS)  # fmt: skip
    yield histogram(KNOWN + "hicache_backup_duration_seconds", scope, "Time of a copy from the device to the host.",
                    measures.BACKUP_SECONDS)  # fmt: skip


def storage_series() -> Iterator[Series]:
    """Between host and storage."""
    scope = Scope.STORAGE
    for name, key, meaning in (
        ("prefetched", "prefetch_prefetched_tokens", "read from the storage into the host pool"),
        ("backuped", "backup_backuped_tokens", "written to the storage"),
        ("storage_prefetch_hit", "prefetch_hit_tokens", "that the storage had and that were worth a read"),
        ("hicache_backup_dropped", "lost_tokens", "that were to be stored and are not, for any reason"),
    ):
        yield counter(f"{KNOWN}{name}_tokens_total", scope, f"Tokens {meaning}.", lambda v, key=key: v.total(key))
    yield by("reason", UNFULFILLED, counter(
        KNOWN + "storage_prefetch_unfulfilled_tokens_total", scope, "Tokens that were wanted and not fetched.",
        lambda v: v.total(f"prefetch_{v.case}_tokens"),
    ))  # fmt: skip
    yield by("reason", DEFERRED, counter(
        KNOWN + "storage_prefetch_deferred_tokens_total", scope,
        "Tokens whose fetch was put off; always 0: what cannot be fetched at once is unfulfilled.",
        lambda v: v.total(f"prefetch_deferred_{v.case}_tokens"),
    ))  # fmt: skip
    for name, meaning in (("prefetch", "read from"), ("backup", "written to")):
        yield histogram(f"{KNOWN}{name}_pgs", scope, f"Pages {meaning} the storage by one op.", measures.PAGES,
                        name + "_pgs/{}")  # fmt: skip
        yield histogram(f"{KNOWN}{name}_bandwidth", scope, f"GB/s of one op that has {meaning} the storage, on rank 0.",
                        measures.GB_PER_S, name + "_bandwidth/{}")  # fmt: skip


def rank_series() -> Iterator[Series]:
    """The storage slot of each rank."""
    scope = Scope.RANK
    yield each(gauge(RANK_UP, scope, "1: the rank answers; 0: it is silent, and its counters are the latest known.",
                     lambda v: v.is_up))  # fmt: skip
    yield each(counter(OWN + "ticks_total", scope, "Plans that the rank has applied.", lambda v: v.counter("ticks")))
    yield each(by("state", [state.value for state in State], gauge(
        OWN + "attachment_state", scope, "1 for the state of the storage slot, 0 for all others.",
        lambda v: v.answer.state == v.case,
    )))  # fmt: skip
    yield each(gauge(OWN + "attachment_epoch", scope, "Number of the latest attachment; 0 before the first.",
                     lambda v: v.answer.epoch))  # fmt: skip
    yield each(gauge(OWN + "queued_backups", scope, "Nodes that wait to be written to the storage.",
                     lambda v: v.answer.queued_backups))  # fmt: skip
    yield each(by("kind", [kind.name.lower() for kind in OpKind if kind not in COPIES], gauge(
        OWN + "storage_ops_in_flight", scope, "Ops that the storage has not closed.",
        lambda v: v.answer.in_flight.get(v.case, 0),
    )))  # fmt: skip
    yield each(gauge(OWN + "quarantined_pages", scope, "Host pages that a process which was given up may still write.",
                     lambda v: v.answer.quarantined_pages))  # fmt: skip
    for name, meaning in (
        ("used_bytes", "Bytes that the store holds"), ("used_pages", "Pages of this namespace in the store"),
        ("other_namespace_pages", "Pages of other namespaces in the store"),
        ("max_bytes", "Bytes that the store may hold"), ("free_bytes", "Bytes that are free on the store's disk"),
        ("away_stores", "Stores inside a tiered store or a mirror that do not answer"),
    ):  # fmt: skip
        yield each(gauge(f"{OWN}store_{name}", scope, f"{meaning}, as the rank sees it; 0: detached, or not known.",
                         lambda v, name=name: v.answer.backend_stats.get(name, 0)))  # fmt: skip
    yield by("kind", [kind.name.lower() for kind in OpKind], histogram(
        OWN + "op_duration_seconds", scope, "Time from the plan that started an op to the plan that ended it.",
        measures.OP_SECONDS, "op_duration_seconds/{}",
    ))  # fmt: skip
    yield each(by("reason", STOP_CODES, counter(
        OWN + "storage_stopped_ops_total", scope, "Ops of the storage that stopped short, by reason.",
        lambda v: v.counter(f"storage_stopped_{v.case}"),
    )))  # fmt: skip


def trust_series() -> Iterator[Series]:
    """Whether storage is trusted, and what the server has done about it by itself."""
    scope = Scope.RANK
    yield by("state", get_args(BreakerState), gauge(
        OWN + "breaker_state", scope, "1 for the state of the breaker, 0 for all others.",
        lambda v: v.answer.breaker.state == v.case,
    ))  # fmt: skip
    yield by("state", get_args(BreakerState), counter(
        OWN + "breaker_seconds_total", scope, "Seconds that the breaker was in each state.",
        lambda v: v.answer.breaker.total_s.get(v.case, 0.0),
    ))  # fmt: skip
    yield counter(OWN + "breaker_trips_total", scope, "Times that the breaker opened.",
                  lambda v: v.answer.breaker.trips)  # fmt: skip
    yield counter(OWN + "failovers_total", scope, "Times that a standby took over.",
                  lambda v: v.answer.breaker.failovers)  # fmt: skip
    yield counter(OWN + "failbacks_total", scope, "Times that the primary came back into service.",
                  lambda v: v.answer.breaker.failbacks)  # fmt: skip
    yield gauge(OWN + "standby_serves", scope, "1: a standby serves in the place of the primary.",
                lambda v: v.answer.breaker.serving.startswith("standby"))  # fmt: skip
    yield from by_incident(scope)


def by_incident(scope: Scope) -> Iterator[Series]:
    """What it has cost that storage was not there."""
    yield by("kind", INCIDENTS, gauge(
        OWN + "incident_lasts", scope, "1: storage is missed just now.",
        lambda v: any(each.kind == v.case and each.ended_s_ago is None for each in v.answer.incidents),
    ))  # fmt: skip
    yield by("kind", INCIDENTS, counter(
        OWN + "incidents_total", scope, "Times that storage was missed.",
        lambda v: v.counter(f"incidents_{v.case}"),
    ))  # fmt: skip
    yield by("kind", INCIDENTS, counter(
        OWN + "reprefilled_tokens_total", scope, "Tokens that were computed although storage was known to hold them.",
        lambda v: v.counter(f"reprefilled_{v.case}_tokens"),
    ))  # fmt: skip
    yield by("kind", INCIDENTS, counter(
        OWN + "reprefill_seconds_total", scope, "Seconds of prefill that these tokens took, at the measured rate.",
        lambda v: v.counter(f"reprefill_{v.case}_us") / 1e6,
    ))  # fmt: skip


def rank_storage_series() -> Iterator[Series]:
    """What was lost on the way to each backend, and what its processes have counted."""
    scope = Scope.RANK_STORAGE
    yield by("reason", [loss.value for loss in Loss], counter(
        OWN + "lost_tokens_total", scope, "Tokens that were to be stored and are not, by reason.",
        lambda v: v.total(f"lost_{v.case}_tokens"),
    ))  # fmt: skip
    yield by("verdict", VERDICTS, counter(
        OWN + "gate_tokens_total", scope, "Tokens that requests lacked, by what was decided about them when they came.",
        lambda v: v.total(f"prefetch_gate_{v.case}_tokens"),
    ))  # fmt: skip
    for name, key, meaning in (
        ("offered", "backup_offered_tokens", "Tokens that were to be stored"),
        ("recovered", "backup_recovered_tokens", "Lost tokens that were stored after all"),
        ("lookup_missed", "prefetch_miss_tokens", "Tokens that look-ups found too few of to fetch any"),
    ):
        yield counter(f"{OWN}{name}_tokens_total", scope, f"{meaning}.", lambda v, key=key: v.total(key))
    for name, meaning in PROCESS_COUNTERS:
        yield each(counter(f"{OWN}storage_{name}_total", scope, f"{meaning}.", lambda v, name=name: v.total(name)))


def table(config: ServerConfig) -> list[Series]:
    """The metrics of a server with this configuration."""
    host = host_series() if config.cache.hierarchical else ()
    storage = (*storage_series(), *rank_series(), *trust_series(), *rank_storage_series())
    return [*scheduler_series(), *host, *cache_series(), *storage]
