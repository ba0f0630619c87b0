"""From a URL to the connector of its kind.  The library behind one is imported only for those who ask for it."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from sglang_hicache.connectors.base import BaseWeightConnector
from sglang_hicache.connectors.url import ALLOWED, parse_url
from sglang_hicache.errors import UserError


class _Kind(NamedTuple):
    """Where a connector lives."""

    module: str
    class_name: str
    #: What `pip install sglang-hicache[...]` must name for its library; "": it needs none.
    extra: str = ""


_REDIS = _Kind("sglang_hicache.connectors.redis", "RedisConnector", "redis")

_KINDS = {
    "file": _Kind("sglang_hicache.connectors.file", "FileConnector"),
    **dict.fromkeys(("redis", "rediss", "valkey", "valkeys"), _REDIS),
    "s3": _Kind("sglang_hicache.connectors.s3", "S3Connector", "s3"),
}


def create_remote_connector(url: str) -> BaseWeightConnector:
    """A connector, not connected yet.  UserError: there is none for such a URL, or its library is not installed."""
    found = parse_url(url)
    kind = _KINDS.get(found.scheme)
    if kind is None:
        raise UserError(f"there is no connector for {found.scheme}:// URLs; {ALLOWED}")
    try:
        module = importlib.import_module(kind.module)  # lazy door: only who uses a store pays for its library
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not kind.extra or package == "sglang_hicache":
            raise
        raise UserError(
            f"{found.scheme}:// URLs need the package {package!r}, which is not installed here: "
            f"pip install 'sglang-hicache[{kind.extra}]'"
        ) from error
    return vars(module)[kind.class_name](found)
