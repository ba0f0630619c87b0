"""Real storage processes: what they do for a rank, and what they cannot do to it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache import wire
from sglang_hicache.errors import UserError
from sglang_hicache.storage import registry
from sglang_hicache.storage.faulty import Gate
from sglang_hicache.workers.storage_client import StorageClient
from tests.processes.storage_world import HOST_PAGES, NAMESPACE, PAGE_BYTES, PATIENCE_S, Rank, keys

Start = Callable[..., Rank]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def start(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts storage processes and takes them down after the test."""
    monkeypatch.setenv(registry.ALLOW_FAULTY_ENV, "1")
    ranks: list[Rank] = []

    def start_one(backend: str = "memory", config: dict[str, Any] | None = None, **changes: Any) -> Rank:
        ranks.append(Rank(run_dir, backend, config or {}, **changes))
        return ranks[-1]

    yield start_one
    for rank in ranks:
        rank.close()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    folder = tmp_path / "gate"
    folder.mkdir()
    made = Gate(folder)
    yield made
    made.close()


def _faulty(call: str, kind: str, **fault: Any) -> dict[str, Any]:
    return {"inner": "memory", "faults": {call: {"kind": kind, **fault}}}


def _started(start: Start, *args: Any, **kwargs: Any) -> Rank:
    rank = start(*args, **kwargs)
    rank.opened()
    return rank


class TestWork:
    def test_pages_go_out_and_come_back_in_place(self, start: Start, tmp_path: Path) -> None:
        rank = start("file", {"file_storage_path": str(tmp_path / "store")})
        # The rest tells how much the store may hold, which is known once its pages are counted.
        assert rank.opened().info.items() >= {"path": str(tmp_path / "store"), "fsync": "none"}.items()
        rank.write(1, 20)
        assert rank.end_of(1) == wire.OpProgress(op_id=1, pages=20, settled=True, closed=True)
        rank.send(wire.LookupPages(op_id=2, keys=keys(30)))
        assert rank.end_of(2).pages == 20
        rank.read(3, 20)
        assert rank.end_of(3).pages == 20 and rank.took_us > 0, "the rank learns how fast its store is"
        assert rank.pool.buffer[128 * PAGE_BYTES : 148 * PAGE_BYTES] == rank.pool.buffer[: 20 * PAGE_BYTES]

    def test_pages_survive_the_process(self, start: Start, tmp_path: Path) -> None:
        config = {"file_storage_path": str(tmp_path / "store")}
        first = _started(start, "file", config)
        first.write(1, 5)
        first.end_of(1)
        first.client.stop()
        assert first.exit_status() == 0
        second = _started(start, "file", config, epoch=2)
        second.read(1, 5)
        assert second.end_of(1).pages == 5

    def test_fm31_another_model_in_the_same_folder_has_no_hits(self, start: Start, tmp_path: Path) -> None:
        config = {"file_storage_path": str(tmp_path / "store")}
        one = _started(start, "file", config)
        one.write(1, 5)
        assert one.end_of(1).pages == 5
        other = _started(start, "file", config, namespace="77" * 32, epoch=2)
        other.send(wire.LookupPages(op_id=1, keys=keys(5)))
        assert other.end_of(1).pages == 0
        other.read(2, 5)
        assert other.end_of(2) == wire.OpProgress(op_id=2, pages=0, settled=True, closed=True, reason="miss")

    def test_progress_only_grows_and_counts_whole_pages(self, start: Start) -> None:
        rank = _started(start, "memory", page_bytes=PAGE_BYTES)
        rank.write(1, HOST_PAGES)
        rank.end_of(1)
        rank.read(2, 200, host_page=0)
        rank.end_of(2)
        for op_id, total in ((1, HOST_PAGES), (2, 200)):
            reports = [message for message in rank.heard if isinstance(message, wire.OpProgress)]
            counts = [report.pages for report in reports if report.op_id == op_id]
            assert counts == sorted(counts)
            assert counts[-1] == total
            assert len(counts) > 1

    def test_rank_that_does_not_own_the_heads_settles_without_writing(self, start: Start) -> None:
        rank = _started(start, writes=False)
        rank.write(1, 5)
        assert rank.end_of(1).pages == 5
        rank.send(wire.LookupPages(op_id=2, keys=keys(5)))
        assert rank.end_of(2).pages == 0

    def test_clear_takes_everything_of_ours(self, start: Start) -> None:
        rank = _started(start)
        rank.write(1, 5)
        rank.end_of(1)
        rank.send(wire.ClearPages(command_id="c1"))
        assert rank.next_message() == wire.ClearDone(command_id="c1")
        rank.send(wire.LookupPages(op_id=2, keys=keys(5)))
        assert rank.end_of(2).pages == 0

    def test_clear_that_fails_says_so(self, start: Start) -> None:
        rank = _started(start, "faulty", _faulty("clear", "error"))
        rank.send(wire.ClearPages(command_id="c1"))
        assert rank.next_message() == wire.ClearDone(command_id="c1", reason="io: sabotaged clear")


