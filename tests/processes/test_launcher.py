"""The supervisor with fake children: who is blamed, what is logged, and that nothing survives."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("launcher_children.py")

#: Upper bound of every wait in this file: reached only when a test fails.
FAIL_S = 60
SECRET = "fake-admin-key"


class Launched:
    """A launcher in a process of its own, and what it has logged so far."""

    def __init__(self, scenario: str, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "launch", scenario, str(folder)],
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.pidfd = os.pidfd_open(self.process.pid)
        self.text = ""

    def read_until(self, pattern: str) -> re.Match[str]:
        """Wait for a log line."""
        assert self.process.stderr is not None
        deadline = time.monotonic() + FAIL_S
        while True:
            if match := re.search(pattern, self.text):
                return match
            ready, _, _ = select.select([self.process.stderr], [], [], max(0, deadline - time.monotonic()))
            data = os.read(self.process.stderr.fileno(), 65536) if ready else b""
            assert data, f"{pattern!r} never came:\n{self.text}"
            self.text += data.decode()

    def finish(self) -> int:
        """Wait for the exit; the rest of the log is in `text`."""
        _, rest = self.process.communicate(timeout=FAIL_S)
        self.text += rest.decode()
        return self.process.returncode

    def pids(self) -> list[int]:
        return [int(pid) for pid in re.findall(r"pid \S+(?: \d)?: (\d+)", self.text)]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()
        os.close(self.pidfd)


@pytest.fixture
def launch(tmp_path):
    """`launch(scenario)`; at the end nothing that it started may be left."""
    launched = []

    def start(scenario: str) -> Launched:
        launched.append(Launched(scenario, tmp_path))
        return launched[-1]

    yield start
    for one in launched:
        one.close()
        for pid in one.pids():
            wait_until_gone(pid)


def wait_until_gone(pid: int) -> None:
    """The process has ended.  An orphan's parent is init, which reaps it or leaves a zombie; both are gone."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([pidfd], [], [], FAIL_S)[0], f"process {pid} survived"
    finally:
        os.close(pidfd)


def test_a_child_that_refuses_to_start_is_named_with_its_reason(launch):
    server = launch("refuse")
    assert server.finish() == 1
    assert "rank 1 could not start: model 'x' is not supported; choose another" in server.text


def test_a_child_that_crashes_at_start_is_named_with_its_signal(launch):
    server = launch("crash-at-start")
    assert server.finish() == 1
    assert re.search(r"ERROR .*rank 1 \(pid \d+\) was killed by SIGSEGV; stopping the server", server.text)


def test_a_rank_that_dies_stops_the_server_in_order(launch):
    server = launch("die")
    assert server.finish() == 1
    assert re.search(r"rank 1 \(pid \d+\) was killed by SIGKILL; stopping the server", server.text)
    assert re.search(r"rank 0 \(pid \d+\) was killed by SIGKILL\n", server.text)


@pytest.mark.parametrize(
    ("scenario", "why"),
    [
        ("raise", r"rank 1 failed: RuntimeError: broken while serving"),
        ("leave", r"rank 1 \(pid \d+\) exited with code 0"),
    ],
)
def test_a_rank_that_ends_by_itself_stops_the_server(launch, scenario, why):
    """The tokenizer may end its streams first: it is told, and sees that the server is failing.

    An ordinary stop would wait for ranks that do not leave, here far longer than `finish` waits.
    """
    server = launch(scenario)
    assert server.finish() == 1
    assert re.search(why + r".*; stopping the server", server.text)
    if "tokenizer is ready" in server.text:
        assert "tokenizer saw FAILING" in server.text


def test_the_watchdog_shows_the_stacks_of_all_ranks_and_stops_the_server(launch):
    server = launch("stuck")
    assert server.finish() == 1
    assert "watchdog: no tick of rank 1 for 1 s with work pending; stopping the server" in server.text
    for rank in (0, 1):
        assert re.search(rf"\[stack of rank {rank}\] .* in wait_for_ever_in_a_function_with_a_name", server.text)
    assert "tokenizer saw FAILING" in server.text


def test_a_rank_that_somebody_stopped_is_named_and_shows_its_stack_too(launch):
    """SIGSTOP: a stopped process runs no signal handler, so the stack that matters most would be missing."""
    server = launch("stopped")
    assert server.finish() == 1
    assert re.search(r"ERROR .*rank 1 is in state T \(stopped\): somebody stopped it", server.text)
    assert re.search(r"\[stack of rank 0\] .* in wait_for_ever_in_a_function_with_a_name", server.text)
    assert re.search(r"\[stack of rank 1\] .* in rank\b", server.text)
    assert "shows no stack" not in server.text


def test_a_rank_that_can_show_no_stack_is_named(launch):
    server = launch("mute")
    assert server.finish() == 1
    assert re.search(r"ERROR .*rank 1 shows no stack; its process is in state S \(sleeping\)", server.text)
    assert "rank 0 shows no stack" not in server.text


def test_sigterm_goes_to_the_tokenizer_which_sends_the_ranks_home(launch):
    server = launch("good")
    server.read_until(r"ready: http://127\.0\.0\.1:30000\n")
    server.process.send_signal(signal.SIGTERM)
    assert server.finish() == 0
    assert "tokenizer saw DRAINING" in server.text
    for name in ("tokenizer", "rank 0", "rank 1"):
        assert re.search(rf"{name} \(pid \d+\) exited with code 0", server.text)


def test_a_second_signal_kills_ranks_that_do_not_leave(launch):
    """A second signal ends the patience at once."""
    server = launch("deaf")
    server.read_until(r"ready: http")
    server.process.send_signal(signal.SIGINT)
    server.read_until(r"tokenizer \(pid \d+\) exited")
    server.process.send_signal(signal.SIGINT)
    assert server.finish() == 1
    assert "SIGINT again: killing what is left" in server.text


def test_ranks_that_do_not_leave_in_time_are_named_and_killed(launch, monkeypatch):
    monkeypatch.setenv("FAKE_MARGIN_S", "0.2")
    server = launch("deaf")
    server.read_until(r"ready: http")
    server.process.send_signal(signal.SIGTERM)
    assert server.finish() == 1
    # On a busy machine the tokenizer may need longer than that, too.
    assert re.search("rank 0, rank 1(, tokenizer)? did not stop in time; stopping the server", server.text)


def test_a_signal_before_the_server_is_ready_ends_it(launch):
    server = launch("slow")
    server.read_until(r"pid rank 1")
    server.process.send_signal(signal.SIGTERM)
    assert server.finish() == 1
    assert "SIGTERM before the server was ready" in server.text


def test_children_die_with_the_launcher(launch):
    server = launch("good")
    server.read_until(r"ready: http")
    assert len(server.pids()) == 3
    server.process.kill()
    for pid in server.pids():
        wait_until_gone(pid)


def test_fm60_no_key_in_any_argv_environment_or_log(launch):
    server = launch("raise")
    server.finish()
    assert SECRET not in server.text

    server = launch("good")
    server.read_until(r"ready: http")
    for pid in [server.process.pid, *server.pids()]:
        for name in ("cmdline", "environ"):
            assert SECRET.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
    server.process.send_signal(signal.SIGTERM)
    assert server.finish() == 0
