"""Every message between the processes of one server, one union per direction.

    tokenizer --ToRank--> every rank          rank --FromRank--> tokenizer
    leader --TickPlan--> every follower       follower --RankReport--> leader
    rank --ToStorage--> its storage process   storage process --FromStorage--> rank

Messages are tagged msgspec structs in msgpack.  There is no pickle anywhere: a socket that unpickles runs
whatever its peer sends.  A message carries ids and numbers (rid, command id, op id, epoch, plan number), so a
late answer is recognised by its number and never by its timing.  Pure: no thread, clock, socket or torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

# The redundant names hand them on: everybody says `wire.Place`.
from sglang_hicache.wire_parts import BreakerStatus as BreakerStatus
from sglang_hicache.wire_parts import CachedTokens as CachedTokens
from sglang_hicache.wire_parts import DryRunReport as DryRunReport
from sglang_hicache.wire_parts import DryRunStep as DryRunStep
from sglang_hicache.wire_parts import FetchDecision as FetchDecision
from sglang_hicache.wire_parts import FinishReason as FinishReason
from sglang_hicache.wire_parts import Histogram as Histogram
from sglang_hicache.wire_parts import Incident as Incident
from sglang_hicache.wire_parts import Place as Place
from sglang_hicache.wire_parts import SamplingParams as SamplingParams


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Base of everything on a socket: tagged by its class name, encoded as an array."""


# ---------------------------------------------------------------------------------------- parts of messages


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What one tick produced for one request."""

    rid: str
    #: Tokens that are new since the last output of this rid.
    token_ids: tuple[int, ...] = ()
    finish: FinishReason | None = None
    prompt_tokens: int = 0
    cached: CachedTokens = CachedTokens()
    num_retractions: int = 0
    #: With the first token: whether storage was asked; None: it was not attached, or there was nothing to ask for.
    fetch: FetchDecision | None = None


# ---------------------------------------------------------------------------- tokenizer -> ranks (ToRank)


class NewRequest(Message):
    """A request, already in token ids.  Sent to the leader only; followers meet it in a plan."""

    rid: str
    token_ids: list[int]
    sampling: SamplingParams
    extra_key: str | None = None
    cache_salt: str | None = None
    #: Higher runs earlier (schedule policy `priority`) and is kept longer (eviction policy `priority`).
    priority: int = 0


class AbortRequest(Message):
    """The client went away, or asked for it.  Unknown rids are ignored: the answer may have crossed."""

    rid: str


#: idle: refused unless nothing is under way.  drain, force: what is under way may end until the deadline, and is then
#: cut off; requests flow on without storage.  The two differ in nothing but the deadline.
Mode = Literal["idle", "drain", "force"]


class AttachStorage(Message):
    """Attach a backend on every rank, or, for the same backend and config, change the policies."""

    id: str
    deadline_s: float
    backend: str
    #: JSON object; None keeps meaning "none given" so that a re-attach can tell.
    extra_config_json: str | None = None
    prefetch_policy: str | None = None
    write_policy: str | None = None
    mode: Mode = "idle"
    #: Take over from what is attached; where nothing is, an attach like any other.
    switch: bool = False
    #: Of a switch: seconds that the old one may drain once the new one serves.
    drain_s: float = 30.0
    #: At the start of the server: where it fails, try again later, as fault tolerance does.
    keeps_trying: bool = False


class DetachStorage(Message):
    """Detach the storage from every rank."""

    id: str
    #: Of a drain and a force: seconds until what is under way is cut off.
    deadline_s: float
    mode: Mode = "idle"
    #: Shutdown only: instead of the strict idle check, wait this long for queued backups to be written.
    flush_timeout_s: float | None = None


class ClearStorage(Message):
    """Delete the pages of this server's own namespace from the attached storage."""

    id: str
    deadline_s: float


class FlushCache(Message):
    """Empty L1 and L2.  timeout_s > 0: wait until idle or that long."""

    id: str
    deadline_s: float
    timeout_s: float = 0.0
    #: False: once L1 and L2 are empty, delete the pages of the own namespace from the attached storage too.
    keep_storage: bool = True


