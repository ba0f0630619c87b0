"""One request on its way through a rank: its tokens, its device pages, and the table of its states.

Replicated on every rank; changed by `waiting`, `admission` and `results` inside `SchedulerCore.apply`.  A request
owns the device pages behind `locked_pages`; those before belong to the tree and are locked by `node`.

    tokens   [ prompt ........................ | output ... ]
    pages    [ tree, locked | own, computed | own, empty ]
             0       locked_pages        computed (tokens)   len(pages)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from sglang_hicache import wire
from sglang_hicache.cache.tree import Node
from sglang_hicache.errors import IntegrityError

#: Health probes: never count as load, never enter the cache, dropped when the server is busy anyway.
PROBE_PREFIX = "HEALTH_CHECK_"


class RequestState(IntEnum):
    WAITING = 1
    #: Admitted; its prompt is computed chunk by chunk.
    EXTENDING = 2
    #: One token a tick.
    DECODING = 3
    FINISHED = 4


TRANSITIONS: frozenset[tuple[RequestState, RequestState]] = frozenset({
    (RequestState.WAITING, RequestState.EXTENDING),
    (RequestState.WAITING, RequestState.FINISHED),
    (RequestState.EXTENDING, RequestState.DECODING),
    (RequestState.EXTENDING, RequestState.WAITING),
    (RequestState.EXTENDING, RequestState.FINISHED),
    (RequestState.DECODING, RequestState.WAITING),
    (RequestState.DECODING, RequestState.FINISHED),
})


class StopText(Protocol):
    """Watches the text of one request for its stop strings."""

    def push(self, token_id: int) -> str | None:
        """Take the next output token; return the stop string that now stands in the text, if one does."""
        ...


@dataclass(slots=True, eq=False)
class Request:
    """What one rank knows of one request."""

    rid: str
    prompt_tokens: int
    #: Prompt, then output.
    tokens: list[int]
    sampling: wire.SamplingParams
    #: Cache seed of its tenant.
    seed: bytes
    priority: int
    #: Grows with every request, on all ranks alike.
    arrival: int
    stop_text: StopText | None = None
    state: RequestState = RequestState.WAITING
    #: Device pages of positions 0 .. len(pages) * page_size.
    pages: list[int] = field(default_factory=list)
    #: Tokens whose KV is on the device.
    computed: int = 0
    #: Bottom node of the prefix that the tree holds for it.
    node: Node | None = None
    #: Pages from the root that `node` locks.
    locked_pages: int = 0
    #: Pages from the root whose nodes have counted this request as a hit.
    counted_pages: int = 0
    cached: wire.CachedTokens | None = None
    #: Whether storage was asked for what the caches lacked, and why; told with the first token.
    fetch: wire.FetchDecision | None = None
    num_retractions: int = 0

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def is_probe(self) -> bool:
        return self.rid.startswith(PROBE_PREFIX)

    def move(self, state: RequestState) -> None:
        if (self.state, state) not in TRANSITIONS:
            raise IntegrityError(f"request {self.rid}: {self.state.name} cannot become {state.name}")
        self.state = state

    def output(self, token_ids: tuple[int, ...] = (), finish: wire.FinishReason | None = None) -> wire.RequestOutput:
        return wire.RequestOutput(
            rid=self.rid, token_ids=token_ids, finish=finish, prompt_tokens=self.prompt_tokens,
            cached=self.cached or wire.CachedTokens(), num_retractions=self.num_retractions,
            fetch=self.fetch if token_ids and self.output_len == len(token_ids) else None,
        )

    def __repr__(self) -> str:
        computed = f"{self.computed}/{len(self.tokens)} tokens"
        return f"<Request {self.rid} {self.state.name} {computed}, {len(self.pages)} pages>"
