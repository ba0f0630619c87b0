"""What is told of the storage slot: once for each change of the epoch that takes operations, and why it changed.

`SchedulerCore.apply` has it look after whatever may have moved the slot; the loop of the leader sends what was found to
the tokenizer, for the state file and the audit log.  Nothing decides by it.
"""

from __future__ import annotations

from sglang_hicache import wire
from sglang_hicache.storage.attachment import StorageSlot
from sglang_hicache.storage.attachment_events import AUTOMATIC, State

#: The store was lost, or taken out, and no command asked for it.
BY_ITSELF = "breaker"


class News:
    """One replica's."""

    def __init__(self, slot: StorageSlot) -> None:
        self._slot = slot
        self._epoch: int | None = None
        self._backend = ""
        #: Of what was opening at the latest look: its epoch, and the change that it belongs to.
        self._opening = (0, "")
        self._found: list[wire.StorageNews] = []

    def look(self) -> None:
        """Is another epoch attached than before, or none any more?"""
        slot, epoch = self._slot, self._slot.gate()
        if epoch != self._epoch:
            cause = _cause(self._ended_by() if epoch is None else self._attached_by(epoch))
            is_by_itself = epoch is None and cause == BY_ITSELF
            self._found.append(wire.StorageNews(
                cause=cause,
                before=self._backend,
                after=slot.serving(),
                epoch=epoch or self._epoch or 0,
                extra_config_json=slot.current.extra_config_json if epoch is not None and slot.current else "",
                detail=slot.last_error if is_by_itself else "",
            ))
            self._epoch, self._backend = epoch, slot.serving()
        if slot.candidate is not None:
            self._opening = (slot.candidate.epoch, slot.candidate.command_id)

    def _attached_by(self, epoch: int) -> str:
        return self._opening[1] if self._opening[0] == epoch else ""

    def _ended_by(self) -> str:
        current, waiters = self._slot.current, self._slot.waiters
        is_lost = current is not None and current.state is State.FAILED
        return "" if is_lost or not waiters else waiters[-1]

    def take(self) -> list[wire.StorageNews]:
        """What was found since the last time."""
        found, self._found = self._found, []
        return found


def _cause(command_id: str) -> str:
    """Who wanted it."""
    if command_id and not command_id.startswith(AUTOMATIC):
        return f"command {command_id}"
    return command_id.rpartition("-")[2] or BY_ITSELF