class UpdateWeights(Message):
    """Serve other weights of the same architecture from now on: read on every rank, then taken by all or by none."""

    id: str
    deadline_s: float
    #: Directory with the weights, as every rank sees it.
    model_path: str
    #: Content digest of its weight files, 64 hex digits: what the namespace is made of.
    weights_digest: str
    #: What answers call the new weights; None: as before.
    weight_version: str | None = None
    #: End all requests when the weights have been read, instead of letting those that run finish.
    aborts_requests: bool = False


class CancelCommand(Message):
    """Give up another command, as far as that can still be done without harm."""

    id: str
    deadline_s: float
    #: Id of the command to give up.
    target: str


class DryRunStorage(Message):
    """Try a backend out on every rank, attach nothing; answered by each rank itself, outside the plan."""

    id: str
    deadline_s: float
    backend: str
    extra_config_json: str


class QueryStatus(Message):
    """Ask one rank about its storage slot; answered at once, outside the plan."""

    id: str


class Shutdown(Message):
    """Leave the loop and exit 0.  Sent to the leader, who plans it for all."""

    id: str


Command = AttachStorage | DetachStorage | ClearStorage | FlushCache | UpdateWeights | CancelCommand | Shutdown
ToRank = NewRequest | AbortRequest | QueryStatus | DryRunStorage | Command


# -------------------------------------------------------------------------- ranks -> tokenizer (FromRank)


#: What answers call the weights that the server started with.
FIRST_WEIGHT_VERSION = "default"


class OutputBatch(Message):
    """Tokens and ends of one tick.  From the leader only."""

    outputs: list[RequestOutput]
    #: What the weights are called that computed them.
    weight_version: str = FIRST_WEIGHT_VERSION


class CommandAnswer(Message):
    """One rank's outcome of a command."""

    id: str
    rank: int
    success: bool
    message: str = ""
    #: New weights: requests that stood in line while the old ones came to rest.
    paused_requests: int = 0
    #: Of a dry run.
    report: DryRunReport | None = None


class StatusAnswer(Message):
    """One rank's storage slot and load, as of now."""

    id: str
    rank: int
    #: detached, attaching, attached, draining, detaching, failed.
    state: str
    #: Epoch of the attachment that the state speaks of; 0 before the first.
    epoch: int
    backend: str = ""
    #: Ops that storage has not closed, by kind ("lookup", "read", "write").
    in_flight: dict[str, int] = {}
    #: Nodes waiting to be offered to storage.
    queued_backups: int = 0
    #: Host pages that a process, or its hardware, may still write.
    quarantined_pages: int = 0
    last_error: str = ""
    #: Seconds since then.
    last_error_age_s: float = 0.0
    prefetch_policy: str = ""
    write_policy: str = ""
    #: What the backend says of itself (the file backend: path in use, policy); never a secret.
    backend_info: dict[str, str] = {}
    #: Counters of the slot (pages written, read, corrupt ...), in pages unless the name says otherwise.
    counters: dict[str, int] = {}
    #: Tokens that were to be stored and are not, by reason (`cache/loss.py`).
    lost_tokens: dict[str, int] = {}
    #: Sentences: why nothing is being written, or fetched, just now.
    why: list[str] = []
    #: What the process of this epoch has counted, as it last told.
    backend_stats: dict[str, int] = {}
    #: Counters since the start of the server by name of the backend: they outlive attachments and never go down.
    totals: dict[str, dict[str, int]] = {}
    #: By metric name, without the prefix.
    histograms: dict[str, Histogram] = {}
    #: Free, used and total pages of each pool; running and waiting requests.
    load: dict[str, int] = {}
    #: Extra config of the attachment as JSON, "" when detached.  May hold secrets: the desk redacts before it answers.
    extra_config_json: str = ""
    #: Weights that compute just now: their directory, what answers call them, and the digest of their contents.
    model_path: str = ""
    weight_version: str = ""
    weights_digest: str = ""
    #: Every attachment of the slot: more than one during a switch.
    places: list[Place] = []
    breaker: BreakerStatus = BreakerStatus()
    #: The latest, oldest first.
    incidents: list[Incident] = []


class StorageNews(Message):
    """What is attached is another store than before, or none.  From the leader only, once for each change."""

    #: "command <id>", or "breaker", "reconnect", "failover", "failback": the server by itself.
    cause: str
    #: Backend before and after; "": none.
    before: str
    after: str
    #: Epoch that ended, or begins.
    epoch: int
    #: Extra config of what is attached now.  May hold secrets: for the state file, never for a reply or the log.
    extra_config_json: str = ""
    #: Why, in words.
    detail: str = ""


