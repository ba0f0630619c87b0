"""The requests in flight: a table from request id to its stream, fed by the leader's output batches.

Everything here happens on the event loop of the tokenizer process.  Who owns what: the manager owns the table
and the leader's port; a `RequestStream` belongs to the one `RequestGroup` (one HTTP request) that submitted it,
and leaving the group's `async with` aborts what has not finished.  So a client that goes away, a cancelled task
and an error all end in one place.  The manager never decides what a request gets; the leader does.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Protocol

from sglang_hicache.errors import HiCacheError, UserError
from sglang_hicache.tokenizer.detokenize import Detokenizer
from sglang_hicache.wire import (
    FIRST_WEIGHT_VERSION,
    AbortRequest,
    CachedTokens,
    FetchDecision,
    FinishReason,
    NewRequest,
    OutputBatch,
    RequestOutput,
    SamplingParams,
    ToRank,
)

log = logging.getLogger(__name__)

#: Requests with ids that begin so are probes: they never count as load, and the scheduler may drop them when busy.
HEALTH_PREFIX = "HEALTH_CHECK_"


class Unavailable(HiCacheError):
    """The server cannot take the request now; the client may try again.  503."""


class RankPort(Protocol):
    """The sending end towards one rank."""

    def send(self, message: ToRank) -> bool:
        """Queue the message; False when the socket is full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One prompt, ready for the leader."""

    token_ids: list[int]
    sampling: SamplingParams
    rid: str | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    priority: int | None = None


@dataclass(frozen=True, slots=True)
class Increment:
    """What is new in one stream since the consumer last looked.  Several ticks may lie in it."""

    index: int
    text: str
    token_ids: list[int]
    finish: FinishReason | None


class RequestStream:
    """One request: everything it has produced so far, and how much of that the consumer has taken."""

    def __init__(self, index: int, rid: str, submission: Submission, detokenizer: Detokenizer) -> None:
        self.index = index
        self.rid = rid
        self.submission = submission
        self.text = ""
        self.token_ids: list[int] = []
        self.finish: FinishReason | None = None
        self.cached = CachedTokens()
        #: What was decided about storage; None: there was nothing to decide.
        self.fetch: FetchDecision | None = None
        self.num_retractions = 0
        #: What the weights are called that computed the latest output.
        self.weight_version = FIRST_WEIGHT_VERSION
        self.prompt_tokens = len(submission.token_ids)
        self._detokenizer = detokenizer
        self._started_s = time.monotonic()
        self._ended_s = self._started_s
        self._taken_characters = 0
        self._taken_tokens = 0

    def __repr__(self) -> str:
        end = self.finish.type if self.finish else "running"
        return f"<RequestStream {self.rid} {end} {self.prompt_tokens}+{len(self.token_ids)} tokens>"

    @property
    def e2e_latency_s(self) -> float:
        """Seconds from submission to the last output."""
        return self._ended_s - self._started_s

    def append(self, output: RequestOutput) -> None:
        """What one tick produced."""
        self.text += self._detokenizer.push(output.token_ids, output.finish)
        self.token_ids.extend(output.token_ids)
        self.finish = output.finish
        self.cached = output.cached
        self.fetch = output.fetch or self.fetch
        self.num_retractions = output.num_retractions
        self._ended_s = time.monotonic()

    def end(self, finish: FinishReason) -> None:
        """End without the leader's word: an abort from this side."""
        self.append(
            RequestOutput(rid=self.rid, finish=finish, cached=self.cached, num_retractions=self.num_retractions)
        )

    def take(self) -> Increment | None:
        """What the consumer has not seen; None when there is nothing new."""
        text, token_ids = self.text[self._taken_characters :], self.token_ids[self._taken_tokens :]
        if not token_ids and not text and self.finish is None:
            return None
        self._taken_characters, self._taken_tokens = len(self.text), len(self.token_ids)
        return Increment(self.index, text, token_ids, self.finish)


class RequestGroup:
    """The streams of one HTTP request.  `async with` it: whatever is unfinished at the end is aborted."""

    def __init__(self, manager: RequestManager, streams: list[RequestStream], changed: asyncio.Event) -> None:
        self.streams = streams
        self._manager = manager
        self._changed = changed

    async def __aenter__(self) -> RequestGroup:
        return self

    async def __aexit__(self, *error: object) -> None:
        self._manager.drop(self.streams)

    async def increments(self) -> AsyncIterator[Increment]:
        """New output of any stream, as it comes, until all have finished.  A slow consumer gets larger pieces."""
        open_streams = list(self.streams)
        while open_streams:
            await self._changed.wait()
            self._changed.clear()
            for stream in list(open_streams):
                increment = stream.take()
                if increment is None:
                    continue
                if increment.finish is not None:
                    open_streams.remove(stream)
                yield increment

    async def finished(self) -> list[RequestStream]:
        """Wait for all of them."""
        while any(stream.finish is None for stream in self.streams):
            await self._changed.wait()
            self._changed.clear()
        return self.streams


