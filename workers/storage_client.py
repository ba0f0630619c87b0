"""The rank's end of its storage process: starts it, talks to it, and proves that it is gone.

One object per attachment, made and used by the rank's main thread alone (the kernel ties the life of the child to the
thread that started it).  Nothing here waits: messages are queued or refused, the end of the process is seen through a
pidfd in the caller's poller.

The process leads its own group, so that helpers which a backend starts die with it.  Until `reap` has returned a status
the process may still write to the host pool; afterwards it cannot.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

import sglang_hicache
from sglang_hicache import wire
from sglang_hicache.errors import UserError
from sglang_hicache.sockets import Pull, Push, ipc_address
from sglang_hicache.workers.storage_process import Bootstrap, socket_names

_MODULE = "sglang_hicache.workers.storage_process"

#: Messages that may wait for the process.  One that does not read for so long is lost anyway.
_HIGH_WATER = 4096


class StorageClient:
    """One storage process, from its start to its reap.  `host_fd` is None for a dry run."""

    def __init__(self, open: wire.OpenBackend, host_fd: int | None, run_dir: str) -> None:
        self._open = open
        to_name, from_name = socket_names(open)
        self._addresses = [ipc_address(run_dir, name) for name in (to_name, from_name)]
        #: Made when the process says that it is open: by then it has bound its end, so that no message can be lost.
        self._push: Push | None = None
        bootstrap = Bootstrap(open=open, host_fd=host_fd, run_dir=run_dir, parent_pid=os.getpid())
        reader, self._lifeline = _filled_pipe(msgspec.msgpack.encode(bootstrap))
        self._pidfd = -1
        with contextlib.ExitStack() as reading, contextlib.ExitStack() as unless_it_starts:
            reading.callback(os.close, reader)
            unless_it_starts.callback(self._release)
            unless_it_starts.callback(self._unlink)
            self._pull = Pull(self._addresses[1], wire.FromStorage, bind=True)
            unless_it_starts.callback(self._pull.close)
            self._process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, "rank", str(open.rank), open.backend],
                stdin=reader,
                pass_fds=() if host_fd is None else (host_fd,),
                start_new_session=True,
                env=_environment(),
            )
            unless_it_starts.callback(self._process.wait)  # once it is killed, which comes first
            unless_it_starts.callback(self.kill)
            self._pidfd = os.pidfd_open(self._process.pid)
            unless_it_starts.pop_all()

    def __repr__(self) -> str:
        return f"<StorageClient {self._open.backend} rank={self._open.rank} epoch={self._open.epoch} pid={self.pid}>"

    @property
    def pid(self) -> int:
        """Process id, which is its group's id too."""
        return self._process.pid

    def fds(self) -> list[Pull | int]:
        """What to register in a `Poller`: messages have come, or the process has ended."""
        return [self._pull, self._pidfd]

    def send(self, message: wire.ToStorage) -> bool:
        """Queue a message; False if the socket is full, or the backend has not opened yet."""
        return self._push is not None and self._push.send(message)

    def receive(self) -> list[wire.FromStorage]:
        """What the process has said since the last call."""
        messages = self._pull.receive_all()
        if self._push is None and any(isinstance(message, wire.BackendOpened) for message in messages):
            self._push = Push(self._addresses[0], wire.ToStorage, bind=False, high_water=_HIGH_WATER)
        return messages

    def stop(self) -> None:
        """Ask the process to finish its running batches, close the backend and exit."""
        if not self.send(wire.StopBackend()):
            # It is still opening, or does not read: it meets the end of the pipe whenever it looks.
            self._release()

    def kill(self) -> None:
        """Kill the whole process group.  Allowed at any time, any number of times."""
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def exited(self) -> bool:
        """Has the process ended?  It must still be reaped."""
        if self._process.returncode is not None:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def reap(self) -> int | None:
        """Exit status (negative: the signal), or None while it lives.  Also ends what is left of its group."""
        if not self.exited():
            return None
        self.kill()
        return self._process.wait()

    def close(self) -> None:
        """Give sockets and descriptors back.  A process that was not reaped stops when it sees the pipe's end."""
        self._release()
        self._pull.close()
        if self._push is not None:
            self._push.close()
            self._push = None
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        self._unlink()

    def _unlink(self) -> None:
        for address in self._addresses:  # or each attachment would leave two files in the folder of the run
            Path(address.removeprefix("ipc://")).unlink(missing_ok=True)

    def _release(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


def _filled_pipe(content: bytes) -> tuple[int, int]:
    """A pipe that holds `content`, and its writing end: the child finds its config before it has run one line."""
    reader, writer = os.pipe()
    frame = len(content).to_bytes(4, "little") + content
    room = fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)
    if len(frame) > room:
        os.close(reader)
        os.close(writer)
        raise UserError(f"the storage config takes {len(frame)} bytes, at most {room} fit; shorten the extra config")
    os.write(writer, frame)
    return reader, writer


def _environment() -> dict[str, str]:
    """Ours, so that the child finds this very package wherever the server was started, and nothing beside it."""
    package_root = str(Path(sglang_hicache.__file__).resolve().parents[1])
    inherited = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(filter(None, (package_root, inherited)))
    # Nothing is computed there.  Tensors of a plug-in would wake a thread for each core to be copied, and wait for
    # those that the model keeps busy: on a loaded machine that made copies five times slower and more.
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
