"""Which plug-ins a server may load: `--hicache-allow-dynamic-backend`, and what its own command line attaches.

Loading a plug-in runs its code.  A command that comes over HTTP, a state file, a standby or a store inside another one
may therefore name only a class that whoever started the server has named.  Used wherever a config is judged, before
anything is sent to a rank, and once more on the rank, before a process is started for it.  Pure: nothing is imported.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from sglang_hicache.errors import UserError
from sglang_hicache.storage import registry
from sglang_hicache.storage.dynamic_settings import ALIASES

FLAG = "--hicache-allow-dynamic-backend"

_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def allowed_plug_ins(given: Iterable[str], at_start: Iterable[str]) -> tuple[str, ...]:
    """The list of a server, each class as "module:Class": what the flag names, and what is attached at its start."""
    return tuple(sorted({*map(_spelled_out, given), *at_start}))


def check_plug_ins(backend: str, extra_config_json: str | None, allowed: Collection[str]) -> None:
    """Raise UserError unless every plug-in of this config is on the list.  The config has been found valid."""
    for found in registry.plug_ins(backend, extra_config_json):
        if found not in allowed:
            raise UserError(
                f"the plug-in {found} may not be loaded here; start the server with {FLAG} {found} to allow it"
            )


def _spelled_out(given: str) -> str:
    if given in ALIASES:
        alias = ALIASES[given]
        return f"{alias.module_path}:{alias.class_name}"
    if not _CLASS.fullmatch(given):
        names = ", ".join(sorted(ALIASES))
        raise UserError(f"{FLAG} {given!r} is no plug-in; it takes module.path:ClassName, or one of: {names}")
    return given
