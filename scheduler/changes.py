"""What the server asks of the storage slot by itself: a sick store out, another one in, one change at a time.

Used by `Failover`, which decides what and when; here is how.  The ids of these changes begin with `AUTOMATIC`, and
nobody is answered.  A command that works on the slot comes first.  Replicated, on the plan's clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_hicache.cache.tiers import Tiers
from sglang_hicache.config import StorageConfig
from sglang_hicache.scheduler.stores import Store
from sglang_hicache.storage import registry
from sglang_hicache.storage.attachment_events import AUTOMATIC, Attach, Detach, State, Switch


@dataclass(frozen=True, slots=True)
class Change:
    """What the slot works on for us."""

    id: str
    #: Who is to serve; None: nobody, what serves is taken out.
    store: Store | None
    #: What it is called in the news.
    cause: str


class Changes:
    """At most one is under way."""

    def __init__(self, tiers: Tiers, config: StorageConfig) -> None:
        self._tiers = tiers
        self._config = config
        self._begun = 0
        #: None: the slot works on none, or on one that does not matter any more.
        self.under_way: Change | None = None

    def __repr__(self) -> str:
        return f"<Changes {self.under_way}>"

    def is_held(self) -> bool:
        """A command works on the slot."""
        slot = self._tiers.slot
        openings = [] if slot.candidate is None else [slot.candidate.command_id]
        return any(not command_id.startswith(AUTOMATIC) for command_id in openings + slot.waiters)

    def is_bringing(self) -> bool:
        """A store is being attached."""
        return self.under_way is not None and self.under_way.store is not None

    def may_bring(self, *, is_switch: bool) -> bool:
        """Has everything ended that stands in the way?"""
        return self._tiers.slot.face() is (State.ATTACHED if is_switch else State.DETACHED)

    def take_out(self) -> None:
        """With the deadline of a forced detach; what is opening ends with it."""
        change = self._begin(None, "breaker")
        self._tiers.carry_out(self._tiers.slot.handle(Detach(change.id, self._in_us(self._config.force_timeout_s))))

    def bring(self, store: Store, cause: str, *, is_switch: bool) -> None:
        """Attach a store, or switch to it."""
        change, backend, config = self._begin(store, cause), store.backend, store.extra_config_json
        _, settings = registry.validate_extra_config(backend, config)
        late_io, due_us = registry.late_io(backend, settings), self._in_us(self._config.attach_timeout_s)
        event: Attach | Switch = Attach(change.id, backend, config, late_io, due_us=due_us)
        if is_switch:
            drain_us = int(self._config.drain_timeout_s * 1e6)
            event = Switch(change.id, backend, config, late_io, due_us=due_us, drain_us=drain_us)
        self._tiers.carry_out(self._tiers.slot.handle(event))

    def ended(self, command_id: str) -> Change | None:
        """The slot has finished with a change; None: a trip or a command has overtaken it."""
        change = self.under_way
        if change is None or change.id != command_id:
            return None
        self.under_way = None
        return change

    def in_words(self) -> str:
        """What the server does by itself just now; "" if it changes nothing."""
        if self.under_way is None:
            return ""
        return f"attaches {self.under_way.store}" if self.under_way.store else "takes out a sick store"

    def _begin(self, store: Store | None, cause: str) -> Change:
        self._begun += 1
        self.under_way = Change(f"{AUTOMATIC}{self._begun}-{cause}", store, cause)
        return self.under_way

    def _in_us(self, seconds: float) -> int:
        """Leader's clock so many seconds from now."""
        return self._tiers.slot.now_us + int(seconds * 1e6)
