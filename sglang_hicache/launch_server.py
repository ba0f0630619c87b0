"""`python -m sglang_hicache.launch_server`: flags to configuration, a private run folder, the supervisor, an exit code.

Exit codes: 0 after a clean stop, 1 when something broke while starting or serving, 2 for a mistake in the flags.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from sglang_hicache.child import secrets_of
from sglang_hicache.config import HttpConfig, LogConfig, ServerConfig
from sglang_hicache.cpu_environment import cpu_environment
from sglang_hicache.device_memory import free_device_bytes
from sglang_hicache.errors import StorageError, UserError
from sglang_hicache.host_memory import host_memory
from sglang_hicache.observe import start_logging
from sglang_hicache.pool_sizes import Memory
from sglang_hicache.resolve import resolve
from sglang_hicache.server_args import ADMIN_API_KEY_ENV, API_KEY_ENV, parse
from sglang_hicache.supervisor import Supervisor
from sglang_hicache.weights_digest import default_cache_file, weights_digest

log = logging.getLogger(__name__)

_EXIT_BROKEN, _EXIT_USAGE = 1, 2

#: How the name of a run folder begins, and the file in it that says that its launcher has locked it.
_RUN_FOLDER, _MARK = "hicache-", "launcher"


def main(argv: Sequence[str] | None = None) -> int:
    """Edge of the launcher process."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        with run_folder() as run_dir:
            return _serve_blocking(args, run_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_USAGE
    except StorageError as error:  # the store that has the model
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_BROKEN


def _serve_blocking(args: argparse.Namespace, run_dir: str) -> int:
    start_logging("launcher", LogConfig(format=args.log_format, level=args.log_level))
    found = resolve(args, run_dir=run_dir, weights_digest=_digest_blocking, memory=_memory(args))
    config = found.config
    start_logging("launcher", config.log, secrets_of(config))
    for rewrite in found.rewrites:
        log.info("%s", rewrite)
    _check_port(config.http)
    _log_start(config)
    for name in (API_KEY_ENV, ADMIN_API_KEY_ENV):  # the children have the keys from their orders
        os.environ.pop(name, None)
    cores = len(os.sched_getaffinity(0))
    environment = cpu_environment(config.tp_size, cores, deterministic=config.model.deterministic)
    return Supervisor(config, environment).run_blocking()


def _log_start(config: ServerConfig) -> None:
    log.info(
        "starting %s: %d rank(s) on %s, %s, %d tokens on the device, %d on the host, page size %d",
        config.model.served_name,
        config.tp_size,
        config.model.device,
        config.model.dtype,
        config.pool.device_tokens,
        config.pool.host_tokens,
        config.pool.page_size,
    )


@contextlib.contextmanager
def run_folder() -> Iterator[str]:
    """A private folder for the sockets of one server: 0700, gone when the server is.

    A launcher that is killed cannot remove it, so the next one does: whoever holds the folder's lock lives.
    """
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    old_umask = os.umask(0o077)  # for all processes of the server: sockets, caches and pages are this user's alone
    try:
        folder = tempfile.mkdtemp(prefix=_RUN_FOLDER, dir=base)  # mkdtemp makes it 0700
    except OSError as error:
        os.umask(old_umask)
        raise UserError(f"cannot make a folder for sockets in {base!r}: {error}; set XDG_RUNTIME_DIR") from error
    try:
        with _held(folder):
            _sweep(base)
            yield folder
    finally:
        os.umask(old_umask)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: str) -> Iterator[None]:
    """Holds the lock of the folder.  The mark comes after the lock: a folder that has it and is not locked has lost
    its launcher, one without it is just being made."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Path(folder, _MARK).touch(mode=0o600)
        yield
    finally:
        os.close(lock)


def _sweep(base: str) -> None:
    """Remove the folders of launchers that were killed."""
    for folder in Path(base).glob(f"{_RUN_FOLDER}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # gone this moment, or not ours
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_uid == os.geteuid() and (folder / _MARK).exists():
                log.info("removing %s: its server was killed", folder)
                shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue  # its server lives
        finally:
            os.close(lock)


def _memory(args: argparse.Namespace) -> Memory:
    found = host_memory()
    device_bytes = free_device_bytes(args.tp_size) if args.device == "cuda" else None
    return Memory(found.available_bytes, found.bound, device_bytes)


def _digest_blocking(directory: str) -> str:
    return weights_digest(directory, default_cache_file())


def _check_port(http: HttpConfig) -> None:
    """Say now, and not after the model has loaded, that the port cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(http.host, http.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen on --host {http.host} --port {http.port}: {error}; choose another (--port 0: any free one)"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
