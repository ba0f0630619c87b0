"""How attachments come to their ends, in the words of whoever reads `last_error`.

Each text begins with a code of `storage/diagnosis.py`, which has a page in `docs/runbooks/`, then says what the store
did not do, on which rank, and what became of it.  Called by the leader, whose text the plan carries to all ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sglang_hicache.cache.op import Op, OpKind
from sglang_hicache.storage.attachment import StorageAttachment
from sglang_hicache.storage.attachment_events import State
from sglang_hicache.storage.diagnosis import CODES
from sglang_hicache.words import counted


def reported(reasons: Mapping[int, str]) -> str:
    """The reasons of the ranks that gave one, in rank order, behind the code of the first."""
    texts = [(rank, *_divided(reason)) for rank, reason in sorted(reasons.items())]
    first = next((code for _, code, _ in texts if code), "")
    told = (f"rank {rank}: " + (f"{code}: " if code not in ("", first) else "") + text for rank, code, text in texts)
    return (f"{first}: " if first else "") + "; ".join(told)


def _divided(reason: str) -> tuple[str, str]:
    """Code, or "", and the rest."""
    code, colon, text = reason.partition(": ")
    return (code, text) if colon and code in CODES else ("", reason)


def hung(attachment: StorageAttachment, op: Op, seconds: float, late: str) -> str:
    """An op did not end."""
    is_attached = attachment.state is State.ATTACHED
    after = "storage is detached, attach it again when the store answers" if is_attached else "it was being taken out"
    kind = "an upload" if op.kind is OpKind.UPLOAD else f"a {op.kind.name.lower()}"
    return (
        f"hung: the store hangs: {kind} of {op.pages} pages did not end within {seconds:g} s on "
        f"{late} (op {op.id}); {after}"
    )


def overdue(attachment: StorageAttachment, late: str) -> str:
    """The patience with an attachment is over."""
    store = f"{attachment.backend}, epoch {attachment.epoch}"  # in a switch there are two
    match attachment.state:
        case State.ATTACHING:
            return f"timeout: not open in time on {late}"
        case State.DRAINING:
            return (
                f"drain_timeout: the store hangs, and the detach was due: {counted(attachment.in_flight, 'operation')} "
                f"cut off ({store})"
            )
        case _:
            return f"drain_timeout: the store did not close in time on {late}, and its process was killed ({store})"


def unreaped(reasons: Mapping[int, str]) -> str:
    """A process was killed and did not go."""
    return (
        f"unreaped: could not be reaped after SIGKILL: {reported(reasons)}; the host memory that it may still write "
        "comes back when it is gone"
    )


def named(ranks: Collection[int]) -> str:
    """Ranks as text."""
    return f"rank {', '.join(map(str, ranks))}"
