"""Commands and pages over one connection that the client library has made.

The library connects, proves who we are, speaks TLS and finds the server; what goes over its connection then is written
and read here, because a page need not be copied for that: it is sent from the host pool and received into it, while a
command of the library copies a value three times (`docs/decisions/0021-redis.md` has the figures).  Owned by one
thread at a time, between two commands of the library; RESP 2, in which a server says nothing that nobody has asked for.

A `Line` that was left by an error is closed: whatever the server still says on it belongs to nobody.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence

import redis

from sglang_hicache.storage.backend import PageResult
from sglang_hicache.storage.page_format import CHUNK_BYTES, IncomingPage, OutgoingPage

#: What the server says is read in pieces of this size where it is no page; the start of a page that comes with it is
#: copied, which costs less than a second call for each reply.
_SMALL_BYTES = 16 * 1024

#: A line that is longer than this is none of a Redis server's.
_LONGEST_LINE = 64 * 1024

#: No server keeps more under one name unless it was told to: whoever announces more could go on for ever.
_LARGEST_VALUE = 512 * 1024 * 1024

_END = b"\r\n"

Reply = int | bytes | None | redis.ResponseError


def packed(*words: bytes) -> bytes:
    """A command as it goes over the wire."""
    return b"*%d\r\n%b" % (len(words), b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words))


@contextlib.contextmanager
def line_of(pool: redis.ConnectionPool) -> Iterator[Line]:
    """A connection of this pool; it goes back there, and if anything goes wrong, closed."""
    connection = pool.get_connection()
    is_clean = False
    try:
        line = Line(connection._sock)
        yield line
        line.expect_silence()
        is_clean = True
    finally:
        if not is_clean:
            connection.disconnect()
        pool.release(connection)


class Line:
    """One connection, used for some commands in a row."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._is_tls = isinstance(connected, ssl.SSLSocket)
        #: Bytes that have come and that nobody has looked at: `_small[_start:_end]`.
        self._small = bytearray(_SMALL_BYTES)
        self._start = self._end = 0

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """All of them, one after another."""
        if self._is_tls:
            for buffer in buffers:
                self._socket.sendall(buffer)
            return
        rest = [memoryview(buffer) for buffer in buffers]
        while rest:
            sent = self._socket.sendmsg(rest)
            while rest and sent >= len(rest[0]):
                sent -= len(rest.pop(0))
            if rest:
                rest[0] = rest[0][sent:]

    def send_page(self, name: bytes, page: OutgoingPage, ttl_s: int) -> None:
        """Ask the server to keep a page, whatever it has under this name."""
        header = page.header()
        words = 5 if ttl_s else 3
        head = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b" % (words, len(name), name, page.size_bytes, header)
        seconds = b"%d" % ttl_s
        tail = b"\r\n$2\r\nEX\r\n$%d\r\n%b\r\n" % (len(seconds), seconds) if ttl_s else _END
        self.send((head, page.payload, tail))

    def reply(self) -> Reply:
        """The next reply, with all of its bytes; a complaint of the server is one, too."""
        kind, text = self._line()
        if kind == b"$":
            size = self._number(text)
            if size > _LONGEST_LINE:
                raise self._nonsense()  # nothing is asked here that has a page for its reply
            return None if size < 0 else self._bulk(size)
        if kind == b":":
            return self._number(text)
        if kind == b"+":
            return text
        if kind == b"-":
            return redis.ResponseError(text.decode(errors="replace"))
        raise self._nonsense()

    def receive_page(self, page: IncomingPage) -> PageResult | redis.ResponseError:
        """The reply to a GET, into the page."""
        kind, text = self._line()
        if kind == b"-":
            return redis.ResponseError(text.decode(errors="replace"))
        if kind != b"$":
            raise self._nonsense()
        size = self._number(text)
        if size < 0:
            return PageResult.MISS
        if size > max(_LARGEST_VALUE, page.size_bytes):
            raise self._nonsense()
        if size != page.size_bytes:
            self._skip(size + len(_END))
            return PageResult.WRONG_SIZE
        self._fill(memoryview(page.header))
        self._fill(page.payload, page.arrived)
        self._skip(len(_END))
        return PageResult.HIT

    def expect_silence(self) -> None:
        """All replies were read; otherwise the next user would take them for its own."""
        if self._start != self._end:
            raise redis.InvalidResponse("the server has said more than it was asked")

    def _line(self) -> tuple[bytes, bytes]:
        """The next line: its first byte, and the rest."""
        while (at := self._small.find(_END, self._start, self._end)) < 0:
            if self._end - self._start > _LONGEST_LINE:
                raise self._nonsense()
            self._more()
        kind, text = bytes(self._small[self._start : self._start + 1]), bytes(self._small[self._start + 1 : at])
        self._start = at + len(_END)
        return kind, text

    def _more(self) -> None:
        """Receive something; what was there moves to the front."""
        kept = self._end - self._start
        if self._start:
            self._small[:kept] = self._small[self._start : self._end]
            self._start, self._end = 0, kept
        if kept == len(self._small):
            self._small += bytes(len(self._small))
        self._end += self._receive(memoryview(self._small)[kept:])

    def _fill(self, target: memoryview, arrived: Callable[[int], None] | None = None) -> None:
        """So many bytes as there is room for, from what has come and from the socket."""
        done = min(len(target), self._end - self._start)
        target[:done] = self._small[self._start : self._start + done]
        self._start += done
        while done < len(target):
            done += self._receive(target[done : done + CHUNK_BYTES])
            if arrived is not None:
                arrived(done)

    def _bulk(self, size: int) -> bytes:
        found = bytearray(size)
        self._fill(memoryview(found))
        self._skip(len(_END))
        return bytes(found)

    def _skip(self, size: int) -> None:
        """Nobody wants these bytes."""
        nowhere = memoryview(bytearray(min(size, CHUNK_BYTES)))
        while size:
            piece = nowhere[: min(size, len(nowhere))]
            self._fill(piece)
            size -= len(piece)

    def _receive(self, into: memoryview) -> int:
        count = self._socket.recv_into(into)
        if not count:
            raise redis.ConnectionError("the server has closed the connection")
        return count

    def _number(self, text: bytes) -> int:
        try:
            return int(text)
        except ValueError:
            raise self._nonsense() from None

    def _nonsense(self) -> redis.InvalidResponse:
        return redis.InvalidResponse("what answers there speaks no Redis protocol")
