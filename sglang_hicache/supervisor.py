"""Starts the processes of one server, waits until they are ready, watches them, and stops them in order.

Runs in the launcher, on its main thread (the kernel ties the life of a child to the thread that started it), in one
selector: a pidfd and a channel per child, and a pipe that signals arrive on.  It holds no thread and no torch, sends no
message on any socket of the server, and never leaves a server half alive:

    STARTING   ranks load; the tokenizer answers probes with 503, waits for the ranks and attaches the storage
    SERVING    any exit, a `failed` line or a rank without ticks leads to FAILING
    STOPPING   SIGTERM: the tokenizer drains, detaches, tells the ranks to leave; all exit 0
    FAILING    probes get 503, ranks write their stacks if the watchdog barked; the tokenizer gets a moment to answer
               its clients; then everything is killed; exit code 1
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

import sglang_hicache
from sglang_hicache.child import Orders
from sglang_hicache.config import ServerConfig
from sglang_hicache.heartbeat import Heartbeat, ServerState, Watchdog

log = logging.getLogger(__name__)

#: How often ticks are compared; the watchdog's timeout is in minutes.
POLL_S = 1.0

#: A failing tokenizer gets this long to end its clients' streams with an error.
FAILING_GRACE_S = 2.0

#: The time in which ranks can write their stacks, and probes see the 503, before the end begins.
STACKS_GRACE_S = 1.0

#: A process that lives this long after SIGKILL will not end soon.
UNKILLABLE_S = 5.0

#: What a stop may take beyond the drains that the configuration bounds: backups to flush, processes to leave.
STOP_MARGIN_S = 10.0

#: Loading may take long; after this, and again after each such time, the log says who is not ready.
SLOW_START_S = 30.0

_EXIT_OK, _EXIT_FAILED = 0, 1


class Phase(enum.Enum):
    """What the supervisor is doing; see the head of this file."""

    STARTING = "starting"
    SERVING = "serving"
    STOPPING = "stopping"
    FAILING = "failing"


class ChildState(enum.Enum):
    """Where one child stands."""

    STARTING = "starting"
    READY = "ready"
    GONE = "gone"


@dataclass
class ChildProcess:
    """One child and the descriptors that belong to it."""

    name: str
    process: subprocess.Popen[bytes]
    pidfd: int
    channel_fd: int
    state: ChildState = ChildState.STARTING
    #: What came over the channel after the last whole line.
    unread: bytes = b""
    #: What it said with its last line.
    said: str = ""
    has_shown_stack: bool = False

    def signal(self, number: int) -> None:
        """Send a signal, unless it is gone."""
        if self.state is not ChildState.GONE:
            signal.pidfd_send_signal(self.pidfd, number)

    def kernel_state(self) -> str:
        """The state as the kernel names it, such as `T (stopped)`; it is not reaped yet, so its number is its own."""
        if self.state is ChildState.GONE:
            return "gone"
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8", errors="replace")
        return status.partition("State:")[2].partition("\n")[0].strip()


def child_command(name: str) -> list[str]:
    """How a child is started: `ps` shows its role and rank, and nothing that is secret."""
    role = ["sglang_hicache.tokenizer"] if name == "tokenizer" else ["sglang_hicache.scheduler", *name.split()]
    return [sys.executable, "-m", *role]


class Supervisor:
    """The launcher's main object: one server from its start to its exit code."""

    def __init__(
        self,
        config: ServerConfig,
        rank_environment: Mapping[str, str],
        command: Callable[[str], list[str]] = child_command,
    ) -> None:
        self._config = config
        self._rank_environment = rank_environment
        self._command = command
        self._phase = Phase.STARTING
        self._exit_code = _EXIT_OK
        self._children: dict[str, ChildProcess] = {}
        self._heartbeat = Heartbeat.create(config.tp_size)
        self._watchdog = Watchdog(config.tp_size, config.scheduler.watchdog_timeout_s)
        self._selector = selectors.DefaultSelector()
        #: When patience with the current phase ends (STARTING: only with silence).
        self._deadline_s = time.monotonic() + SLOW_START_S
        #: FAILING: what is still to be done, each when the deadline has passed.
        self._last_steps: list[Callable[[], None]] = []

    def run_blocking(self) -> int:
        """Serve until told to stop or something breaks; the exit code of the server."""
        with _signal_fd() as signals_fd:
            self._selector.register(signals_fd, selectors.EVENT_READ, lambda: self._signalled(signals_fd))
            try:
                self._start()
                while any(child.state is not ChildState.GONE for child in self._children.values()):
                    for key, _ in self._selector.select(self._nap_s()):
                        key.data()
                    self._look_at_clock(time.monotonic())
            finally:
                self._give_back()
        return self._exit_code

    # ----------------------------------------------------------------------------------------------- start

    def _start(self) -> None:
        for rank in range(self._config.tp_size):
            self._spawn(f"rank {rank}", rank, self._rank_environment)
        self._spawn("tokenizer", 0, {})

    def _spawn(self, name: str, rank: int, environment: Mapping[str, str]) -> None:
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(writer, True)
        orders = Orders(
            config=self._config,
            rank=rank,
            parent_pid=os.getpid(),
            channel_fd=writer,
            heartbeat_fd=self._heartbeat.fd,
        )
        try:
            process = subprocess.Popen(
                self._command(name),
                stdin=subprocess.PIPE,
                bufsize=0,
                pass_fds=(writer, self._heartbeat.fd),
                env=_environment(environment),
                process_group=0,  # Ctrl-C in a terminal must reach the launcher alone
            )
        finally:
            os.close(writer)
        child = ChildProcess(name, process, os.pidfd_open(process.pid), reader)
        self._children[name] = child
        self._selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._ended(child))
        self._selector.register(child.channel_fd, selectors.EVENT_READ, lambda: self._heard(child))
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # if it has died, its pidfd tells
            stdin.write(msgspec.msgpack.encode(orders))

    def _look_if_ready(self, child: ChildProcess) -> None:
        log.info("%s is ready", child.name)
        if self._phase is Phase.STARTING and not self._unready():
            self._phase = Phase.SERVING
            self._heartbeat.state = ServerState.READY
            log.info("ready: %s", self._url(self._children["tokenizer"].said))

    def _unready(self) -> list[str]:
        return [child.name for child in self._children.values() if child.state is ChildState.STARTING]

    def _url(self, port: str) -> str:
        """Where clients find the server; the tokenizer knows the port that it got."""
        http = self._config.http
        host = f"[{http.host}]" if ":" in http.host else http.host
        return f"{'https' if http.ssl_certfile else 'http'}://{host}:{port}"

    # ------------------------------------------------------------------------------------------- what is heard

    def _heard(self, child: ChildProcess) -> bool:
        """Read lines of the channel: ready, failed, or a stack dump.  False when there is nothing (more) to read."""
        if child.channel_fd < 0:  # its end was seen, and the channel closed, earlier in this round
            return False
        try:
            data = os.read(child.channel_fd, 65536)
        except BlockingIOError:
            return False
        if not data:
            self._close_channel(child)
            return False
        *lines, child.unread = (child.unread + data).split(b"\n")
        for line in lines:
            self._heard_line(child, line.decode(errors="replace"))
        return True

    def _heard_line(self, child: ChildProcess, line: str) -> None:
        word, _, text = line.partition(" ")
        if word == "ready":
            child.said = text
            child.state = ChildState.READY
            self._look_if_ready(child)
        elif word == "failed":
            child.said = text
            doing = "could not start" if child.state is ChildState.STARTING else "failed"
            self._fail(f"{child.name} {doing}: {text}")
        elif line:
            child.has_shown_stack = True
            log.error("[stack of %s] %s", child.name, line)

    def _close_channel(self, child: ChildProcess) -> None:
        if child.channel_fd >= 0:
            self._selector.unregister(child.channel_fd)
            os.close(child.channel_fd)
            child.channel_fd = -1

    def _ended(self, child: ChildProcess) -> None:
        """A child has exited: reap it, hear its last words, and judge."""
        code = child.process.wait()
        child.state = ChildState.GONE
        while self._heard(child):
            pass
        self._close_channel(child)
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        if self._phase is Phase.FAILING or (self._phase is Phase.STOPPING and code == 0):
            log.info("%s (pid %d) %s", child.name, child.process.pid, how)
            if self._last_steps[:1] == [self._kill] and child.name == "tokenizer":
                self._deadline_s = 0.0  # its clients know; nothing is left to wait for
        else:
            self._fail(f"{child.name} (pid {child.process.pid}) {how}")

    def _signalled(self, signals_fd: int) -> None:
        for number in os.read(signals_fd, 64):
            name = signal.Signals(number).name
            if self._phase in (Phase.STARTING, Phase.SERVING):
                self._stop(name)
            else:
                log.warning("%s again: killing what is left", name)
                self._kill_all()

    # ------------------------------------------------------------------------------------------------ stop

    def _stop(self, why: str) -> None:
        """In order: the tokenizer drains and detaches, then it sends the ranks home."""
        self._heartbeat.state = ServerState.DRAINING
        if self._phase is Phase.STARTING:
            log.info("%s before the server was ready: stopping", why)
            self._kill_all()
            return
        self._phase = Phase.STOPPING
        bound_s = self._config.http.drain_timeout_s + 2 * self._config.storage.drain_timeout_s + STOP_MARGIN_S
        log.info("%s: stopping; requests in flight may finish, %.0f s at most", why, bound_s)
        self._deadline_s = time.monotonic() + bound_s
        self._children["tokenizer"].signal(signal.SIGTERM)

    def _fail(self, reason: str, grace_s: float = 0.0) -> None:
        """Tell why; after `grace_s` the end begins."""
        if self._phase is Phase.FAILING:
            log.error("then %s", reason)
            return
        log.error("%s; stopping the server", reason)
        self._heartbeat.state = ServerState.FAILING
        self._end_with([self._end_streams, self._kill, self._abandon], grace_s)

    def _kill_all(self) -> None:
        """Without any grace."""
        self._end_with([self._kill, self._abandon], 0.0)

    def _end_with(self, steps: list[Callable[[], None]], after_s: float) -> None:
        self._phase = Phase.FAILING
        self._exit_code = _EXIT_FAILED
        self._last_steps = steps
        self._deadline_s = time.monotonic() + after_s

    def _end_streams(self) -> None:
        """The tokenizer, which sees that the server is failing, tells its clients and leaves."""
        tokenizer = self._children["tokenizer"]
        if tokenizer.state is ChildState.READY:
            tokenizer.signal(signal.SIGTERM)
            self._deadline_s = time.monotonic() + FAILING_GRACE_S

    def _kill(self) -> None:
        for child in self._children.values():
            child.signal(signal.SIGKILL)
        self._deadline_s = time.monotonic() + UNKILLABLE_S

    def _abandon(self) -> None:
        """Not even SIGKILL ends a process in uninterruptible I/O; the server must end all the same."""
        for child in self._children.values():
            if child.state is not ChildState.GONE:
                log.error("%s (pid %d) does not end after SIGKILL: left behind", child.name, child.process.pid)
                child.state = ChildState.GONE

    def _nap_s(self) -> float:
        """Until the watchdog looks again, or patience ends (which it does not while the server serves)."""
        if self._phase is Phase.SERVING:
            return POLL_S
        return min(POLL_S, max(0.0, self._deadline_s - time.monotonic()))

    def _look_at_clock(self, now_s: float) -> None:
        if self._phase in (Phase.SERVING, Phase.STOPPING):
            rows = [self._heartbeat.row(rank) for rank in range(self._config.tp_size)]
            if stuck := self._watchdog.stuck(rows, now_s):
                self._barked(stuck)
        if now_s < self._deadline_s:
            return
        if self._phase is Phase.STARTING:
            log.warning("not ready yet: %s", ", ".join(self._unready()))
            self._deadline_s = now_s + SLOW_START_S
        elif self._phase is Phase.STOPPING:
            alive = [child.name for child in self._children.values() if child.state is not ChildState.GONE]
            self._fail(f"{', '.join(alive)} did not stop in time")
        elif self._last_steps:
            self._last_steps.pop(0)()

    def _barked(self, stuck: list[int]) -> None:
        """Work is pending and nothing moves: every rank shows its stacks, since the stuck one may wait for another."""
        names = ", ".join(f"rank {rank}" for rank in stuck)
        ranks = self._ranks()
        for child in ranks:
            child.signal(signal.SIGUSR1)
        timeout_s = self._config.scheduler.watchdog_timeout_s
        self._fail(f"watchdog: no tick of {names} for {timeout_s:g} s with work pending", STACKS_GRACE_S)
        for child in ranks:
            if (state := child.kernel_state()).startswith("T"):
                log.error("%s is in state %s: somebody stopped it; it goes on to show its stack", child.name, state)
                child.signal(signal.SIGCONT)
        self._last_steps.insert(0, self._name_the_silent)

    def _name_the_silent(self) -> None:
        """A rank in the kernel, or under a debugger, cannot answer; that it shows no stack is what is to be told."""
        for child in self._ranks():
            if child.state is not ChildState.GONE and not child.has_shown_stack:
                log.error("%s shows no stack; its process is in state %s", child.name, child.kernel_state())

    def _ranks(self) -> list[ChildProcess]:
        return [self._children[f"rank {rank}"] for rank in range(self._config.tp_size)]

    def _give_back(self) -> None:
        """Whatever the reason for leaving: no child, descriptor or page stays behind."""
        for child in self._children.values():
            if child.state is not ChildState.GONE:
                child.signal(signal.SIGKILL)
                child.process.wait()
                os.close(child.pidfd)
            if child.channel_fd >= 0:
                os.close(child.channel_fd)
        self._selector.close()
        self._heartbeat.close()


@contextlib.contextmanager
def _signal_fd() -> Iterator[int]:
    """A descriptor on which the numbers of stop signals arrive, so that one selector sees everything."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    old_fd = signal.set_wakeup_fd(writer)
    stops = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    old_handlers = {number: signal.signal(number, lambda *_: None) for number in stops}
    try:
        yield reader
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_fd)
        os.close(reader)
        os.close(writer)


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Ours, which must find this package wherever the server was started from; what the operator has set wins."""
    package_root = str(Path(sglang_hicache.__file__).resolve().parents[1])
    inherited = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(filter(None, (package_root, inherited)))
    return {**extra, **os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
