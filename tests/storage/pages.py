"""Pages, stores and backends for the tests of this folder."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from sglang_hicache.storage import registry
from sglang_hicache.storage.backend import OpenContext, StorageBackend
from sglang_hicache.storage.checked import CheckedStore
from sglang_hicache.storage.page_format import PageLayout, Part

NAMESPACE = "5a" * 32
PAGE_BYTES = 4096
PATIENCE_S = 60.0


def key(number: int) -> bytes:
    """Page key number `number`."""
    return number.to_bytes(32, "big")


def keys(count: int, first: int = 1) -> list[bytes]:
    """Keys of a chain of pages."""
    return [key(first + index) for index in range(count)]


def content(seed: int, size: int = PAGE_BYTES) -> memoryview:
    """Bytes of a page: the same for the same seed."""
    return memoryview(bytearray(random.Random(seed).randbytes(size)))


def empty(count: int, size: int = PAGE_BYTES) -> list[memoryview]:
    """Host memory to read into."""
    return [memoryview(bytearray(size)) for _ in range(count)]


def layout(namespace: str = NAMESPACE, heads: tuple[int, int] = (0, 2), size: int = PAGE_BYTES) -> PageLayout:
    """What the pages of one rank have in common."""
    return PageLayout(namespace, *heads, (Part("kv", size),))


def text(config: dict[str, Any]) -> str:
    """An extra config as it travels."""
    return msgspec.json.encode(config).decode()


def backend(name: str, config: dict[str, Any], rank: int = 0) -> StorageBackend:
    """A backend by the registry, not open."""
    _, settings = registry.validate_extra_config(name, text(config))
    return registry.create(name, settings, OpenContext(rank=rank, namespace=NAMESPACE, page_bytes=PAGE_BYTES))


def store(opened: StorageBackend, **kwargs: Any) -> CheckedStore:
    """The checked view of a backend."""
    return CheckedStore(opened, layout(**kwargs))


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Wait for another thread or process."""
    deadline, never = time.monotonic() + PATIENCE_S, threading.Event()
    while not holds():
        assert time.monotonic() < deadline, what
        never.wait(0.01)


def page_files(root: Path) -> list[Path]:
    """Every stored page below a folder."""
    return sorted(root.glob("*/*/*.page"))