class RequestManager:
    """Request id -> stream."""

    def __init__(self, leader: RankPort, tokenizer_path: str) -> None:
        self._leader = leader
        self._tokenizer_path = tokenizer_path
        #: By the id on the wire, which is unique for the life of the process.
        self._streams: dict[str, tuple[RequestStream, asyncio.Event]] = {}
        #: Ids as clients chose them, of requests in flight -> id on the wire.
        self._client_rids: dict[str, str] = {}
        self._numbers = itertools.count(1)
        self._idle = asyncio.Event()
        self._idle.set()
        self._listeners: list[asyncio.Future[None]] = []

    def __repr__(self) -> str:
        return f"<RequestManager {len(self._streams)} in flight>"

    @property
    def in_flight(self) -> int:
        """Requests that have not finished."""
        return len(self._streams)

    def submit(self, submissions: Iterable[Submission]) -> RequestGroup:
        """Hand prompts to the leader, all or none.  Refuses a request id that is in flight."""
        changed = asyncio.Event()
        streams: list[RequestStream] = []
        try:
            for index, submission in enumerate(submissions):
                streams.append(self._submit(index, submission, changed))
        except HiCacheError:
            self.drop(streams)
            raise
        return RequestGroup(self, streams, changed)

    def _submit(self, index: int, submission: Submission, changed: asyncio.Event) -> RequestStream:
        rid = submission.rid or uuid.uuid4().hex
        if rid in self._client_rids:
            raise UserError(f"rid {rid!r} is in flight already; choose another or leave it out")
        if rid.startswith(HEALTH_PREFIX):
            raise UserError(f"rid {rid!r} begins with {HEALTH_PREFIX}, which is reserved for health probes")
        # A client may use its id again at once after an abort, while output of the old request is still under way.
        # The number keeps the two apart.
        wire_rid = f"{rid}#{next(self._numbers)}" if submission.rid else rid
        detokenizer = Detokenizer(self._tokenizer_path, submission.sampling, submission.token_ids)
        stream = RequestStream(index, rid, submission, detokenizer)
        request = NewRequest(
            rid=wire_rid,
            token_ids=submission.token_ids,
            sampling=submission.sampling,
            extra_key=submission.extra_key,
            cache_salt=submission.cache_salt or None,
            priority=submission.priority or 0,
        )
        if not self._leader.send(request):
            raise Unavailable("the scheduler does not take requests fast enough; try again later")
        self._streams[wire_rid] = stream, changed
        self._client_rids[rid] = wire_rid
        self._idle.clear()
        return stream

    def deliver(self, batch: OutputBatch) -> None:
        """Output of one tick.  Output of a request that was dropped here meanwhile is ignored."""
        for output in batch.outputs:
            entry = self._streams.get(output.rid)
            if entry is None:
                continue
            stream, changed = entry
            stream.append(output)
            stream.weight_version = batch.weight_version
            if stream.finish is not None:
                self._forget(stream)
            changed.set()

    def drop(self, streams: Iterable[RequestStream]) -> None:
        """Abort those that have not finished; nobody reads them any more."""
        for stream in streams:
            if stream.finish is None:
                self._end(stream, "the client went away")

    def abort(self, rid: str) -> bool:
        """End one request on somebody's wish; its client gets what there is.  False: no such request."""
        wire_rid = self._client_rids.get(rid)
        if wire_rid is None:
            return False
        self._end(self._streams[wire_rid][0], "the request was aborted")
        return True

    def abort_all(self, message: str = "the request was aborted", status_code: int = 0) -> None:
        """End every request.  status_code: see `wire.FinishReason`."""
        for stream, _ in list(self._streams.values()):
            self._end(stream, message, status_code)

    async def wait_idle(self) -> None:
        """Return when nothing is in flight."""
        await self._idle.wait()

    def heard(self) -> None:
        """Something arrived from a scheduler: it lives."""
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            if not listener.done():
                listener.set_result(None)

    async def probe(self, timeout_s: float) -> bool:
        """Ask the leader for one token; True as soon as anything at all arrives from a scheduler."""
        listener = asyncio.get_running_loop().create_future()
        rid = f"{HEALTH_PREFIX}{next(self._numbers)}"
        if not self._listeners:  # else a probe is under way already, and its answer is an answer to all
            sampling = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
            self._leader.send(NewRequest(rid=rid, token_ids=[0], sampling=sampling))
        self._listeners.append(listener)
        try:
            await asyncio.wait_for(listener, timeout_s)
        except TimeoutError:
            self._leader.send(AbortRequest(rid=rid))
            return False
        finally:
            if listener in self._listeners:
                self._listeners.remove(listener)
        return True

    def _end(self, stream: RequestStream, message: str, status_code: int = 0) -> None:
        wire_rid = self._client_rids[stream.rid]
        if not self._leader.send(AbortRequest(rid=wire_rid)):
            log.warning(
                "the abort did not fit the leader's socket; the request runs to its end", extra={"rid": wire_rid}
            )
        changed = self._streams[wire_rid][1]
        stream.end(FinishReason(type="abort", message=message, status_code=status_code))
        self._forget(stream)
        changed.set()

    def _forget(self, stream: RequestStream) -> None:
        """Every request ends here, with the one line of the log that tells of it."""
        end = stream.finish.type if stream.finish else "?"
        tiers = stream.cached.device, stream.cached.host, stream.cached.storage
        line = "request ended (%s): %d prompt tokens (device %d, host %d, storage %d), %d new, %.3f s"
        numbers = stream.prompt_tokens, *tiers, len(stream.token_ids), stream.e2e_latency_s
        log.info(line, end, *numbers, extra={"rid": stream.rid})
        del self._streams[self._client_rids.pop(stream.rid)]
        if not self._streams:
            self._idle.set()