FromRank = OutputBatch | CommandAnswer | StatusAnswer | StorageNews


# ------------------------------------------------------------------- leader -> followers, and back (plans)


class OpOutcome(msgspec.Struct, frozen=True, array_like=True):
    """What all ranks agree on for one op."""

    op_id: int
    #: Pages whole on every rank (the minimum over ranks), counted from the start of the op.
    pages: int
    #: Every rank said "I will not touch this op again": slots and locks may go.
    closed: bool
    #: Why `pages` is short, of the lowest rank that stopped there: "" or a code such as "io" or "no_space".
    reason: str = ""
    #: Microseconds that the slowest store worked on it; 0: not every rank has said so.
    took_us: int = 0


StorageEvent = Literal["commit", "open_failed", "lost", "deadline", "reaped", "reap_timeout", "quiet"]


class StorageOutcome(msgspec.Struct, frozen=True, array_like=True):
    """An event of one attachment that takes effect on all ranks in the tick whose plan carries it."""

    event: StorageEvent
    epoch: int
    #: For people: per-rank reasons of a failure.  commit: backend info of rank 0 as "key=value" lines.
    detail: str = ""


class ClearOutcome(msgspec.Struct, frozen=True, array_like=True):
    """All ranks have cleared, or one failed, or the deadline passed."""

    command_id: str
    #: Per rank, in rank order: "" for success, otherwise the reason.
    reasons: tuple[str, ...]


class WeightsOutcome(msgspec.Struct, frozen=True, array_like=True):
    """Every rank has read the new weights, or one could not, or the deadline passed."""

    command_id: str
    #: Why they cannot be taken, for people; "": every rank has them ready.
    failure: str = ""


class CanaryOutcome(msgspec.Struct, frozen=True, array_like=True):
    """A try of a backend that is not attached has ended on every rank, or on some that could not use it."""

    number: int
    #: Per-rank reasons, in words; "": every rank could write, read and compare.
    failure: str = ""
    #: Seconds that the slowest rank took for one page written and read.
    page_s: float = 0.0


class TickPlan(Message):
    """Inputs and outcomes of one tick, in the order in which every rank applies them."""

    #: 1, 2, 3 ...: a gap stops the server.
    number: int
    #: The leader's monotonic clock.  The only time that a decision may read.
    now_us: int
    #: Microseconds of the leader's forward in the tick before; 0: it had none.  For rates, never for time.
    forward_us: int = 0
    storage: list[StorageOutcome] = []
    ops: list[OpOutcome] = []
    clears: list[ClearOutcome] = []
    weights: list[WeightsOutcome] = []
    canaries: list[CanaryOutcome] = []
    commands: list[Command] = []
    aborts: list[str] = []
    requests: list[NewRequest] = []


class OpFact(msgspec.Struct, frozen=True, array_like=True):
    """What one rank knows of one op.  pages only grows; settled: it will not grow any more."""

    op_id: int
    pages: int
    settled: bool
    closed: bool
    #: "" or the code before the colon of `OpProgress.reason`.
    reason: str = ""
    #: Of `OpProgress`.
    took_us: int = 0


StorageFactKind = Literal["opened", "open_failed", "lost", "reaped", "reap_timeout", "quiet"]


class StorageFact(msgspec.Struct, frozen=True, array_like=True):
    """What happened to the storage process of one epoch on one rank."""

    kind: StorageFactKind
    epoch: int
    detail: str = ""


class ClearFact(msgspec.Struct, frozen=True, array_like=True):
    """One rank's storage process finished a clear."""

    command_id: str
    #: "" for success.
    reason: str = ""


class WeightsFact(msgspec.Struct, frozen=True, array_like=True):
    """One rank has read new weights, or could not."""

    command_id: str
    #: "" for success.
    reason: str = ""


class CanaryFact(msgspec.Struct, frozen=True, array_like=True):
    """One rank has tried a backend that is not attached."""

    number: int
    #: "" for success.
    reason: str = ""
    page_s: float = 0.0


class RankReport(Message):
    """From a follower: what it applied and what its hands told it since the last report."""

    rank: int
    #: Number of the last plan applied here: the acknowledgement.
    applied: int
    #: State digest after that plan when digests are compared, else 0.
    digest: int = 0
    ops: list[OpFact] = []
    storage: list[StorageFact] = []
    clears: list[ClearFact] = []
    weights: list[WeightsFact] = []
    canaries: list[CanaryFact] = []


