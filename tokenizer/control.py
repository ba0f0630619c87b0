"""Every command to the ranks goes through here: it becomes an operation, whoever gave it.

Belongs to the event loop of the tokenizer process.  An operation is a task of its own: it goes on when its caller hangs
up, or never wanted to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging

from sglang_hicache.errors import UserError
from sglang_hicache.tokenizer.operations import Operation, Operations, State
from sglang_hicache.tokenizer.ranks_desk import Order, Outcome, RanksDesk, new_id
from sglang_hicache.wire import CancelCommand

log = logging.getLogger(__name__)

#: A cancel takes effect in the next tick, but the tick under way may hold a long prefill.
CANCEL_DEADLINE_S = 10.0

#: Longest that the answer to a cancel waits for the end of what it has cancelled.
GIVEN_UP_S = 1.0


class NotCancellable(UserError):
    """The operation cannot be given up any more, or never could."""


class Control:
    """Carries operations out, and remembers them."""

    def __init__(self, desk: RanksDesk) -> None:
        self._desk = desk
        self.operations = Operations()
        #: The loop itself holds its tasks only weakly.
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, order: Order) -> Operation:
        """Give a command to the ranks."""
        operation = Operation(order)
        self.operations.add(operation)
        task = asyncio.get_running_loop().create_task(self._carry_out(operation))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return operation

    async def run(self, order: Order) -> Operation:
        """The same, and wait until it has ended."""
        operation = self.begin(order)
        await operation.ended.wait()
        return operation

    async def cancel(self, target: Operation) -> Operation:
        """Try to give an operation up; a second try while the first is under way is the first."""
        if target.kind == "cancel":
            raise NotCancellable(f"operation {target.id} is itself a cancel, which takes no time to give up")
        if target.state is not State.RUNNING:
            raise NotCancellable(f"operation {target.id} has ended already: it is {target.state.value}")
        if target.cancel is None or target.cancel.state not in (State.RUNNING, State.SUCCEEDED):
            target.cancel = self.begin(CancelCommand(id=new_id(), deadline_s=CANCEL_DEADLINE_S, target=target.id))
        cancel = target.cancel
        await cancel.ended.wait()
        if cancel.state is State.SUCCEEDED:
            # What was given up is answered next; who asks right after the cancel should hear of it.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(target.ended.wait(), GIVEN_UP_S)
        return cancel

    async def _carry_out(self, operation: Operation) -> None:
        outcome = await self._desk.command(operation.order, functools.partial(self._ended_late, operation))
        if operation.cancel is not None:
            # Whether it failed or was cancelled is what the other one knows, and its answers are on the way.
            await operation.cancel.ended.wait()
        self._ended(operation, outcome)

    def _ended_late(self, operation: Operation, outcome: Outcome) -> None:
        log.info("the outcome is known after all", extra={"command": operation.id})
        self._ended(operation, outcome)

    def _ended(self, operation: Operation, outcome: Outcome) -> None:
        operation.end(outcome)
