"""A Mooncake store that tests start by themselves: a master, and a process that lends it memory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from tests.servers.program import Program, free_port, listens
from tests.storage import pages

try:
    from mooncake import store as _library
except ImportError as error:
    _library = None
    _WHY_NOT = f"the mooncake library does not load here ({error}); scripts/install-servers installs what it needs"
else:
    _WHY_NOT = ""

#: Memory that a holder lends unless a test says otherwise.
HELD_BYTES = 256 << 20


def needs_mooncake() -> None:
    """A test without the library is skipped and says why."""
    if _library is None:
        pytest.skip(_WHY_NOT, allow_module_level=True)


class Master(Program):
    """The master, on a loopback port that it keeps when it is started again; what it knew it has forgotten then."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        super().__init__(
            [
                _program("mooncake_master"), f"--rpc_port={self.port}", "--rpc_address=127.0.0.1",
                f"--metrics_port={free_port()}", "--metrics_host=127.0.0.1", "--logtostderr", *options,
            ],
            folder,
            lambda: listens(self.port),
        )  # fmt: skip

    @property
    def address(self) -> str:
        """What the extra config calls master_server_address."""
        return f"127.0.0.1:{self.port}"


class Holder(Program):
    """A process that lends memory to the store and does nothing else: pages outlive the servers that wrote them."""

    def __init__(self, folder: Path, master: Master, held_bytes: int = HELD_BYTES) -> None:
        self.port = free_port()
        super().__init__(
            [
                _program("mooncake_client"), "--host=127.0.0.1", f"--port={self.port}",
                f"--global_segment_size={held_bytes}", "--metadata_server=P2PHANDSHAKE", "--protocol=tcp",
                f"--master_server_address={master.address}", "--logtostderr",
            ],
            folder,
            lambda: listens(self.port),
        )  # fmt: skip


class Mooncake:
    """A whole store; `with` ends it."""

    def __init__(self, folder: Path, *options: str, held_bytes: int = HELD_BYTES) -> None:
        needs_mooncake()
        folder.mkdir(exist_ok=True)
        self.master = Master(folder, *options)
        self.holder = Holder(folder, self.master, held_bytes)

    def __enter__(self) -> Mooncake:
        self.start_blocking()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill_blocking()

    def start_blocking(self) -> None:
        """Start both, empty."""
        self.master.start_blocking()
        self.holder.start_blocking()

    def kill_blocking(self) -> None:
        """kill -9 of both: the pages are gone."""
        self.holder.kill_blocking()
        self.master.kill_blocking()

    def config(self, **more: Any) -> dict[str, Any]:
        """An extra config for it."""
        return {"master_server_address": self.master.address, "local_hostname": "127.0.0.1", **more}


def warm_up(store: Mooncake) -> None:
    """The library keeps threads and descriptors for good, some since the first client and some since the second: a test
    that looks for what it has left behind must not be the first to use it."""
    for _ in range(2):
        backend = pages.backend("mooncake", store.config())
        backend.open_blocking()
        pages.store(backend).self_test_blocking(0)
        backend.close_blocking()


def _program(name: str) -> str:
    """The program itself: the script in front of it starts an interpreter to do nothing but that."""
    found = importlib.util.find_spec("mooncake")
    assert found is not None and found.origin is not None, sys.path
    return str(Path(found.origin).with_name(name))