class TestFaults:
    @pytest.mark.parametrize("kind", ["exception", "none", "wrong_type"])
    def test_fm09_failed_op_is_reported_and_the_next_one_is_served(self, start: Start, kind: str) -> None:
        # Call 0 is the self-test's.
        rank = _started(start, "faulty", _faulty("write", kind, first=2, count=1))
        for op_id in (1, 2, 3):
            rank.write(op_id, 1, first=op_id)
        assert [rank.end_of(op_id).pages for op_id in (1, 2, 3)] == [1, 0, 1]
        failed = next(message for message in rank.heard if isinstance(message, wire.OpProgress) and message.op_id == 2)
        assert failed.reason.startswith("defect: SabotageError" if kind == "exception" else "contract: ")

    @pytest.mark.parametrize("call", ["read", "exists"])
    @pytest.mark.parametrize("kind", ["exception", "none", "wrong_type"])
    def test_fm11_prefetch_lane_survives_any_answer(self, start: Start, call: str, kind: str) -> None:
        # The self-test reads once and looks up three times.
        first = 1 if call == "read" else 3
        rank = _started(start, "faulty", _faulty(call, kind, first=first, count=1))
        rank.write(1, 3)
        rank.end_of(1)
        for op_id in (2, 3):
            if call == "read":
                rank.read(op_id, 3)
            else:
                rank.send(wire.LookupPages(op_id=op_id, keys=keys(3)))
        assert [rank.end_of(op_id).pages for op_id in (2, 3)] == [0, 3]

    def test_fm10_truncated_page_costs_one_page_and_nothing_else(self, start: Start, tmp_path: Path) -> None:
        rank = _started(start, "file", {"file_storage_path": str(tmp_path / "store")})
        rank.write(1, 4)
        rank.end_of(1)
        path = sorted((tmp_path / "store").glob("*/*/*.page"))[2]
        os.truncate(path, 100)
        rank.read(2, 4)
        ended = rank.end_of(2)
        assert (ended.pages, ended.corrupt) == (2, 1)
        assert not path.exists()
        rank.read(3, 2)
        assert rank.end_of(3).pages == 2

    def test_op_outside_the_pool_touches_nothing(self, start: Start) -> None:
        rank = _started(start)
        rank.read(1, 3, host_page=HOST_PAGES - 1)
        assert rank.end_of(1).pages == 0
        rank.send(wire.ReadPages(op_id=2, keys=keys(3), host_pages=[1]))
        assert rank.end_of(2).reason == "op 2 has 3 keys for 1 host pages"

    def test_full_line_refuses_at_once(self, start: Start, gate: Gate) -> None:
        rank = _started(start, "faulty", _faulty("write", "hold", first=1, count=1, gate=str(gate.folder)))
        rank.write(0, 1)
        gate.wait_inside_blocking()
        limit = 4096
        for op_id in range(1, limit + 1):
            while not rank.client.send(wire.WritePages(op_id=op_id, keys=[], host_pages=[], parent=b"", depth=0)):
                rank.client.receive()
        assert rank.end_of(limit) == wire.OpProgress(
            op_id=limit, pages=0, settled=True, closed=True, reason="queue_full"
        )
        gate.go()
        assert rank.end_of(limit - 1).reason == ""

    @pytest.mark.parametrize("call", ["open", "write", "delete"])
    def test_fm43_backend_that_fails_its_test_is_not_attached(self, start: Start, call: str) -> None:
        rank = start("faulty", _faulty(call, "error"))
        message = rank.next_message()
        assert isinstance(message, wire.BackendOpenFailed)
        assert f"sabotaged {call}" in message.reason
        assert rank.exit_status() == 1

    def test_defect_while_opening_is_an_answer_too(self, start: Start) -> None:
        rank = start("faulty", _faulty("open", "exception"))
        assert rank.next_message().reason.startswith("other: SabotageError: sabotaged open (faulty store); ")

    def test_unsafe_folder_is_an_answer(self, start: Start, tmp_path: Path) -> None:
        (tmp_path / "store").mkdir()
        (tmp_path / "store").chmod(0o777)
        rank = start("file", {"file_storage_path": str(tmp_path / "store")})
        assert "can be written by others" in rank.next_message().reason


