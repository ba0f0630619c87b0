"""Fake tokenizer and ranks, and a launcher of them: run as a script, `launcher_children.py launch SCENARIO RUN_DIR`.

The children use the real edge (`sglang_hicache.child`) and misbehave as the scenario says; the launcher is the real
supervisor with other commands.  Every child prints its pid, so that a test can look for it.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading

from sglang_hicache import child, supervisor
from sglang_hicache.config import (
    CacheConfig,
    HttpConfig,
    ModelConfig,
    PoolConfig,
    SchedulerConfig,
    ServerConfig,
    StorageConfig,
)
from sglang_hicache.errors import UserError
from sglang_hicache.observe import start_logging

SECRET = "fake-admin-key"

CONFIG = ServerConfig(
    model=ModelConfig(path="/m", tokenizer_path="/m", served_name="m", dtype="float32", context_length=64),
    pool=PoolConfig(device_tokens=64),
    cache=CacheConfig(),
    storage=StorageConfig(drain_timeout_s=0.1),
    scheduler=SchedulerConfig(watchdog_timeout_s=1.0),
    http=HttpConfig(admin_api_key=SECRET, drain_timeout_s=0.1),
    tp_size=2,
    run_dir="/nowhere",
)


def announce(name: str) -> None:
    print(f"pid {name}: {os.getpid()}", file=sys.stderr, flush=True)


def wait_for_ever_in_a_function_with_a_name() -> None:
    threading.Event().wait()


def rank(scenario: str, me: child.Child) -> int:
    announce(f"rank {me.rank}")
    is_chosen = me.rank == 1
    if is_chosen and scenario == "refuse":
        raise UserError("model 'x' is not supported; choose another")
    if is_chosen and scenario == "crash-at-start":
        os.kill(os.getpid(), signal.SIGSEGV)
    if scenario == "slow":
        wait_for_ever_in_a_function_with_a_name()
    me.ready()
    if scenario == "stuck":
        me.heartbeat.tick(me.rank, pending=is_chosen, now_us=1)
        wait_for_ever_in_a_function_with_a_name()
    if scenario in ("stopped", "mute"):
        me.heartbeat.tick(me.rank, pending=is_chosen, now_us=1)
        if is_chosen and scenario == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif is_chosen:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        wait_for_ever_in_a_function_with_a_name()
    if is_chosen and scenario == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if is_chosen and scenario == "raise":
        raise RuntimeError(f"broken while serving with {SECRET}")
    if is_chosen and scenario == "leave":
        return 0
    if scenario == "deaf":
        wait_for_ever_in_a_function_with_a_name()
    with open(way_out(me.rank)) as pipe:  # opens when the tokenizer sends the ranks home
        pipe.read()
    return 0


def tokenizer(scenario: str, me: child.Child) -> int:
    announce("tokenizer")
    # Waited for, not handled: a handler that sets an event which this thread is about to wait for takes its lock twice.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    me.ready("30000")
    signal.sigwait({signal.SIGTERM})
    print(f"tokenizer saw {me.heartbeat.state.name}", file=sys.stderr, flush=True)
    if me.heartbeat.state.name == "DRAINING" and scenario != "deaf":
        for number in range(CONFIG.tp_size):
            with open(way_out(number), "w"):
                pass
    return 0


def way_out(number: int) -> str:
    """The pipe at whose end a rank leaves."""
    return os.path.join(os.environ["FAKE_FOLDER"], f"leave.{number}")


def launch(scenario: str, folder: str) -> int:
    os.environ["FAKE_FOLDER"] = tempfile.mkdtemp(dir=folder)
    for number in range(CONFIG.tp_size):
        os.mkfifo(way_out(number))
    supervisor.STOP_MARGIN_S = float(os.environ.get("FAKE_MARGIN_S", "300"))
    supervisor.FAILING_GRACE_S = 30.0  # it ends with the tokenizer, which a busy machine may not run at once
    start_logging("launcher", CONFIG.log, child.secrets_of(CONFIG))
    one = supervisor.Supervisor(CONFIG, {}, lambda name: [sys.executable, __file__, name.split()[0], scenario])
    return one.run_blocking()


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        sys.exit(launch(*sys.argv[2:]))
    behave = rank if sys.argv[1] == "rank" else tokenizer
    child.run("scheduler" if sys.argv[1] == "rank" else "tokenizer", lambda me: behave(sys.argv[2], me))
