"""What the plug-ins of the tests keep: values by key, the same for every plug-in object that names the same shelf."""

from __future__ import annotations

from collections import defaultdict

#: By shelf.
SHELVES: dict[str, dict[str, bytes]] = defaultdict(dict)


def shelf_of(config: object) -> dict[str, bytes]:
    """The shelf that an extra config names with its key `shelf`."""
    return SHELVES[config.extra_config["shelf"]]