# --------------------------------------------------------- rank -> its storage process (ToStorage), and back


class OpenBackend(Message):
    """First message: everything the storage process needs.  Travels through a pipe, never argv."""

    rank: int
    epoch: int
    backend: str
    extra_config_json: str
    #: Namespace of the server, 64 hex digits (design: model level, no tenant, no rank).
    namespace: str
    #: KV heads [head_start, head_end) of this rank.
    head_start: int
    head_end: int
    #: False: another rank owns this head range; writes settle as done without I/O.
    writes: bool
    #: Bytes of one page of this rank in the host pool.
    page_bytes: int
    #: Pages in the host pool.
    host_pages: int
    #: Ranks of the server, and the name under which it serves its model: some backends want to know.
    tp_size: int = 1
    model_name: str = ""
    #: Variables that have gone into the extra config: those that look like secrets stay out of the log.
    environment: dict[str, str] = {}
    #: Try the backend out with pages that are nobody's, say what was found (`DryRunDone`), and go.
    is_dry_run: bool = False
    log_format: str = "text"
    log_level: str = "info"


class LookupPages(Message):
    """How many of these pages, from the first on, does the store hold?"""

    op_id: int
    keys: list[bytes]


class ReadPages(Message):
    """Read pages into host pool pages.  Progress counts from the first page on."""

    op_id: int
    keys: list[bytes]
    host_pages: list[int]


class WritePages(Message):
    """Write host pool pages.  parent is the key before the first one (b"" at the root), depth its page count."""

    op_id: int
    keys: list[bytes]
    host_pages: list[int]
    parent: bytes
    depth: int
    #: Seed of the tenant's hash chain, b"" without extra_key and cache_salt: goes into the header of every page.
    tenant: bytes = b""


class RevokeOp(Message):
    """Start nothing more for this op; settle with what is whole, then close."""

    op_id: int


class ClearPages(Message):
    """Delete every page of the own namespace."""

    command_id: str


class UseNamespace(Message):
    """The weights are others: every op after this message is about pages of this namespace, every one before is not."""

    #: 64 hex digits.
    namespace: str


class StopBackend(Message):
    """Finish the running calls, close the backend, exit 0."""


ToStorage = OpenBackend | LookupPages | ReadPages | WritePages | RevokeOp | ClearPages | UseNamespace | StopBackend


#: What a storage process says is added up and told on: a number that no message can carry any more would end the rank,
#: and names without end would fill its memory.
PageCount = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
LARGEST_STAT = 1 << 60
_StatName = Annotated[str, msgspec.Meta(max_length=64)]
_Stat = Annotated[int, msgspec.Meta(ge=-LARGEST_STAT, le=LARGEST_STAT)]
Stats = Annotated[dict[_StatName, _Stat], msgspec.Meta(max_length=256)]


class BackendOpened(Message):
    """Open and self-test succeeded."""

    epoch: int
    #: What the backend says of itself, for status pages; never a secret.
    info: dict[str, str] = {}


class BackendOpenFailed(Message):
    """Open or self-test failed; the process exits after this."""

    epoch: int
    reason: str


class OpProgress(Message):
    """Pages whole so far; settled: no more will come; closed: the op is not touched again."""

    op_id: int
    pages: PageCount
    settled: bool
    closed: bool
    #: Pages that were refused for their content (checksum, header) in this op.
    corrupt: PageCount = 0
    #: "" or why it stopped short.
    reason: str = ""
    #: Microseconds of work on it so far, waiting in line not included.
    took_us: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)] = 0


class ClearDone(Message):
    """A ClearPages finished; reason is "" for success."""

    command_id: str
    reason: str = ""


class BackendStats(Message):
    """What the store and its backend have counted so far: sent now and then after some activity, and before the end."""

    epoch: int
    #: By name; those of `observe.LEVELS` say how much there is now, all others only grow.
    stats: Stats = {}


class DryRunDone(Message):
    """What was found out; the process exits after the last one."""

    report: DryRunReport
    #: False: just before a step, which stands there as the one that failed: it will have, if nothing more comes.
    is_last: bool = True


FromStorage = BackendOpened | BackendOpenFailed | OpProgress | ClearDone | BackendStats | DryRunDone
