"""Why a page that could have been stored is not: the one list of reasons, for counters, status and metrics.

Pure.  `backup.py` counts with it; nobody else decides that a page is lost.
"""

from __future__ import annotations

from enum import StrEnum


class Loss(StrEnum):
    """Reason for which tokens are not in the store although storage was attached when they were cached."""

    #: More waited than may wait; the oldest were dropped.
    QUEUE_FULL = "queue_full"
    #: The store failed, also when asked again.
    BACKEND_ERROR = "backend_error"
    #: The store, or the disk under it, is full.
    NO_SPACE = "no_space"
    #: Device and host gave the pages up before their turn came.
    EVICTED_BEFORE_BACKUP = "evicted_before_backup"
    #: The write policy never copied them to the host (too few hits).
    POLICY = "policy"
    #: No host page was free for the copy that a backup starts from.
    HOST_PRESSURE = "host_pressure"
    #: The attachment ended before their turn came.
    DETACHED = "detached"
    #: A page before them is not stored, so that no look-up would reach them.
    PARENT_LOST = "parent_lost"
    #: /flush_cache or new weights emptied the cache before their turn came.
    FLUSHED = "flushed"
    #: The server ended before their turn came.
    SHUTDOWN = "shutdown"

    @classmethod
    def of_failure(cls, code: str) -> Loss:
        """The reason behind the code of a write that stopped short (`wire.OpOutcome.reason`)."""
        return {"no_space": cls.NO_SPACE, "queue_full": cls.QUEUE_FULL, "revoked": cls.DETACHED}.get(
            code, cls.BACKEND_ERROR
        )
