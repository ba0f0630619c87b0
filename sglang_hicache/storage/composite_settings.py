"""What stores made of other stores are told: `tiered` and `mirror`.

Used by `registry.py` in every process that checks a command, and by the backends.  What an inner store is told is
checked where configs of backends are (`registry.py`); here is said what it may not be told.  Pure.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from sglang_hicache.storage.settings import COMMON_KEYS, BackendSettings, ChildStore

#: One store is no composition, and nobody could keep more than these well.
LEAST_STORES, MOST_STORES = 2, 8

#: Objects and lists inside each other; a store in a store costs three.  A config that is deeper would be checked by
#: calls inside each other until the interpreter gives up.
MOST_NESTING = 16

#: Two of these with the same config are two stores, or may be.
_NEVER_SHARED = ("memory", "faulty", "tiered", "mirror")

_DAY_S = 86_400.0


class InnerStore(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One store inside, as a standby is given."""

    #: Name of its backend, of any kind.
    backend: str
    #: Its extra config, without the keys that every backend takes: these belong to the whole.
    extra_config: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"<InnerStore {self.backend}>"  # what it is told may hold a password


class CompositeSettings(BackendSettings, frozen=True, kw_only=True):
    """What both are told."""

    #: Seconds for which a store that fails is left alone; doubled with every further failure.
    retry_initial_s: float = 1.0
    #: Most seconds between two tries.
    retry_max_s: float = 60.0

    def inside(self) -> tuple[InnerStore, ...]:
        """The stores, in order."""
        return ()

    def word(self) -> str:
        """What one of them is called: in errors, in the log, and in the names of counters."""
        return "store"

    def label(self, index: int) -> str:
        """How the store at this place is named to people, who count from one."""
        return f"{self.word()} {index + 1}"

    def children(self) -> tuple[ChildStore, ...]:
        return tuple(
            ChildStore(inner.backend, inner.extra_config, self.label(index))
            for index, inner in enumerate(self.inside())
        )

    def place(self) -> str:
        return ", ".join(inner.backend for inner in self.inside())

    def __post_init__(self) -> None:
        for name in ("retry_initial_s", "retry_max_s"):
            value = msgspec.structs.asdict(self)[name]
            if not (math.isfinite(value) and 0.001 <= value <= _DAY_S):
                raise ValueError(f"{name}={value} is not allowed; it takes seconds from 0.001 to {_DAY_S:.0f}")
        if self.retry_max_s < self.retry_initial_s:
            raise ValueError(f"retry_max_s={self.retry_max_s:g} is less than retry_initial_s")
        inside = self.inside()
        if not LEAST_STORES <= len(inside) <= MOST_STORES:
            raise ValueError(f"it takes {LEAST_STORES} to {MOST_STORES} stores, not {len(inside)}")
        for index, inner in enumerate(inside):
            common = sorted(set(inner.extra_config) & set(COMMON_KEYS))
            if common:
                raise ValueError(
                    f"{self.label(index)}: {', '.join(map(repr, common))} cannot be set for one store inside; it "
                    "belongs into the outer extra config and goes for all of them"
                )
            if _is_deeper(inner.extra_config, MOST_NESTING):
                raise ValueError(f"{self.label(index)}: stores in stores in stores, too deep to be meant")
            if inner.backend not in _NEVER_SHARED and inner in inside[:index]:
                first = self.label(inside.index(inner))
                raise ValueError(f"{self.label(index)} is the same store as {first}: what is lost there is lost here")


class TieredSettings(CompositeSettings, frozen=True, kw_only=True):
    """Several stores, the nearest first: a page is read from the nearest that has it and written to all."""

    tiers: tuple[InnerStore, ...]
    #: Which tier must have opened, and must have taken a page that counts as written: the last one, which keeps what
    #: the others lose, or any one.
    required: Literal["last", "any"] = "last"
    #: A page that was read from a farther tier is put into the nearer ones.
    promote: bool = True

    def inside(self) -> tuple[InnerStore, ...]:
        return self.tiers

    def word(self) -> str:
        return "tier"


class MirrorSettings(CompositeSettings, frozen=True, kw_only=True):
    """Several stores that all get every page; one is read."""

    copies: tuple[InnerStore, ...]
    #: So many must have opened, and must have taken a page that counts as written.
    min_writes: int = 1
    #: A page that a store lacks and a later one has is written to it again.
    repair: bool = True

    def inside(self) -> tuple[InnerStore, ...]:
        return self.copies

    def word(self) -> str:
        return "copy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.min_writes <= len(self.copies):
            raise ValueError(
                f"min_writes={self.min_writes} is not allowed; it takes 1 to the number of copies, {len(self.copies)}"
            )


def _is_deeper(value: Any, levels: int) -> bool:
    """Do objects and lists go deeper than that?  Never looks deeper itself."""
    if not isinstance(value, (dict, list)):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in inside)
