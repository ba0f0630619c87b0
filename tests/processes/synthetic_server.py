"""One synthetic rank in a process of its own, and the test in the place of launcher and tokenizer."""

from __future__ import annotations

import itertools
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from sglang_hicache import wire
from sglang_hicache.child import Orders
from sglang_hicache.config import LogConfig, StorageConfig
from sglang_hicache.heartbeat import Heartbeat
from sglang_hicache.sockets import Poller, Pull, Push, ipc_address
from sglang_hicache.workers.synthetic import SyntheticWorker
from tests.processes.server import ROOT
from tests.ranks.world import PAGE, server_config

#: Upper bound of every wait: reached only when a test fails.
PATIENCE_S = 60.0


class SyntheticServer:
    """Started by the constructor, ready when it returns; `with` kills what is left."""

    def __init__(self, folder: Path, config: dict[str, Any], *, device_pages: int = 200, host_pages: int = 400) -> None:
        folder.mkdir(mode=0o700, parents=True)
        self._run_dir = folder / "run"
        self._run_dir.mkdir(mode=0o700)
        self._extra_config = msgspec.json.encode(config).decode()
        self._log = folder / "log"
        self._ids = itertools.count(1)
        self._config = msgspec.structs.replace(
            server_config(1, device_pages, host_pages, prefetch_policy="wait_complete"),
            run_dir=str(self._run_dir), log=LogConfig(level="warning"),
            storage=StorageConfig(lookup_timeout_s=PATIENCE_S, op_timeout_s=PATIENCE_S),
        )  # fmt: skip
        self.model = SyntheticWorker()
        self.model.load_blocking(PAGE)
        self._heartbeat = Heartbeat.create(1)
        self._from_rank = Pull(ipc_address(str(self._run_dir), "from_ranks"), wire.FromRank, bind=True)
        self._to_rank = Push(ipc_address(str(self._run_dir), "to_rank_0"), wire.ToRank)
        self._channel = -1
        self._unread: list[wire.CommandAnswer | wire.StatusAnswer] = []
        self.news: list[wire.StorageNews] = []
        #: Tokens of every request so far, and how many of its prompt came from storage.
        self.tokens: dict[str, list[int]] = {}
        self.from_storage: dict[str, int] = {}
        self.ended: set[str] = set()
        self.process = self._start_blocking()
        self.pidfd = os.pidfd_open(self.process.pid)
        self._poller = Poller()
        for thing in (self._from_rank, self.pidfd):
            self._poller.register(thing)
        self._expect_ready_blocking()

    def __enter__(self) -> SyntheticServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._channel)
        os.close(self.pidfd)
        self._from_rank.close()
        self._to_rank.close()
        self._heartbeat.close()

    def _start_blocking(self) -> subprocess.Popen[bytes]:
        self._channel, channel = os.pipe()
        orders = Orders(
            config=self._config, rank=0, parent_pid=os.getpid(), channel_fd=channel, heartbeat_fd=self._heartbeat.fd
        )
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.processes.synthetic_rank"], cwd=ROOT, stdin=subprocess.PIPE, stderr=log,
                pass_fds=(channel, self._heartbeat.fd),
            )  # fmt: skip
        os.close(channel)
        assert process.stdin is not None
        process.stdin.write(msgspec.msgpack.encode(orders))
        process.stdin.close()
        return process

    def _expect_ready_blocking(self) -> None:
        assert select.select([self._channel], [], [], PATIENCE_S)[0], f"not ready: {self.log()}"
        line = os.read(self._channel, 4096)
        assert line.startswith(b"ready"), (line, self.log())

    def log(self) -> str:
        """What the rank and its storage processes have said."""
        return self._log.read_text()

    # ----------------------------------------------------------------------------------------- messages

    def _send(self, message: wire.ToRank) -> None:
        assert self._to_rank.send(message)

    def _hear_blocking(self, timeout_s: float) -> None:
        """Wait for messages, or the end of the rank, and take in what has come."""
        self._poller.wait(int(timeout_s * 1000))
        for message in self._from_rank.receive_all():
            if isinstance(message, wire.OutputBatch):
                for output in message.outputs:
                    self._take(output)
            elif isinstance(message, wire.StorageNews):
                self.news.append(message)
            else:
                self._unread.append(message)

    def _take(self, output: wire.RequestOutput) -> None:
        self.tokens[output.rid] += output.token_ids
        if output.finish is not None:
            assert output.finish.type == "length", output
            self.from_storage[output.rid] = output.cached.storage
            self.ended.add(output.rid)

    def wait_until(self, holds: Callable[[], bool], what: str) -> None:
        """Hear messages until something holds; the rank must live that long."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert self.process.poll() is None, f"the rank died before: {what}\n{self.log()}"
            assert time.monotonic() < deadline, f"never: {what}\n{self.log()}"
            self._hear_blocking(0.1)

    def _answer(self, message: wire.ToRank) -> Any:
        """Send something that is answered, and wait for the answer."""
        self._send(message)
        found: list[wire.CommandAnswer | wire.StatusAnswer] = []

        def is_there() -> bool:
            found.extend(said for said in self._unread if said.id == message.id)
            return bool(found)

        self.wait_until(is_there, f"an answer to {message}")
        self._unread.clear()
        return found[0]

    def _new_id(self) -> str:
        return f"m{next(self._ids)}"

    # --------------------------------------------------------------------------------------------- work

    def submit(self, prompt: list[int], max_new_tokens: int = 4) -> str:
        """Send a request; its id."""
        rid = self._new_id()
        self.tokens[rid] = []
        sampling = wire.SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, ignore_eos=True)
        self._send(wire.NewRequest(rid=rid, token_ids=prompt, sampling=sampling))
        return rid

    def finish(self, rids: list[str]) -> None:
        """Wait until these requests have ended."""
        self.wait_until(lambda: self.ended.issuperset(rids), "all requests end")

    def ask(self, prompts: list[list[int]]) -> int:
        """All at once; every text must be the model's.  Tokens that came from storage."""
        rids = [self.submit(prompt) for prompt in prompts]
        self.finish(rids)
        for rid, prompt in zip(rids, prompts):
            assert self.tokens[rid] == self.model.reference(prompt, 4), self.log()
        return sum(self.from_storage[rid] for rid in rids)

    def status(self) -> wire.StatusAnswer:
        """The rank's status."""
        return self._answer(wire.QueryStatus(id=self._new_id()))

    def wait_for_status(self, holds: Callable[[wire.StatusAnswer], bool], what: str) -> wire.StatusAnswer:
        """Ask until the status says so."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds(status := self.status()):
            assert time.monotonic() < deadline, f"never: {what}; {status}"
            self._hear_blocking(0.002)
        return status

    def quiesce(self) -> None:
        """Until nothing is on its way to storage or between the tiers."""
        self.wait_for_status(_is_at_rest, "at rest")

    def attach(self) -> None:
        """Attach the file store."""
        answer = self.try_to_attach("file")
        assert answer.success, (answer.message, self.log())

    def try_to_attach(self, backend: str, *, keeps_trying: bool = False) -> wire.CommandAnswer:
        """Attach a store with the config that the server was made for."""
        self.quiesce()
        return self._answer(wire.AttachStorage(
            id=self._new_id(), deadline_s=PATIENCE_S, backend=backend, extra_config_json=self._extra_config,
            keeps_trying=keeps_trying,
        ))

    def detach(self) -> None:
        """Take the storage out."""
        answer = self._answer(wire.DetachStorage(id=self._new_id(), deadline_s=PATIENCE_S, mode="drain"))
        assert answer.success, (answer.message, self.log())

    def flush(self) -> None:
        """Empty device and host."""
        answer = self._answer(wire.FlushCache(id=self._new_id(), deadline_s=PATIENCE_S, timeout_s=PATIENCE_S))
        assert answer.success, answer.message

    # -------------------------------------------------------------------------------------------- death

    def storage_pids(self) -> list[int]:
        """Storage processes of this rank."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]

    def kill_after(self, outputs: int, delay_s: float, victims: list[int]) -> None:
        """kill -9 once so many tokens have come since now, and a moment later; waits for the ends."""
        wanted = sum(map(len, self.tokens.values())) + outputs
        self.wait_until(lambda: sum(map(len, self.tokens.values())) >= wanted, "enough tokens to kill somebody")
        watched = [os.pidfd_open(pid) for pid in victims]
        select.select(watched, [], [], delay_s)  # nobody ends by itself: the moment is all that it chooses
        for fd in watched:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        for fd in watched:
            assert select.select([fd], [], [], PATIENCE_S)[0], "a killed process lives on"
            os.close(fd)


def _is_at_rest(status: wire.StatusAnswer) -> bool:
    load = status.load
    busy = (status.queued_backups, *status.in_flight.values(), load["queue-req"], load["running-req"], load["copy-ops"])
    return not any(busy)
