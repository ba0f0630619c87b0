"""One exception tree.  An operator's mistake is a `UserError`; everything else is a defect or a fault."""

from __future__ import annotations


class HiCacheError(Exception):
    """Base of every error this server raises on purpose."""


class UserError(HiCacheError):
    """Bad input: the message names the value, what is allowed and what to do.  Nothing has changed."""


class IntegrityError(HiCacheError):
    """A promise of the design was broken (a defect): carries the story that led to it."""


class StorageError(HiCacheError):
    """A backend could not do what was asked; a value for the op that asked, never fatal to a rank.

    `reason` is for programs: "io", "no_space", "refused" (the store does not want us) or "contract" (a backend
    answered in a way that its interface does not allow).  `code` is for operators: one of `storage/diagnosis.py`, where
    whoever raises this knows better than the error behind it; "" leaves it to that.
    """

    def __init__(self, message: str, reason: str = "io", code: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.code = code


#: Why an op with the store may stop short: what stands before the colon of its reason.  Those of a `StorageError`, then
#: what `checked.py` and the lanes find, then ops that no store has seen.  Anything else is counted as "other".
STOP_CODES = (
    "io", "no_space", "refused", "contract", "corrupt", "other_key", "miss", "defect", "revoked", "queue_full", "gone",
    "other",
)  # fmt: skip


class ProtocolError(HiCacheError):
    """A peer process sent something that does not fit the wire, or in the wrong order."""
