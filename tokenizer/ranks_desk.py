"""The desk: one command to every rank, one answer back.

It fans a command out with an id and a deadline, collects one answer per rank, and merges them.  It coordinates
nothing: the leader's plan carries the command and all its phases, each rank parks its copy only to know what it
answers to.  So nothing here retries, orders or serialises; two commands at once get two ids, and the ranks say
`conflict`.

Everything happens on the event loop of the tokenizer process.  A late answer is recognised by its id: `deliver`
completes the command that it belongs to, and drops what nobody has asked.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from sglang_hicache.tokenizer.manager import RankPort
from sglang_hicache.wire import (
    AttachStorage,
    CancelCommand,
    ClearStorage,
    CommandAnswer,
    DetachStorage,
    DryRunStorage,
    FlushCache,
    QueryStatus,
    Shutdown,
    StatusAnswer,
    UpdateWeights,
)

log = logging.getLogger(__name__)

#: The leader's clock decides a deadline; the desk waits this much longer so that the decision can still arrive.  The
#: client has its answer a second after the deadline, and the way to it takes time as well.
GRACE_S = 0.9

#: Commands without an outcome whose late answers are still waited for.
MOST_LATE = 256

#: GET /hicache/storage-backend answers within 2 s whatever hangs; the rest is for everything but the waiting.
STATUS_TIMEOUT_S = 1.5

Answer = TypeVar("Answer", CommandAnswer, StatusAnswer)

#: What an operator can ask of all ranks, to be answered by each of them until its deadline.
Order = AttachStorage | DetachStorage | ClearStorage | FlushCache | UpdateWeights | CancelCommand | DryRunStorage


def new_id() -> str:
    """Of a command, and so of an operation.  Nobody guesses another's."""
    return secrets.token_hex(12)


class Result(enum.Enum):
    """How a command ended, as far as the desk can know."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    #: Not every rank has answered in time: it may have happened, or still happen.
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A command's answers, merged."""

    operation_id: str
    result: Result
    message: str
    answers: dict[int, CommandAnswer] = field(default_factory=dict)


@dataclass(slots=True)
class _Question(Generic[Answer]):
    """Answers of one id, and the event that says all have come."""

    missing: set[int]
    kind: type[Answer]
    answers: dict[int, Answer] = field(default_factory=dict)
    complete: asyncio.Event = field(default_factory=asyncio.Event)


class RanksDesk:
    """Asks all ranks."""

    def __init__(
        self, ranks: Sequence[RankPort], *, grace_s: float = GRACE_S, status_timeout_s: float = STATUS_TIMEOUT_S
    ) -> None:
        self._ranks = tuple(ranks)
        self._grace_s = grace_s
        self._status_timeout_s = status_timeout_s
        self._questions: dict[str, _Question[CommandAnswer] | _Question[StatusAnswer]] = {}
        #: Commands that were not answered in time, oldest first, and who wants to know how they ended all the same.
        self._late: dict[str, tuple[_Question[CommandAnswer], Callable[[Outcome], None]]] = {}

    def __repr__(self) -> str:
        return f"<RanksDesk {len(self._ranks)} ranks, {len(self._questions)} questions open>"

    @property
    def rank_count(self) -> int:
        """Ranks of this server."""
        return len(self._ranks)

    async def command(self, order: Order, late: Callable[[Outcome], None] | None = None) -> Outcome:
        """Send it to every rank; the merged outcome by its deadline + grace.

        `late` is called with the true outcome when the ranks that were silent until then have answered after all.
        """
        log.info("%s goes to %d ranks", type(order).__name__, len(self._ranks), extra={"command": order.id})
        # The leader comes last: a follower that cannot even be told means that nothing has started anywhere.
        for rank in reversed(range(len(self._ranks))):
            if not self._ranks[rank].send(order):
                return self._log(_not_sent(order.id, rank))
        question = await self._collect(order.id, CommandAnswer, order.deadline_s + self._grace_s)
        if question.missing and late is not None:
            self._late[order.id] = question, late
            if len(self._late) > MOST_LATE:
                del self._late[next(iter(self._late))]
        return self._log(merge(order.id, question.answers, len(self._ranks), order.deadline_s))

    async def status(self) -> list[StatusAnswer | None]:
        """Every rank's own word on its storage slot, in rank order; None for a rank that is silent."""
        answers = (await self._ask_status(self._status_timeout_s)).answers
        return [answers.get(rank) for rank in range(len(self._ranks))]

    async def wait_ready(self) -> None:
        """Return when every rank has entered its loop, which it shows by answering."""
        await self._ask_status(None)

    def shutdown(self) -> None:
        """Tell the leader, who plans it for all, to leave the loop."""
        self._ranks[0].send(Shutdown(id=new_id()))

    def deliver(self, answer: CommandAnswer | StatusAnswer) -> None:
        """An answer has arrived."""
        late = self._late.get(answer.id)
        question = late[0] if late else self._questions.get(answer.id)
        if question is None or not isinstance(answer, question.kind) or answer.rank not in question.missing:
            log.info(
                "dropping an answer of rank %d that nobody waits for (late, or given twice)",
                answer.rank,
                extra={"command": answer.id},
            )
            return
        question.missing.remove(answer.rank)
        question.answers[answer.rank] = answer
        if question.missing:
            return
        question.complete.set()
        if late:
            del self._late[answer.id]
            late[1](self._log(merge(answer.id, late[0].answers, len(self._ranks), 0.0)))

    async def _ask_status(self, timeout_s: float | None) -> _Question[StatusAnswer]:
        query = QueryStatus(id=new_id())
        for port in self._ranks:
            port.send(query)  # a rank whose socket is full is as silent as one that hangs
        return await self._collect(query.id, StatusAnswer, timeout_s)

    async def _collect(self, question_id: str, kind: type[Answer], timeout_s: float | None) -> _Question[Answer]:
        question = _Question(set(range(len(self._ranks))), kind)
        self._questions[question_id] = question
        try:
            await asyncio.wait_for(question.complete.wait(), timeout_s)
        except TimeoutError:
            log.warning("no answer from ranks %s", sorted(question.missing), extra={"command": question_id})
        finally:
            del self._questions[question_id]
        return question

    def _log(self, outcome: Outcome) -> Outcome:
        # Without the message: it may quote a secret of the extra config, and only the caller knows which text that is.
        log.info("outcome: %s", outcome.result.value, extra={"command": outcome.operation_id})
        return outcome


def merge(operation_id: str, answers: dict[int, CommandAnswer], ranks: int, deadline_s: float) -> Outcome:
    """One outcome of the answers that came: success of all, and each distinct message once, in rank order."""
    ordered = {rank: answers[rank] for rank in sorted(answers)}
    messages = list(dict.fromkeys(answer.message for answer in ordered.values() if answer.message))
    if len(ordered) < ranks:
        silent = [rank for rank in range(ranks) if rank not in ordered]
        messages.insert(
            0,
            f"outcome unknown: operation {operation_id} was not answered by rank {_listed(silent)} within "
            f"{deadline_s:g} s (answered: {_listed(list(ordered)) or 'none'}); "
            "ask GET /hicache/storage-backend what the ranks have",
        )
        result = Result.UNKNOWN
    elif all(answer.success for answer in ordered.values()):
        result = Result.SUCCEEDED
    else:
        result = Result.FAILED
    return Outcome(operation_id, result, " | ".join(messages), ordered)


def _not_sent(operation_id: str, rank: int) -> Outcome:
    reason = f"nothing was started: rank {rank} does not empty its socket (operation {operation_id})"
    return Outcome(operation_id, Result.FAILED, reason)


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
