"""The shared page, and the watchdog that reads it."""

import os
import subprocess
import sys

import pytest

from sglang_hicache.heartbeat import Beat, Heartbeat, ServerState, Watchdog


@pytest.fixture
def heartbeat():
    page = Heartbeat.create(ranks=3)
    yield page
    page.close()


def test_rows_belong_to_ranks(heartbeat):
    heartbeat.tick(1, pending=True, now_us=5)
    heartbeat.tick(1, pending=False, now_us=9)
    heartbeat.tick(2, pending=True, now_us=7)
    assert heartbeat.row(0) == Beat(ticks=0, pending=False, at_us=0)
    assert heartbeat.row(1) == Beat(ticks=2, pending=False, at_us=9)
    assert heartbeat.row(2) == Beat(ticks=1, pending=True, at_us=7)
    heartbeat.set_pending(1, True)
    assert heartbeat.row(1) == Beat(ticks=2, pending=True, at_us=9)


def test_another_process_sees_what_is_written(heartbeat):
    heartbeat.state = ServerState.DRAINING
    code = (
        "import sys; from sglang_hicache.heartbeat import Heartbeat; h = Heartbeat(int(sys.argv[1]), 3);"
        "h.tick(2, True, 44); print(h.state.name)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(heartbeat.fd)],
        pass_fds=[heartbeat.fd], capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert result.stdout == "DRAINING\n"
    assert heartbeat.row(2) == Beat(ticks=1, pending=True, at_us=44)


def test_closing_gives_the_descriptor_back():
    page = Heartbeat.create(ranks=1)
    page.close()
    with pytest.raises(OSError):
        os.fstat(page.fd)


def row(ticks: int, pending: bool) -> Beat:
    return Beat(ticks=ticks, pending=pending, at_us=0)


def test_a_rank_is_stuck_after_the_timeout_without_a_tick_while_pending():
    watchdog = Watchdog(ranks=2, timeout_s=10)
    assert watchdog.stuck([row(0, True), row(0, False)], 0) == []
    assert watchdog.stuck([row(0, True), row(0, False)], 9.9) == []
    assert watchdog.stuck([row(0, True), row(0, False)], 10) == [0]


def test_progress_or_idleness_starts_the_wait_anew():
    watchdog = Watchdog(ranks=1, timeout_s=10)
    for now_s, beat in [(0, row(1, True)), (9, row(2, True)), (18, row(2, False)), (27, row(2, True))]:
        assert watchdog.stuck([beat], now_s) == []
    assert watchdog.stuck([row(2, True)], 27.9) == []
    assert watchdog.stuck([row(2, True)], 28) == [0]
