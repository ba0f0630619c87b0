"""Wiring of one rank: model, pools, core, sockets, loop; and taking it all apart again.

`main` is called by the process edge on the main thread, which is the only one that this room uses: storage processes
must be started from it (the kernel ties their life to the thread that started them).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal

from sglang_hicache import wire
from sglang_hicache.cache.pools import HostPool
from sglang_hicache.child import Child
from sglang_hicache.collector import settle_collector
from sglang_hicache.config import ServerConfig
from sglang_hicache.scheduler.core import SchedulerCore
from sglang_hicache.scheduler.loop import TickLoop
from sglang_hicache.scheduler.mailbox import FollowerMailbox, LeaderMailbox
from sglang_hicache.scheduler.probes import Probes
from sglang_hicache.scheduler.stop_text import StopWatch
from sglang_hicache.scheduler.storage_driver import StorageDriver
from sglang_hicache.scheduler.storage_launcher import StorageLauncher
from sglang_hicache.scheduler.weights_driver import WeightsDriver
from sglang_hicache.sockets import Poller, Pull, Push, ipc_address
from sglang_hicache.workers.batch import KVLayout, Worker

log = logging.getLogger(__name__)

#: Touching a large pool takes seconds per GiB on some machines; this often the log says how far it has come.
PREFAULT_LOG_BYTES = 4 << 30


def main(child: Child) -> int:
    """Run one rank until a plan says to stop; the exit code."""
    # Ranks leave when the leader's plan says so: a SIGTERM to the whole group must not cut the drain short.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    config, rank = child.config, child.rank
    with contextlib.ExitStack() as stack:
        worker = load_worker_blocking(config, rank)
        host = make_host_pool(config, worker.layout)
        if host is not None:
            stack.enter_context(host)
        stack.callback(worker.close)  # before the pool is: what the worker maps is a view of it
        worker.allocate(config.pool.device_tokens // config.pool.page_size + 1, host)
        loop = wire_up(child, worker, host, stack)
        # The model's modules and the tree live as long as the rank: a collector that walks them stops every request.
        settle_collector()
        child.ready()
        loop.run_blocking()
    log.info("left")
    return 0


def load_worker_blocking(config: ServerConfig, rank: int) -> Worker:
    """The model of this rank."""
    from sglang_hicache.workers.model_worker import (
        ModelWorker,
    )  # lazy door: torch takes seconds, and the parent may die

    worker = ModelWorker(config.model, rank, config.tp_size, os.path.join(config.run_dir, "rendezvous"))
    worker.load_blocking(config.pool.page_size)
    return worker


def make_host_pool(config: ServerConfig, layout: KVLayout) -> HostPool | None:
    """The host pool with all its memory, or None without hierarchical cache."""
    if not config.cache.hierarchical:
        return None
    pool = HostPool(config.pool.host_tokens // config.pool.page_size, layout.page_bytes)
    told = 0

    def progress(done_bytes: int, total_bytes: int) -> None:
        nonlocal told
        if done_bytes - told >= PREFAULT_LOG_BYTES:
            told = done_bytes
            log.info("host pool: %.1f of %.1f GiB", done_bytes / 2**30, total_bytes / 2**30)

    pool.prefault(progress)
    return pool


def wire_up(child: Child, worker: Worker, host: HostPool | None, stack: contextlib.ExitStack) -> TickLoop:
    """Core, driver and sockets of one rank; `stack` gives them back."""
    config, rank, run_dir = child.config, child.rank, child.config.run_dir
    core = SchedulerCore(config, rank, StopWatch.maker(config.model.tokenizer_path))
    poller = Poller()
    launcher = StorageLauncher(config, rank, worker.layout, host)
    driver = StorageDriver(launcher, poller)
    stack.callback(driver.close)
    probes = Probes(launcher.dry_run, poller)
    stack.callback(probes.close)
    if rank == 0:
        mailbox: LeaderMailbox | FollowerMailbox = LeaderMailbox(config, core, poller)
    else:
        mailbox = FollowerMailbox(config, rank, core, poller)
    stack.callback(mailbox.close)
    inbox = Pull(ipc_address(run_dir, f"to_rank_{rank}"), wire.ToRank, bind=True)
    stack.callback(inbox.close)
    to_tokenizer = Push(ipc_address(run_dir, "from_ranks"), wire.FromRank, bind=False)
    stack.callback(to_tokenizer.close)
    weights = WeightsDriver(worker, driver, launcher)
    return TickLoop(rank, core, worker, driver, probes, weights, mailbox, inbox, to_tokenizer, poller, child.heartbeat)
