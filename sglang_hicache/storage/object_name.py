"""What a page is called in a store that knows keys and not folders: redis, s3, mooncake, plug-ins.

    <prefix><namespace, 64 hex digits>/<page key, 64 hex digits>.<head_start>-<head_end>

One form for all, so that a tool that knows one store can read another, and so that clearing a namespace is clearing a
prefix.  Pure.
"""

from __future__ import annotations

import re

from sglang_hicache.storage.page_format import PageName

#: In front of every name unless the extra config says otherwise: whoever shares the store sees whose they are.
DEFAULT_PREFIX = "hicache/"

_NAME = re.compile(r"([0-9a-f]{64})/([0-9a-f]{64})\.(\d{1,9})-(\d{1,9})")


def object_name(prefix: str, name: PageName) -> str:
    """The key under which a page is stored."""
    return f"{prefix}{name.namespace}/{name.key.hex()}.{name.head_start}-{name.head_end}"


def namespace_prefix(prefix: str, namespace: str) -> str:
    """What the keys of all pages of a namespace begin with, and no other key."""
    return f"{prefix}{namespace}/"


def parse_object_name(prefix: str, text: str) -> PageName | None:
    """The page that is stored under a key; None: the key is none of ours."""
    if not text.startswith(prefix):
        return None
    found = _NAME.fullmatch(text, len(prefix))
    if found is None:
        return None
    return PageName(found[1], bytes.fromhex(found[2]), int(found[3]), int(found[4]))
