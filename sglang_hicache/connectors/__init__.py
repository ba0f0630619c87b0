"""Connectors: models and their files in other places than a folder here.  See `docs/models-in-stores.md`."""

from sglang_hicache.connectors.base import (
    BaseConnector,
    BaseFileSystemConnector,
    BaseKVConnector,
    BaseWeightConnector,
    ConnectorType,
)
from sglang_hicache.connectors.create import create_remote_connector

__all__ = [
    "BaseConnector", "BaseFileSystemConnector", "BaseKVConnector", "BaseWeightConnector", "ConnectorType",
    "create_remote_connector",
]  # fmt: skip
