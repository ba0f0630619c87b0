"""One client of a Mooncake store: the library's calls with bounded waits, and its error numbers as values.

Owned by `mooncake.py`, whose two lanes may call at the same time; the library lets go of the interpreter while it
waits.  It is told most of its ways by the environment of the process, which is the storage process's own.  It runs
threads of its own that survive `close`, as many for ten clients as for one, and writes to standard error whatever it is
not told to keep to itself: a line for each page of a store that is down.  What it has to say reaches the operator as
the number of an error; for its own words start the server with MC_LOG_LEVEL=INFO in its environment.

When the master dies, the library connects again by itself as soon as there is one, but each call until then waits four
seconds in vain.  So after a call that did not reach the master, the next one first knocks at its port.

A transfer call returns when every transfer of it has ended, with one exception: after a minute the library gives up and
leaves what is under way to itself.  Bytes may then arrive in a page that the rank has long given to another request,
and nothing can call them back but the end of the process.  So the process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from mooncake import store as library

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.mooncake_memory import Pieces
from sglang_hicache.storage.mooncake_settings import MooncakeSettings, split_address

_logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: Numbers that the library answers with instead of what was asked for.
NOT_FOUND, NOT_READY = -704, -703
REPLICA_NOT_FOUND, REPLICA_GONE = -710, -712
NO_SPACE = -200
BAD_PARAMETERS, TRANSFER_FAILED = -600, -800
_MASTER_GONE, _MASTER_SILENT = -900, -901

_WORDS = {
    -1: "internal error",
    -10: "buffer overflow",
    -101: "no segment",
    -103: "the master does not know this client",
    NO_SPACE: "no memory is free in the store, or nobody lends it any",
    BAD_PARAMETERS: "wrong parameters",
    -601: "the master does not take this from us",
    NOT_READY: "somebody is writing it",
    NOT_FOUND: "not found",
    -707: "the lease ended before the transfer did",
    TRANSFER_FAILED: "the transfer from or to the process that holds the page failed",
    _MASTER_GONE: "the master cannot be reached",
    _MASTER_SILENT: "the master timed out",
    -1010: "the master is not serving",
}

#: The library's threshold of its log, whose name a C++ compiler made; and the level of which nothing is below.
_LOG_THRESHOLD = "_ZN3fLI17FLAGS_minloglevelE"
_LOG_LEVEL_ENV = "MC_LOG_LEVEL"
_FATAL = 3

#: Connections to each process that holds pages, over TCP.  The library's own four need four times as long to find out
#: that such a process hangs.
CONNECTIONS = 16

#: The library waits for the transfers of an object a minute, however much has come meanwhile, and then says that they
#: failed.  A failed call of less than this has nothing under way; a second of doubt, for two clocks.  One that took as
#: long to make the acquaintance of a process that hangs has nothing under way either, but looks the same.
GIVES_UP_S = 59.0

#: Exit status of a process that cannot say any more what its library writes.
EXIT_FATE_UNKNOWN = 5

#: A client listens on a port that it draws; this often, should somebody have it.
_PORT_ATTEMPTS = 3


def failure(code: int, what: str) -> StorageError:
    """An error number as a value."""
    reason = "no_space" if code == NO_SPACE else "io"
    return StorageError(f"cannot {what}: {_WORDS.get(code, 'the library failed')} (mooncake error {code})", reason)


class MooncakeClient:
    """A connection to the master and to whoever holds pages."""

    def __init__(self, settings: MooncakeSettings) -> None:
        self._settings = settings
        self._address = split_address(settings.master_server_address)
        self._store: library.MooncakeDistributedStore | None = None
        #: A call did not reach the master: knock before the next one.
        self._is_doubtful = False

    def open_blocking(self) -> None:
        """Reach the master and make the client.  StorageError says why not."""
        settings = self._settings
        hostname = settings.local_hostname or "127.0.0.1"
        if self._address is not None:
            own = self._knock_blocking("refused")
            hostname = settings.local_hostname or own
        keep_quiet()
        self._set_waits()
        store = library.MooncakeDistributedStore()
        try:
            code = store.setup(
                hostname, settings.metadata_server, settings.segment_bytes(), 0, settings.protocol,
                settings.device_name, settings.master_server_address, tenant_id=settings.tenant_id,
            )  # fmt: skip
        except (RuntimeError, ValueError, OSError) as error:
            raise self._unusable(str(error)) from error
        if code != 0:
            raise self._unusable(f"{_WORDS.get(code, 'unknown')} (mooncake error {code})")
        self._store = store

    def close_blocking(self) -> None:
        """Leave the store, with the memory that was lent to it; about a second."""
        store, self._store = self._store, None
        if store is not None:
            store.close()

    def register(self, address: int, size_bytes: int) -> None:
        """Transfers may touch this memory from now on."""
        code = self._client().register_buffer(address, size_bytes)
        if code != 0:
            raise StorageError(
                f"the mooncake library cannot register {size_bytes} bytes of memory (mooncake error {code})", "refused",
                "other",
            )  # fmt: skip

    def unregister(self, address: int) -> None:
        """And no longer.  Nothing can be done if the library minds."""
        if self._store is not None:
            self._store.unregister_buffer(address)

    def exists_blocking(self, keys: Sequence[str]) -> list[bool]:
        """For each name whether a whole object has it."""
        codes = self._call("look up pages", lambda store: store.batch_is_exist(list(keys)))
        self._judge(next((code for code in codes if code < 0), 0), "look up pages")
        return [code == 1 for code in codes]

    def sizes_blocking(self, keys: Sequence[str]) -> dict[str, int]:
        """Sizes of the objects that are there and in memory."""
        found = self._call("look at pages", lambda store: store.batch_get_replica_desc(list(keys)))
        sizes = {}
        for key, replicas in found.items():
            held = [replica for replica in replicas if replica.is_memory_replica()]
            if held:
                sizes[key] = held[0].get_memory_descriptor().buffer_descriptor.size
        return sizes

    def put_blocking(self, keys: Sequence[str], pieces: Pieces) -> list[int]:
        """Store objects; 0 for each that is there now, or that somebody else is just writing."""
        if pieces.is_direct:
            return self._transfer(
                "write pages",
                lambda store: store.batch_put_from_multi_buffers(list(keys), pieces.addresses, pieces.sizes),
            )
        return self._transfer(
            "write pages",
            lambda store: store.batch_put_from(list(keys), _flat(pieces.addresses), _flat(pieces.sizes)),
        )

    def get_blocking(self, keys: Sequence[str], pieces: Pieces) -> list[int]:
        """Read objects that are exactly as large as their places; for each its size, or an error number."""
        if pieces.is_direct:
            return self._transfer(
                "read pages",
                lambda store: store.batch_get_into_multi_buffers(list(keys), pieces.addresses, pieces.sizes),
            )
        return self._transfer(
            "read pages",
            lambda store: store.batch_get_into(list(keys), _flat(pieces.addresses), _flat(pieces.sizes)),
        )

    def remove_blocking(self, keys: Sequence[str]) -> int:
        """Remove objects, whoever has read them lately; how many were there."""
        codes = self._call("delete pages", lambda store: store.batch_remove(list(keys), True))
        gone = (NOT_FOUND, NOT_READY, REPLICA_NOT_FOUND, REPLICA_GONE)
        self._judge(next((code for code in codes if code < 0 and code not in gone), 0), "delete pages")
        return codes.count(0)

    def remove_matching_blocking(self, pattern: str) -> int:
        """Remove every object whose name fits a regular expression; how many there were."""
        count = self._call("clear", lambda store: store.remove_by_regex(pattern, True))
        self._judge(min(count, 0), "clear")
        return count

    def _client(self) -> library.MooncakeDistributedStore:
        assert self._store is not None, "the client is not open"
        return self._store

    def _call(self, what: str, call: Callable[[library.MooncakeDistributedStore], _T]) -> _T:
        if self._is_doubtful and self._address is not None:
            self._knock_blocking("io")
            self._is_doubtful = False
        try:
            return call(self._client())
        except (RuntimeError, ValueError, OSError) as error:
            raise StorageError(f"cannot {what}: {error}") from error

    def _transfer(self, what: str, call: Callable[[library.MooncakeDistributedStore], list[int]]) -> list[int]:
        """The answers to a batch, unless the master gave none.  Does not return while one of its transfers may still
        touch memory."""
        began_s = time.monotonic()
        codes = self._call(what, call)
        took_s = time.monotonic() - began_s
        if took_s >= GIVES_UP_S and any(code < 0 for code in codes):
            _logger.critical(
                "cannot %s: the mooncake library has given up after %.0f s and may still write to host memory; this "
                "process ends so that it cannot", what, took_s,
            )  # fmt: skip
            os._exit(EXIT_FATE_UNKNOWN)
        for code in codes:
            if code in (_MASTER_GONE, _MASTER_SILENT):
                self._judge(code, what)
        return codes

    def _judge(self, code: int, what: str) -> None:
        """An error that concerns the call as a whole."""
        if code in (_MASTER_GONE, _MASTER_SILENT):
            self._is_doubtful = True
        if code < 0:
            raise failure(code, what)

    def _knock_blocking(self, reason: str) -> str:
        """See that somebody listens at the master's port; our own address on the way there."""
        assert self._address is not None
        try:
            with socket.create_connection(self._address, timeout=self._settings.connect_timeout_s) as found:
                return found.getsockname()[0]
        except OSError as error:
            where = self._settings.master_server_address
            code = "wrong_host" if isinstance(error, socket.gaierror) else ""
            raise StorageError(f"the master of mooncake at {where} cannot be reached: {error}", reason, code) from error

    def _unusable(self, why: str) -> StorageError:
        settings = self._settings
        return StorageError(
            f"the mooncake client could not be set up: {why}; what answers at {settings.master_server_address} may be "
            f"no master, or one that hangs; or protocol={settings.protocol!r}, device_name={settings.device_name!r}, "
            f"global_segment_size={settings.global_segment_size!r} or metadata_server are wrong for this machine; with "
            f"{_LOG_LEVEL_ENV}=INFO in the server's environment the library says more",
            "refused",
            "bad_config",
        )

    def _set_waits(self) -> None:
        """The library reads these when a client is made.  Two Mooncake stores in one process wait alike."""
        settings = self._settings
        seconds = str(math.ceil(settings.timeout_s))
        os.environ.update({
            "MC_RPC_TIMEOUT_MS": str(int(settings.timeout_s * 1000)),
            "MC_RPC_CONNECT_TIMEOUT_MS": str(int(settings.connect_timeout_s * 1000)),
            "MC_HANDSHAKE_CONNECT_TIMEOUT": str(math.ceil(settings.connect_timeout_s)),
            "MC_TCP_STATUS_TIMEOUT_SEC": seconds,
            "MC_TCP_PROGRESS_TIMEOUT_SEC": seconds,
            "MC_TCP_ADMISSION_TIMEOUT_MS": str(int(settings.timeout_s * 1000)),
            "MC_TCP_LANES_PER_PEER": str(CONNECTIONS),
            "MC_STORE_CLIENT_SETUP_RETRIES": str(_PORT_ATTEMPTS),
        })  # fmt: skip


def keep_quiet() -> None:
    """Nothing of the library goes to standard error, unless the operator wants it.  A build without that switch is as
    quiet as its environment can make it."""
    if os.environ.get(_LOG_LEVEL_ENV, "ERROR") != "ERROR":
        return
    os.environ[_LOG_LEVEL_ENV] = "ERROR"
    with contextlib.suppress(ValueError):
        ctypes.c_int32.in_dll(ctypes.CDLL(library.__file__), _LOG_THRESHOLD).value = _FATAL


def _flat(nested: list[list[int]]) -> list[int]:
    return [one for (one,) in nested]
