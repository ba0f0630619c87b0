"""What may be shown of an extra config: in replies, in operations and in the audit log.  Pure."""

from __future__ import annotations

import json
import re

from sglang_hicache.observe import REDACTED, redacted

#: Words that make a text which cannot be parsed, and so not be redacted name by name, unfit to be echoed.
_SECRET_WORDS = re.compile(r"key|secret|passw|token|credential|://[^/\s]*@", re.IGNORECASE)


def shown_config(extra_config: str) -> str:
    """The text with everything under a secret's name, and logins in URLs, replaced."""
    try:
        shown = redacted(json.loads(extra_config))
        # Whoever gives something else than a key file has perhaps given the key.
        if isinstance(shown, dict) and isinstance(shown.get("encryption"), (str, list, int, float)):
            shown["encryption"] = REDACTED
        text = json.dumps(shown, ensure_ascii=False)
    except (ValueError, RecursionError):
        return _unparsed(extra_config)
    # Half a surrogate pair, which JSON can write and UTF-8 cannot.
    return text.encode(errors="replace").decode()


def _unparsed(text: str) -> str:
    if _SECRET_WORDS.search(text):
        return f"<{len(text)} characters, not shown because they may hold a secret>"
    return text if len(text) <= 200 else text[:200] + "..."
