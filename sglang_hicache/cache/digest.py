"""The running digest of a rank's state, by which ranks prove that they did the same things.

Pools, tree and op table mix a small code and the ids they touched into one shared `StateDigest` at every
mutation, so the cost is that of the change and never that of the state.  Ranks compare `value` after a
tick; the first difference stops the server.  Used on the scheduler thread only.  Pure.
"""

from __future__ import annotations


class StateDigest:
    """A 64-bit value that depends on every number mixed in so far and on their order."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def mix(self, *numbers: int) -> None:
        """Fold integers into the value.

        Integers only: the hash of a tuple of integers is a fixed function of them, while the hash of a str
        or bytes differs from interpreter to interpreter (PYTHONHASHSEED) and ranks would never agree.
        """
        self.value = hash((self.value, *numbers))

    def __repr__(self) -> str:
        return f"<StateDigest {self.value & 0xFFFF_FFFF_FFFF_FFFF:016x}>"
