"""Typed one-way sockets between the processes of one server, and the poller in which they sleep.

The only file that imports zmq.  Every process uses it, each socket from exactly one thread.  Addresses are
`ipc://` paths below the private run folder.  A `Push` carries the messages of one union of `wire`, in order, to one
`Pull`; nothing here ever blocks except `Poller.wait`, and nothing is ever dropped: a full socket says so.

Descriptors of ZMQ sockets are edge triggered.  Whoever sleeps on `Pull.fd` (asyncio) drains with `receive_all` until it
is empty each time it wakes, and once right after registering; `Poller` knows about this by itself.
"""

from __future__ import annotations

from types import UnionType
from typing import Any

import msgspec
import zmq

from sglang_hicache.errors import ProtocolError, UserError

#: Messages that may wait in a socket.  Far above what a healthy server queues; a bound all the same, because a peer
#: that stopped reading must show as a full socket and not as growing memory.
DEFAULT_HIGH_WATER = 10_000

#: How long closing a socket may wait for its last messages to leave.  The last answer before an exit must arrive, but
#: a dead peer must not keep the process alive.
LINGER_MS = 1_000

#: `sun_path` of a unix socket, less the closing zero.
LONGEST_PATH = 107

_encoder = msgspec.msgpack.Encoder()


def ipc_address(run_dir: str, name: str) -> str:
    """Address of the socket `name` of the server that runs in `run_dir`."""
    path = f"{run_dir}/{name}"
    if len(path.encode()) > LONGEST_PATH:
        raise UserError(
            f"socket path {path!r} is longer than the {LONGEST_PATH} bytes the system allows; "
            "set XDG_RUNTIME_DIR or TMPDIR to a shorter folder"
        )
    return f"ipc://{path}"


def close_all_blocking() -> None:
    """At the end of a process: close what is open and wait until the last messages have left, LINGER_MS at most."""
    zmq.Context.instance().destroy(LINGER_MS)


class _Socket:
    """One end of a one-way socket.  Subclassed by the two directions; never used alone."""

    def __init__(self, kind: int, address: str, *, bind: bool, high_water: int) -> None:
        self.address = address
        self._socket = zmq.Context.instance().socket(kind)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.SNDHWM, high_water)
        self._socket.setsockopt(zmq.RCVHWM, high_water)
        try:
            if bind:
                self._socket.bind(address)
            else:
                self._socket.connect(address)
        except zmq.ZMQError as error:
            self._socket.close(0)
            raise ProtocolError(f"cannot {'bind' if bind else 'connect to'} {address}: {error}") from error

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address}>"

    def close(self) -> None:
        """Let the last messages leave (bounded by LINGER_MS, in the background) and give the socket back."""
        self._socket.close()


class Push(_Socket):
    """The sending end."""

    def __init__(
        self, address: str, types: UnionType | type, bind: bool = False, high_water: int = DEFAULT_HIGH_WATER
    ) -> None:
        super().__init__(zmq.PUSH, address, bind=bind, high_water=high_water)
        self._types = types

    def send(self, message: msgspec.Struct) -> bool:
        """Queue the message.  False: the socket is full (or, bound, has no peer yet); nothing was sent."""
        if not isinstance(message, self._types):
            raise ProtocolError(f"{type(message).__name__} does not belong on {self.address}")
        try:
            self._socket.send(_encoder.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True


class Pull(_Socket):
    """The receiving end."""

    def __init__(
        self, address: str, types: UnionType | type, bind: bool = True, high_water: int = DEFAULT_HIGH_WATER
    ) -> None:
        super().__init__(zmq.PULL, address, bind=bind, high_water=high_water)
        self._decoder = msgspec.msgpack.Decoder(types)

    @property
    def fd(self) -> int:
        """Becomes readable when messages may have arrived (edge triggered: see the module's head)."""
        return self._socket.getsockopt(zmq.FD)

    def receive_all(self) -> list[Any]:
        """Everything that has arrived, oldest first; empty when nothing has.  Never waits."""
        messages = []
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            messages.append(self._decode(frame))

    def receive(self) -> Any | None:
        """The oldest message that has arrived, or None.  Never waits."""
        try:
            frame = self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return self._decode(frame)

    def _decode(self, frame: bytes) -> Any:
        try:
            return self._decoder.decode(frame)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"malformed message of {len(frame)} bytes on {self.address}: {error}") from error


class Poller:
    """Waits for any of several sockets and plain descriptors (pidfds, pipes, signal descriptors)."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()
        self._pulls: dict[zmq.Socket, Pull] = {}

    def register(self, thing: Pull | int) -> None:
        """Wake when `thing` has something to read.  Registering twice is harmless."""
        if isinstance(thing, Pull):
            self._pulls[thing._socket] = thing
            self._poller.register(thing._socket, zmq.POLLIN)
        else:
            self._poller.register(thing, zmq.POLLIN)

    def unregister(self, thing: Pull | int) -> None:
        """Forget `thing`; call it before the descriptor is closed, or the next wait fails."""
        if isinstance(thing, Pull):
            del self._pulls[thing._socket]
            self._poller.unregister(thing._socket)
        else:
            self._poller.unregister(thing)

    def wait(self, timeout_ms: int | None) -> list[Pull | int]:
        """Sleep until something is ready or `timeout_ms` has passed (None: for ever); what is ready."""
        ready = self._poller.poll(timeout_ms)
        return [thing if isinstance(thing, int) else self._pulls[thing] for thing, _ in ready]
