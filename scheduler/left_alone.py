"""Stores inside another one that fail: the whole goes on without them, and no operation of a rank says so.

Apart from `cache/why.py`: what a storage process tells of its store is not the same on all ranks.  Reads only.
"""

from __future__ import annotations

from collections.abc import Mapping

from sglang_hicache.observe import INSIDE


def left_alone(backend_stats: Mapping[str, int]) -> list[str]:
    """One sentence for each of them, for whoever asks the status."""
    return [
        f"{inside[1]} {inside[2]} of the store fails and is left alone for now (backend_stats {inside[0]}away; the log "
        "says why): it is tried again by itself, and until then the others serve what they have"
        for name, is_away in sorted(backend_stats.items())
        if is_away and (inside := INSIDE.match(name)) and name == f"{inside[0]}away"
    ]
