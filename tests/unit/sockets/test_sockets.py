"""Typed sockets: order, fullness as a value, refusals that name the socket, and a poller that wakes for both kinds."""

import os

import pytest
import zmq

from sglang_hicache import wire
from sglang_hicache.errors import ProtocolError, UserError
from sglang_hicache.sockets import Poller, Pull, Push, ipc_address

#: Upper bound of every wait in this file: reached only when a test fails.
FAIL_MS = 60_000


@pytest.fixture
def pair(tmp_path):
    address = ipc_address(str(tmp_path), "to_rank_0")
    pull = Pull(address, wire.ToRank, bind=True)
    push = Push(address, wire.ToRank)
    yield push, pull
    push.close()
    pull.close()


def receive_blocking(pull: Pull, count: int) -> list:
    poller, messages = Poller(), []
    poller.register(pull)
    while len(messages) < count:
        assert poller.wait(FAIL_MS), f"only {len(messages)} of {count} messages arrived"
        messages += pull.receive_all()
    return messages


def test_messages_arrive_in_order_with_their_types(pair):
    push, pull = pair
    sent = [wire.AbortRequest(rid=str(n)) if n % 2 else wire.QueryStatus(id=str(n)) for n in range(100)]
    assert all(push.send(message) for message in sent)
    assert receive_blocking(pull, 100) == sent


def test_nothing_to_receive_is_an_empty_list(pair):
    assert pair[1].receive_all() == []
    assert pair[1].receive() is None


def test_a_sender_may_come_before_its_receiver(tmp_path):
    address = ipc_address(str(tmp_path), "reports")
    push = Push(address, wire.RankReport)
    assert push.send(wire.RankReport(rank=1, applied=7))
    pull = Pull(address, wire.RankReport, bind=True)
    assert receive_blocking(pull, 1)[0].applied == 7
    push.close()
    pull.close()


def test_full_is_a_value_and_nothing_is_lost(tmp_path):
    """The peer never bound: exactly `high_water` messages are kept, the next one is refused, none is dropped."""
    address = ipc_address(str(tmp_path), "to_rank_0")
    push = Push(address, wire.ToRank, high_water=3)
    accepted = [push.send(wire.AbortRequest(rid=str(n))) for n in range(5)]
    assert accepted == [True, True, True, False, False]
    pull = Pull(address, wire.ToRank, bind=True)
    assert [message.rid for message in receive_blocking(pull, 3)] == ["0", "1", "2"]
    push.close()
    pull.close()


def test_a_message_of_another_direction_is_refused_at_the_sender(pair):
    with pytest.raises(ProtocolError, match="CommandAnswer does not belong on .*to_rank_0"):
        pair[0].send(wire.CommandAnswer(id="1", rank=0, success=True))


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"\x91\xa7Unknown", b"not msgpack at all"])
def test_a_malformed_message_names_its_socket(pair, frame):
    push, pull = pair
    push._socket.send(frame)
    with pytest.raises(ProtocolError, match="malformed message of .* on ipc://.*to_rank_0"):
        receive_blocking(pull, 1)


def test_the_descriptor_wakes_a_foreign_loop(pair):
    """asyncio sleeps on `fd`: readable after a send, and draining until empty is enough to hear of the next one."""
    push, pull = pair
    for rid in ("first", "second"):
        poller, messages = zmq.Poller(), pull.receive_all()
        poller.register(pull.fd, zmq.POLLIN)
        push.send(wire.AbortRequest(rid=rid))
        while not messages:
            assert poller.poll(FAIL_MS)
            messages = pull.receive_all()
        assert messages[0].rid == rid


def test_the_poller_wakes_for_sockets_and_descriptors_and_times_out(pair):
    push, pull = pair
    read_end, write_end = os.pipe()
    poller = Poller()
    poller.register(pull)
    poller.register(read_end)
    poller.register(read_end)
    assert poller.wait(0) == []
    os.write(write_end, b"x")
    assert poller.wait(FAIL_MS) == [read_end]
    poller.unregister(read_end)
    push.send(wire.AbortRequest(rid="1"))
    assert poller.wait(FAIL_MS) == [pull]
    os.close(read_end)
    os.close(write_end)


def test_a_path_too_long_for_the_system_says_what_to_do():
    with pytest.raises(UserError, match="XDG_RUNTIME_DIR"):
        ipc_address("/" + "x" * 100, "storage_0_1_from")


def test_two_owners_of_one_address_are_refused(tmp_path):
    with pytest.raises(ProtocolError, match="cannot bind ipc://"):
        Pull(f"ipc://{tmp_path}/missing/folder", wire.ToRank, bind=True)
