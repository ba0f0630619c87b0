"""Python's garbage collector, told what it will never find.

Called once per process that holds a tree, on the main thread, when everything that lives as long as the process has
been built.
"""

from __future__ import annotations

import gc

#: Net new containers before the young are looked at, then how many such looks before the middle-aged, and the old.
#: By default (700, 10, 10) a tree of a million pages is walked again and again while it grows: nodes are not garbage,
#: they go when they are evicted, and hardly anything here makes cycles.  A look at 20,000 young objects takes about a
#: millisecond.
THRESHOLDS = (20_000, 50, 100)


def settle_collector() -> None:
    """Collect once, take what is left out of all later collections, and make those rare."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
