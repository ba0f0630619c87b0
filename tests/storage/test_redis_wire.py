"""Replies of a Redis server, in pieces of any size, and what somebody says who is none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from sglang_hicache.storage.backend import PageResult
from sglang_hicache.storage.page_format import IncomingPage, OutgoingPage, Verdict
from sglang_hicache.storage.redis_wire import Line, line_of, packed
from tests.storage import pages

_SIZE = 40


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Our end and the server's."""
    ours, theirs = socket.socketpair()
    ours.settimeout(20.0)
    with ours, theirs:
        yield ours, theirs


class Pool:
    """A pool of the library, as far as a line sees it; `closed`: connections that came back closed."""

    def __init__(self, connected: socket.socket) -> None:
        self.connected = connected
        self.closed = 0
        self.released = 0

    def get_connection(self) -> SimpleNamespace:
        return SimpleNamespace(_sock=self.connected, disconnect=self._close)

    def release(self, _: object) -> None:
        self.released += 1

    def _close(self) -> None:
        self.closed += 1


class Pieces:
    """A socket that gives so many bytes at a time."""

    def __init__(self, said: bytes, step: int) -> None:
        self._said = said
        self._step = step

    def recv_into(self, target: memoryview) -> int:
        piece = self._said[: min(self._step, len(target))]
        target[: len(piece)] = piece
        self._said = self._said[len(piece) :]
        return len(piece)


class Told(IncomingPage):
    """Remembers what it was told."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.ends: list[int] = []

    def arrived(self, end: int) -> None:
        self.ends.append(end)
        super().arrived(end)


def _line(said: bytes, step: int) -> Line:
    return Line(Pieces(said, step))  # type: ignore[arg-type]


def _outgoing(number: int = 1) -> OutgoingPage:
    return OutgoingPage(pages.layout(size=_SIZE), pages.key(number), pages.content(number, _SIZE), b"", 0)


def _incoming(number: int = 1) -> IncomingPage:
    return IncomingPage(pages.layout(size=_SIZE), pages.key(number), pages.empty(1, _SIZE)[0])


def _bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


def test_replies_in_pieces_of_any_size() -> None:
    outgoing = _outgoing()
    value = outgoing.header() + bytes(outgoing.payload)
    said = b"+OK\r\n:12\r\n$-1\r\n" + _bulk(value) + b"$0\r\n\r\n-ERR no\r\n"
    said += _bulk(value[:-1]) + _bulk(value) + b":7\r\n"
    for step in range(1, len(said) + 1):
        line = _line(said, step)
        assert [line.reply(), line.reply(), line.reply()] == [b"OK", 12, None]
        first, last = _incoming(), _incoming()
        assert line.receive_page(first) is PageResult.HIT
        assert line.reply() == b""
        assert isinstance(line.reply(), redis.ResponseError)
        assert line.receive_page(_incoming()) is PageResult.WRONG_SIZE
        assert line.receive_page(last) is PageResult.HIT
        assert first.judge() is last.judge() is Verdict.GOOD, step
        assert line.reply() == 7
        line.expect_silence()


def test_a_page_is_told_what_has_come() -> None:
    """It is hashed piece by piece while it is warm in the cache of the processor."""
    outgoing = _outgoing()
    page = Told(pages.layout(size=_SIZE), pages.key(1), pages.empty(1, _SIZE)[0])
    line = _line(_bulk(outgoing.header() + bytes(outgoing.payload)), 16)
    assert line.receive_page(page) is PageResult.HIT
    assert page.ends[-1] == _SIZE and page.ends == sorted(page.ends) and len(page.ends) > 1
    assert page.judge() is Verdict.GOOD


def test_a_missing_page_and_a_complaint() -> None:
    line = _line(b"$-1\r\n-NOPERM not you\r\n", 100)
    assert line.receive_page(_incoming()) is PageResult.MISS
    complaint = line.receive_page(_incoming())
    assert isinstance(complaint, redis.ResponseError) and str(complaint) == "NOPERM not you"


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400 Bad Request\r\n", b":12a\r\n", b"$x\r\n", b"*1\r\n", b"x" * 200_000,
        b"$9223372036854775807\r\nabc", b"$%b\r\nabc" % (b"9" * 40),
    ],
)  # fmt: skip
def test_somebody_who_is_no_redis_server(said: bytes) -> None:
    with pytest.raises(redis.InvalidResponse):
        _line(said, 50_000).reply()


def test_a_value_that_has_no_end_is_not_waited_for() -> None:
    """No server has a value of 8 EiB; whoever says so may go on for ever, one byte in a second."""
    with pytest.raises(redis.InvalidResponse):
        _line(b"$9223372036854775807\r\nabc", 100).receive_page(_incoming())


def test_a_connection_that_ends_in_the_middle() -> None:
    with pytest.raises(redis.ConnectionError, match="closed the connection"):
        _line(b"$296\r\nabc", 100).receive_page(_incoming())


@pytest.mark.parametrize(
    ("ttl_s", "tail"), [(0, b"\r\n"), (60, b"\r\n$2\r\nEX\r\n$2\r\n60\r\n")], ids=["for ever", "for a minute"]
)
def test_a_page_goes_out_as_one_command(
    ttl_s: int, tail: bytes, ends: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = ends
    page = _outgoing()
    Line(ours).send_page(b"name", page, ttl_s)
    words = [b"SET", b"name", page.header() + bytes(page.payload), *([b"EX", b"60"] if ttl_s else [])]
    said = theirs.recv(10_000)
    assert said == packed(*words)
    assert said.endswith(tail)


def test_what_does_not_fit_into_the_socket_goes_out_in_order(ends: tuple[socket.socket, socket.socket]) -> None:
    """The buffers of the kernel are smaller than a page: what was not taken is sent again from where it ended."""
    ours, theirs = ends
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    buffers = [pages.content(number, size) for number, size in enumerate((3, 100_000, 1, 70_000))]
    whole = b"".join(buffers)
    from_there = bytearray()
    sender = threading.Thread(target=lambda: Line(ours).send(buffers))
    sender.start()
    while len(from_there) < len(whole):
        from_there += theirs.recv(7_000)
    sender.join()
    assert bytes(from_there) == whole


def test_a_line_that_was_left_by_an_error_is_closed(ends: tuple[socket.socket, socket.socket]) -> None:
    pool = Pool(ends[0])
    with pytest.raises(KeyError):
        with line_of(pool):  # type: ignore[arg-type]
            raise KeyError("anything")
    assert (pool.closed, pool.released) == (1, 1)


def test_a_server_that_says_more_than_it_was_asked_is_not_listened_to(
    ends: tuple[socket.socket, socket.socket]
) -> None:
    """Its next words would be taken for the reply to somebody else's question."""
    pool = Pool(ends[0])
    ends[1].sendall(b":1\r\n:2\r\n")
    with pytest.raises(redis.InvalidResponse, match="more than it was asked"):
        with line_of(pool) as line:  # type: ignore[arg-type]
            assert line.reply() == 1
    assert (pool.closed, pool.released) == (1, 1)
