"""How a command of hicachectl ends: exit codes, and the errors that mean one of them.

A script decides by the code alone what to do next, so the codes keep apart what must not be mixed up: a refusal
changed nothing, a server out of reach heard nothing, and where the outcome is unknown a blind retry may do harm.
"""

from __future__ import annotations

import enum

from sglang_hicache.errors import HiCacheError


class Exit(enum.IntEnum):
    """Exit codes."""

    OK = 0
    #: The server refused, or it tried and failed; an audit log has flaws.
    REFUSED = 1
    #: A mistake in the command line; nothing was sent.
    USAGE = 2
    #: Nobody answers at the URL, or not over TLS as asked for.
    UNREACHABLE = 3
    #: It was sent, and how it ended is not known.
    UNKNOWN = 4
    #: A drill ran, and one of its assertions failed.
    DRILL_FAILED = 5
    #: Ctrl-C.
    INTERRUPTED = 130


class Refused(HiCacheError):
    """The server answered, and the answer is no."""


class Unreachable(HiCacheError):
    """The server cannot be asked; what was to be done has not begun."""


class OutcomeUnknown(HiCacheError):
    """A command went out and its end did not come back."""