class TestRevoke:
    def test_running_op_ends_after_its_batch_with_what_is_whole(self, start: Start, gate: Gate) -> None:
        # The first write is the self-test's, the second the first batch of op 1.
        rank = _started(start, "faulty", _faulty("write", "hold", first=1, count=1, gate=str(gate.folder)))
        rank.write(1, 200)
        gate.wait_inside_blocking()
        rank.send(wire.RevokeOp(op_id=1))
        rank.write(2, 1, first=300)
        rank.send(wire.LookupPages(op_id=3, keys=keys(1)))
        assert rank.end_of(3).pages == 0
        gate.go()
        ended = rank.end_of(1)
        assert (ended.pages, ended.reason) == (128, "revoked")
        assert rank.end_of(2).pages == 1

    def test_waiting_op_ends_at_once_while_the_lane_hangs(self, start: Start, gate: Gate) -> None:
        rank = _started(start, "faulty", _faulty("read", "hold", first=1, gate=str(gate.folder)))
        rank.read(1, 3)
        gate.wait_inside_blocking()
        rank.read(2, 3)
        rank.send(wire.RevokeOp(op_id=2))
        assert rank.end_of(2) == wire.OpProgress(op_id=2, pages=0, settled=True, closed=True, reason="revoked")

    def test_revoke_of_an_op_that_is_over_is_harmless(self, start: Start) -> None:
        rank = _started(start)
        rank.write(1, 1)
        rank.end_of(1)
        rank.send(wire.RevokeOp(op_id=1))
        rank.write(2, 1)
        assert rank.end_of(2).pages == 1

    def test_lookup_passes_a_long_read_between_two_batches(self, start: Start, gate: Gate) -> None:
        rank = _started(start, "faulty", _faulty("read", "hold", first=1, count=1, gate=str(gate.folder)))
        rank.write(1, 256)
        rank.end_of(1)
        rank.read(2, 256, host_page=0)
        gate.wait_inside_blocking()
        rank.send(wire.LookupPages(op_id=3, keys=keys(256)))
        _all_handled(rank)
        gate.go()
        rank.end_of(2)
        order = [message.op_id for message in rank.heard if isinstance(message, wire.OpProgress) and message.settled]
        assert order[-2:] == [3, 2]

    def test_fm12_fm23_nothing_is_written_behind_a_closed_op(self, start: Start, gate: Gate) -> None:
        rank = _started(start, "faulty", _faulty("read", "hold", first=1, count=1, gate=str(gate.folder)))
        rank.write(1, 200, host_page=0)
        rank.end_of(1)
        rank.read(2, 200, host_page=0)
        gate.wait_inside_blocking()
        rank.send(wire.RevokeOp(op_id=2))
        _all_handled(rank)
        gate.go()
        assert rank.end_of(2).pages == 128
        poison = b"\xee" * (HOST_PAGES * PAGE_BYTES)
        rank.pool.buffer[:] = poison
        rank.read(3, 1, host_page=255)
        rank.end_of(3)
        assert rank.pool.buffer[: 255 * PAGE_BYTES] == poison[: 255 * PAGE_BYTES]

    def test_fm39b_pages_are_whole_when_they_are_counted(self, start: Start) -> None:
        rank = _started(start)
        rank.write(1, 200, host_page=0)
        rank.end_of(1)
        source = bytes(rank.pool.buffer[: 200 * PAGE_BYTES])
        rank.pool.buffer[:] = bytes(HOST_PAGES * PAGE_BYTES)
        rank.read(2, 200, host_page=0)
        while True:
            report = rank.next_message(lambda message: isinstance(message, wire.OpProgress))
            end = report.pages * PAGE_BYTES
            assert rank.pool.buffer[:end] == source[:end]
            if report.closed:
                return


