"""The child's half of the launcher: orders in, ready or failed out, and death with the parent.

Used by the edge of every process that the launcher starts (tokenizer, scheduler ranks), on its main thread.  Orders
arrive on stdin, never in argv or the environment: both are visible to other users, and the orders hold keys.  The
channel is a pipe back to the launcher: its first line is `ready ...` or `failed ...`; afterwards it carries the stack
dumps that `kill -USR1` asks for, so that the launcher can log them under the name of the process they belong to.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import msgspec

from sglang_hicache.config import ServerConfig
from sglang_hicache.connectors.url import secrets_of_url
from sglang_hicache.errors import HiCacheError
from sglang_hicache.heartbeat import Heartbeat
from sglang_hicache.observe import report_uncaught, secrets_in, start_logging, without_secrets
from sglang_hicache.sockets import close_all_blocking

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What the launcher tells a child."""

    config: ServerConfig
    #: Tensor-parallel rank; 0 for the tokenizer, which does not use it.
    rank: int
    parent_pid: int
    channel_fd: int
    heartbeat_fd: int


class Child:
    """This process, as the launcher knows it."""

    def __init__(self, role: str, orders: Orders) -> None:
        self.role = role
        self.rank = orders.rank
        self.config = orders.config
        self.heartbeat = Heartbeat(orders.heartbeat_fd, orders.config.tp_size)
        self._channel_fd = orders.channel_fd

    def ready(self, text: str = "") -> None:
        """Everything that can fail at start has succeeded."""
        self._tell(f"ready {text}")

    def failed(self, message: str) -> None:
        """This process cannot start, or go on: the launcher repeats the message and stops the server."""
        self._tell(f"failed {message}")

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the launcher is gone: PDEATHSIG is on its way
            os.write(self._channel_fd, without_secrets(line).replace("\n", " | ").encode() + b"\n")


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGKILL when the parent's main thread ends, and exit if it has ended already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:  # it died between the spawn and the line above, which then came too late
        sys.exit(f"parent process {parent_pid} is gone")


def secrets_of(config: ServerConfig) -> list[str]:
    """Every text of the configuration that must not appear in a log."""
    keys = [key for key in (config.http.api_key, config.http.admin_api_key) if key]
    keys += secrets_of_url(config.model.weights_url)
    return keys + secrets_in(json.loads(config.storage.extra_config_json))


def enter(role: str) -> Child:
    """Take the orders from stdin and set this process up: parent, log, signals.  Call it once, on the main thread."""
    data = sys.stdin.buffer.read()
    if not data:
        sys.exit(f"{role} is started by sglang_hicache.launch_server, not by hand (no orders on stdin)")
    orders = msgspec.msgpack.decode(data, type=Orders)
    die_with_parent(orders.parent_pid)
    speaker = f"{role} rank {orders.rank}" if role == "scheduler" else role
    start_logging(speaker, orders.config.log, secrets_of(orders.config))
    report_uncaught()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.set_inheritable(orders.channel_fd, False)
    os.set_inheritable(orders.heartbeat_fd, False)
    # Ctrl-C reaches the whole foreground group; the launcher alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=orders.channel_fd, all_threads=True)
    return Child(role, orders)


def run(role: str, main: Callable[[Child], int]) -> NoReturn:
    """Edge of a child process: run `main` and leave with its exit code; an error is logged and told to the launcher."""
    child = enter(role)
    try:
        code = main(child)
    except HiCacheError as error:
        log.error("stopping: %s", error, exc_info=error.__cause__ is not None or bool(_notes(error)))
        child.failed(str(error))
        code = 1
    except Exception as error:  # process edge: whatever it is, the launcher must hear of it and the log must show it
        log.exception("stopping on an unexpected error")
        child.failed(f"{type(error).__name__}: {error}")
        code = 1
    logging.shutdown()
    close_all_blocking()
    # Not sys.exit: taking torch and transformers apart object by object costs seconds, and nobody is left to see it.
    os._exit(code)


def _notes(error: BaseException) -> list[str]:
    return vars(error).get("__notes__", [])
