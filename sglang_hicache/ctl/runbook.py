"""From what an error says to the page that says what to do about it."""

from __future__ import annotations

import re

from sglang_hicache.storage.diagnosis import CODES

#: A text about a failure begins with its code, on some ranks after the number of the rank, in the answer of an attach
#: after the name of the backend.
_CODE = re.compile(rf"(?:^|\| |; |rank \d+: |storage backend '[^']*': )({'|'.join(CODES)})(?:: |$)")


def runbook(error: str) -> str:
    """Page of an error, from the root of the repository; "": its text has no code."""
    found = _CODE.search(error)
    return f"docs/runbooks/{found[1]}.md" if found else ""
