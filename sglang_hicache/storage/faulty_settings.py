"""What a saboteur is told: which calls go wrong, and how.

Used by `registry.py` in every process that checks a command, by the saboteur, and by drills.  Pure.
"""

from __future__ import annotations

from typing import Any, Literal

from sglang_hicache.storage.settings import BackendSettings, ChildStore

FaultKind = Literal[
    "error", "no_space", "exception", "slow", "twice", "hold", "hang", "crash", "none", "short_list", "wrong_type",
    "flip", "short", "disappear", "duplicate", "stale",
]  # fmt: skip
FaultCall = Literal["open", "exists", "read", "write", "touch", "delete", "set_aside", "clear", "close"]

#: Kinds that only some calls know; a fault that could never happen would make a test prove nothing.
_CALLS_OF_KIND: dict[str, tuple[str, ...]] = {
    "flip": ("read", "write"),
    "short": ("read", "write"),
    "duplicate": ("read", "write"),
    "disappear": ("exists", "read", "write"),
    "stale": ("exists",),
}


class Fault(BackendSettings, frozen=True, kw_only=True):
    """What goes wrong in one kind of call."""

    #: What happens; see `faulty.py`.
    kind: FaultKind
    #: Number of the first call (for faults of single pages: page) that is hit, counted from 0 since open.
    first: int = 0
    #: How many are hit; null for all that follow.
    count: int | None = None
    #: Share of the hit ones that really fail, spread evenly by a hash of their number.
    share: float = 1.0
    #: Folder of a `Gate`, for "hold".
    gate: str = ""
    #: Byte of the stored object, header included, at which "flip" and "short" strike; beyond its end the last one.
    #: Null: any byte of it for "flip", spread by a hash of the page's number; for "short" see `faulty.py`.
    at: int | None = None
    #: How long "slow" takes, on top.
    delay_ms: float = 0.0


class Faults(BackendSettings, frozen=True, kw_only=True):
    """What goes wrong in which calls."""

    #: Call name (open, exists, read, write, touch, delete, set_aside, clear, close) to what goes wrong there.
    faults: dict[FaultCall, Fault] = {}

    def __post_init__(self) -> None:
        for call, fault in self.faults.items():
            calls = _CALLS_OF_KIND.get(fault.kind, (call,))
            if call not in calls:
                raise ValueError(f"fault {fault.kind!r} cannot strike {call!r}, only {', '.join(calls)}")


class FaultySettings(Faults, frozen=True, kw_only=True):
    """A saboteur around another backend; for tests and drills only."""

    #: Name of the backend inside.
    inner: str
    #: Its extra config.
    inner_config: dict[str, Any] = {}
    #: Says of itself that hardware may write after its death.
    late_io: bool = False
    #: Absolute path of a JSON file {"faults": {...}} that replaces `faults` whenever it changes; "": there is none.
    control: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.control and (not self.control.startswith("/") or "\0" in self.control):
            raise ValueError(f"control={self.control!r} is not allowed; it takes the absolute path of a file")

    def may_write_late(self) -> bool:
        return self.late_io

    def children(self) -> tuple[ChildStore, ...]:
        return (ChildStore(self.inner, self.inner_config),)
