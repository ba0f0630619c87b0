"""Every command to the ranks goes through here: it becomes an operation, whoever gave it, and is told to the audit log.

Belongs to the event loop of the tokenizer process.  An operation is a task of its own: it goes on when its caller hangs
up, or never wanted to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging

from sglang_hicache.errors import UserError
from sglang_hicache.tokenizer.operations import SERVER, Caller, Operation, Operations, State
from sglang_hicache.tokenizer.ranks_desk import Order, Outcome, RanksDesk, Result, new_id
from sglang_hicache.tokenizer.state_file import StateFile
from sglang_hicache.tokenizer.trail import Trail
from sglang_hicache.wire import AttachStorage, CancelCommand, DetachStorage, DryRunStorage, StorageNews

log = logging.getLogger(__name__)

#: A cancel takes effect in the next tick, but the tick under way may hold a long prefill.
CANCEL_DEADLINE_S = 10.0

#: Longest that the answer to a cancel waits for the end of what it has cancelled.
GIVEN_UP_S = 1.0

#: Of an operation that nobody follows any more.
NOT_FOLLOWED = "outcome unknown: the server has stopped, or met a defect, before every rank had answered"

#: How news say that a command has caused them.
_BY_COMMAND = "command "


class NotCancellable(UserError):
    """The operation cannot be given up any more, or never could."""


class Control:
    """Carries operations out, and remembers them."""

    def __init__(self, desk: RanksDesk, trail: Trail, state_file: StateFile | None = None) -> None:
        self._desk = desk
        self.trail = trail
        self.state_file = state_file
        self.operations = Operations()
        #: The loop itself holds its tasks only weakly.
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, order: Order, caller: Caller = SERVER) -> Operation:
        """Give a command to the ranks."""
        operation = Operation(order, caller)
        self.operations.add(operation)
        task = asyncio.get_running_loop().create_task(self._carry_out(operation))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return operation

    async def run(self, order: Order, caller: Caller = SERVER) -> Operation:
        """The same, and wait until it has ended."""
        operation = self.begin(order, caller)
        await operation.ended.wait()
        return operation

    async def cancel(self, target: Operation, caller: Caller) -> Operation:
        """Try to give an operation up; a second try while the first is under way is the first."""
        if target.kind == "cancel":
            raise NotCancellable(f"operation {target.id} is itself a cancel, which takes no time to give up")
        if target.state is not State.RUNNING:
            raise NotCancellable(f"operation {target.id} has ended already: it is {target.state.value}")
        if target.cancel is None or target.cancel.state not in (State.RUNNING, State.SUCCEEDED):
            order = CancelCommand(id=new_id(), deadline_s=CANCEL_DEADLINE_S, target=target.id)
            target.cancel = self.begin(order, caller)
        cancel = target.cancel
        await cancel.ended.wait()
        if cancel.state is State.SUCCEEDED:
            # What was given up is answered next; who asks right after the cancel should hear of it.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(target.ended.wait(), GIVEN_UP_S)
        return cancel

    async def give_up_dry_runs(self) -> None:
        """The server ends: whether another store would work need not be known any more."""
        dry_runs = (each for each in self.operations.running() if isinstance(each.order, DryRunStorage))
        await asyncio.gather(*map(self._give_up, dry_runs))

    async def _give_up(self, operation: Operation) -> None:
        with contextlib.suppress(NotCancellable):  # it has ended meanwhile
            await self.cancel(operation, SERVER)

    def news(self, news: StorageNews) -> None:
        """Another storage is attached than before, or none.  What a command has done, its operation tells."""
        is_by_command = news.cause.startswith(_BY_COMMAND)
        self.trail.news(news, is_by_command=is_by_command)
        operation = self.operations.get(news.cause.removeprefix(_BY_COMMAND)) if is_by_command else None
        if operation is not None:
            operation.made_news = True
            if self.state_file is not None and operation.caller is not SERVER:
                self.state_file.news(news)

    async def close(self) -> None:
        """The server ends: what it has done is on the disk, and of what still runs that nobody knows how it ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.state_file is not None:
            await self.state_file.close()
        await self.trail.close()

    async def _carry_out(self, operation: Operation) -> None:
        try:
            await self.trail.began(operation)
            outcome = await self._desk.command(operation.order, functools.partial(self._ended_late, operation))
            if operation.cancel is not None:
                # Whether it failed or was cancelled is what the other one knows, and its answers are on the way.
                await operation.cancel.ended.wait()
            self._ended(operation, outcome)
            if self.state_file is not None and _is_wish(operation):
                await self.state_file.settled()
        finally:
            if operation.state is State.RUNNING:  # the server ends, or has a defect: nobody must wait for it any more
                self._ended(operation, Outcome(operation.id, Result.UNKNOWN, NOT_FOLLOWED))
            operation.ended.set()

    def _ended_late(self, operation: Operation, outcome: Outcome) -> None:
        log.info("the outcome is known after all", extra={"command": operation.id})
        self._ended(operation, outcome)

    def _ended(self, operation: Operation, outcome: Outcome) -> None:
        operation.end(outcome)
        self.trail.ended(operation)
        if self.state_file is not None and _is_wish(operation):
            self.state_file.succeeded(operation.order, made_news=operation.made_news)


def _is_wish(operation: Operation) -> bool:
    """Has somebody other than the server changed what is attached, or how it is used?"""
    is_change = isinstance(operation.order, AttachStorage | DetachStorage)
    return is_change and operation.state is State.SUCCEEDED and operation.caller is not SERVER