class TestEnd:
    def test_stop_finishes_what_runs_and_exits_in_order(self, start: Start, gate: Gate, tmp_path: Path) -> None:
        config = {
            "inner": "file",
            "inner_config": {"file_storage_path": str(tmp_path / "store")},
            "faults": {"write": {"kind": "hold", "first": 1, "count": 1, "gate": str(gate.folder)}},
        }
        rank = _started(start, "faulty", config)
        rank.write(1, 3)
        gate.wait_inside_blocking()
        rank.write(2, 3, first=10)
        rank.client.stop()
        assert rank.end_of(2).reason == "revoked"  # the stop has arrived; before that, the lane would go on with op 2
        gate.go()
        assert rank.exit_status() == 0
        ends = {message.op_id: message for message in rank.heard if isinstance(message, wire.OpProgress)}
        assert (ends[1].pages, ends[1].closed) == (3, True)
        assert (ends[2].pages, ends[2].closed, ends[2].reason) == (0, True, "revoked")
        assert list((tmp_path / "store" / "tmp").iterdir()) == []

    def test_stop_while_opening(self, start: Start, gate: Gate) -> None:
        rank = start("faulty", _faulty("open", "hold", gate=str(gate.folder)))
        gate.wait_inside_blocking()
        rank.client.stop()
        gate.go()
        assert rank.exit_status() == 0

    def test_fm13_hung_backend_is_killed_whatever_it_does(self, start: Start, gate: Gate) -> None:
        rank = _started(start, "faulty", _faulty("read", "hold", first=1, gate=str(gate.folder)))
        rank.read(1, 3)
        gate.wait_inside_blocking()
        rank.client.stop()
        assert not rank.client.exited()
        rank.client.kill()
        assert rank.exit_status() == -signal.SIGKILL

    def test_death_is_seen_without_a_message(self, start: Start) -> None:
        rank = _started(start, "faulty", _faulty("write", "crash", first=1))
        rank.write(1, 1)
        assert rank.exit_status() == -signal.SIGKILL
        assert not [message for message in rank.heard if isinstance(message, wire.OpProgress)]

    def test_fm12_attachments_leave_no_thread_or_descriptor(self, start: Start) -> None:
        """Each is a process of its own; what is counted is this process, the rank.

        One descriptor left behind by each attachment would make as many as there were; fewer are allowed, because a
        socket's descriptors are closed by a thread of the socket library, some time after `close`.
        """

        def attach_and_detach(epoch: int) -> None:
            rank = _started(start, epoch=epoch)
            rank.client.stop()
            assert rank.exit_status() == 0
            rank.close()

        attachments = 20
        attach_and_detach(1)  # makes what stays for good: the context of the sockets
        before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        for epoch in range(2, 2 + attachments):
            attach_and_detach(epoch)
        assert len(os.listdir("/proc/self/fd")) < before + attachments
        assert threading.active_count() <= threads

    def test_rank_that_dies_takes_the_storage_process_with_it(self, run_dir: Path) -> None:
        script = (
            "import sys, time; from pathlib import Path\n"
            "from tests.processes.storage_world import Rank\n"
            f"rank = Rank(Path({str(run_dir)!r}), 'memory', {{}}); rank.opened()\n"
            "print(rank.client.pid, flush=True); sys.stdin.read()\n"
        )
        rank = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert rank.stdin is not None and rank.stdout is not None
        pidfd = os.pidfd_open(int(rank.stdout.readline()))
        rank.kill()
        rank.wait()
        try:
            assert _ended_within(pidfd, PATIENCE_S)
        finally:
            os.close(pidfd)
            rank.stdin.close()
            rank.stdout.close()

    def test_ps_shows_role_and_rank(self, start: Start) -> None:
        rank = _started(start)
        command = Path(f"/proc/{rank.client.pid}/cmdline").read_bytes().split(b"\0")
        assert command[1:-1] == [b"-m", b"sglang_hicache.workers.storage_process", b"rank", b"1", b"memory"]
        assert os.getpgid(rank.client.pid) == rank.client.pid

    def test_secrets_are_in_neither_argv_nor_environment(self, start: Start) -> None:
        rank = _started(start, "faulty", _faulty("write", "error", first=5, gate="s3cret"))
        for name in ("cmdline", "environ"):
            assert b"s3cret" not in Path(f"/proc/{rank.client.pid}/{name}").read_bytes()

    def test_config_that_does_not_fit_the_pipe_is_refused(self, run_dir: Path) -> None:
        config = wire.OpenBackend(
            rank=0, epoch=1, backend="file", extra_config_json="x" * 70_000, namespace=NAMESPACE, head_start=0,
            head_end=1, writes=True, page_bytes=1, host_pages=1,
        )  # fmt: skip
        with pytest.raises(UserError, match="at most .* fit"):
            StorageClient(config, 0, str(run_dir))

    def test_nothing_heavy_is_imported(self) -> None:
        script = "import sys, sglang_hicache.workers.storage_process as p; print('torch' in sys.modules)"
        assert subprocess.check_output([sys.executable, "-c", script]) == b"False\n"


def _all_handled(rank: Rank) -> None:
    """Return when the process has taken in all that was sent: it reads its messages in order."""
    rank.send(wire.WritePages(op_id=999, keys=[], host_pages=[], parent=b"", depth=0))
    rank.end_of(999)


def _ended_within(pidfd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd)
    return bool(poll.poll(timeout_s * 1000))
