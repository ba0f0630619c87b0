"""Wiring of the tokenizer process: sockets to the ranks, the HTTP server, start and stop in order.

`main` is called by the process edge on the main thread and runs one uvloop event loop, on which everything of
this room happens.  Order at start: listen (probes get 503), wait until every rank answers, attach the storage
through the same desk as an operator would, then serve.  Order at SIGTERM: refuse new requests, let those in
flight end, flush and detach the storage, tell the leader to leave, stop listening.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import socket
from collections.abc import Awaitable, Iterator

import uvicorn
import uvloop

from sglang_hicache.audit import AuditLog
from sglang_hicache.child import Child
from sglang_hicache.config import HttpConfig, ServerConfig
from sglang_hicache.errors import UserError
from sglang_hicache.sockets import Pull, Push, ipc_address
from sglang_hicache.tokenizer.control import Control
from sglang_hicache.tokenizer.http import build_app
from sglang_hicache.tokenizer.http_limits import BoundedProtocol
from sglang_hicache.tokenizer.intake import Intake
from sglang_hicache.tokenizer.manager import RequestManager
from sglang_hicache.tokenizer.operations import State
from sglang_hicache.tokenizer.ranks_desk import RanksDesk, new_id
from sglang_hicache.tokenizer.services import Lifecycle, Phase, Services
from sglang_hicache.tokenizer.startup import CannotStart, Startup, attach_at_start, startup_blocking
from sglang_hicache.tokenizer.state_file import StateFile
from sglang_hicache.tokenizer.text import TextCodec
from sglang_hicache.tokenizer.trail import Trail
from sglang_hicache.wire import CommandAnswer, DetachStorage, FromRank, OutputBatch, StatusAnswer, StorageNews, ToRank

log = logging.getLogger(__name__)

#: Exit code of a server that could not start (a storage that does not attach, a port that is taken).
EXIT_CANNOT_START = 3

#: Exit code when clients were cut off because the rest of the server is failing.
EXIT_CUT_OFF = 1

#: Connections that may wait to be accepted; a burst of clients is longer than the usual 128.
LISTEN_BACKLOG = 2048

#: How long a connection that is still open after the drain may take to end.  Its answer is complete by then.
CLOSE_TIMEOUT_S = 2

CUT_OFF = "the server was stopped before the request had finished; send it again"


class RankSockets:
    """The sockets between this process and the ranks."""

    def __init__(self, config: ServerConfig) -> None:
        self._inbox = Pull(ipc_address(config.run_dir, "from_ranks"), FromRank, bind=True)
        self.to_ranks = [
            Push(ipc_address(config.run_dir, f"to_rank_{rank}"), ToRank, bind=False) for rank in range(config.tp_size)
        ]

    def listen(self, requests: RequestManager, desk: RanksDesk, control: Control) -> None:
        """Route what arrives, from now on, on the running event loop."""
        drain = functools.partial(self._drain, requests, desk, control)
        asyncio.get_running_loop().add_reader(self._inbox.fd, drain)
        # The descriptor is edge triggered: what came before the line above will not announce itself again.
        drain()

    def close(self) -> None:
        """Stop listening and let the last messages leave."""
        asyncio.get_running_loop().remove_reader(self._inbox.fd)
        self._inbox.close()
        for port in self.to_ranks:
            port.close()

    def _drain(self, requests: RequestManager, desk: RanksDesk, control: Control) -> None:
        messages = self._inbox.receive_all()
        if messages:
            requests.heard()
        for message in messages:
            match message:
                case OutputBatch():
                    requests.deliver(message)
                case CommandAnswer() | StatusAnswer():
                    desk.deliver(message)
                case StorageNews():
                    control.news(message)


class StopSignals:
    """SIGTERM once: stop in order.  Twice: whatever the drain waits for will not come (a rank is gone)."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()

    def received(self) -> None:
        """A SIGTERM."""
        (self.hurry if self.stop.is_set() else self.stop).set()


class HttpServer(uvicorn.Server):
    """uvicorn, without its own idea of signals: this process stops in its own order."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the handlers alone."""
        yield


def main(child: Child) -> int:
    """Run the tokenizer process; its exit code."""
    return uvloop.run(_run(child))


async def _run(child: Child) -> int:
    # Before anything else: a SIGTERM during the start must end the start, not the process halfway.
    stop = StopSignals()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.received)
    config = child.config
    sockets = RankSockets(config)
    control: Control | None = None
    try:
        codec = TextCodec(config.model)
        requests = RequestManager(sockets.to_ranks[0], codec.tokenizer_path)
        desk = RanksDesk(sockets.to_ranks)
        lifecycle = Lifecycle(lambda: child.heartbeat.state)
        control, startup = open_control(config, desk)
        services = Services(config, codec, Intake(config, codec), requests, desk, control, startup, lifecycle)
        sockets.listen(requests, desk, control)
        return await _serve(child, services, stop)
    except (CannotStart, UserError) as error:
        log.error("cannot start: %s", error)
        child.failed(str(error))
        return EXIT_CANNOT_START
    finally:
        if control is not None:
            await control.close()
        sockets.close()


def open_control(config: ServerConfig, desk: RanksDesk) -> tuple[Control, Startup]:
    """What is kept on disk of changes: opened before the first of them."""
    startup = startup_blocking(config)
    audit = AuditLog(config.http.audit_log) if config.http.audit_log else None
    trail = Trail(audit, config)
    if audit is not None:
        log.info("audit log %s, head %s", config.http.audit_log, audit.head)
        wanted = startup.told
        trail.started(**{name: wanted[name] for name in ("source", "backend", "extra_config", "warning")})
    state_file = StateFile(config.storage.state_file, startup.wanted) if config.storage.state_file else None
    return Control(desk, trail, state_file), startup


async def _serve(child: Child, services: Services, signals: StopSignals) -> int:
    config = services.config
    listener = open_listener(config.http)
    port = listener.getsockname()[1]
    server = HttpServer(_uvicorn_config(config.http, services))
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        stop = signals.stop
        are_ready = await _before(stop, services.desk.wait_ready())
        if are_ready and await _before(stop, attach_at_start(services.control, services.startup)):
            services.lifecycle.phase = Phase.SERVING
            child.ready(str(port))
            log.info("listening on %s:%d", config.http.host, port)
            if await _before(stop, asyncio.shield(serving)):
                raise CannotStart("the HTTP server ended by itself; its log lines above say why")
        return await stop_in_order(services, signals.hurry)
    finally:
        server.should_exit = True
        await serving
        listener.close()


async def stop_in_order(services: Services, hurry: asyncio.Event) -> int:
    """Drain, unless the server is failing or told twice: then the clients only get to know.  The exit code."""
    services.lifecycle.phase = Phase.DRAINING
    if not services.lifecycle.is_failing and await _before(hurry, drain(services)):
        return 0
    log.error("stopping without a drain: %d requests are cut off", services.requests.in_flight)
    services.requests.abort_all(CUT_OFF, status_code=503)
    return EXIT_CUT_OFF


async def drain(services: Services) -> None:
    """From "no new requests" to "the leader has been told to leave"."""
    log.info("stopping: %d requests in flight", services.requests.in_flight)
    await services.control.give_up_dry_runs()
    try:
        await asyncio.wait_for(services.requests.wait_idle(), services.config.http.drain_timeout_s)
    except TimeoutError:
        log.warning("%d requests did not finish in time and are aborted", services.requests.in_flight)
        services.requests.abort_all(CUT_OFF, status_code=503)
    if services.config.cache.hierarchical:
        # As long for queued backups to be written as for the drain that follows.
        flush_timeout_s = services.config.storage.drain_timeout_s
        deadline_s = flush_timeout_s + services.config.storage.drain_timeout_s
        detach = await services.control.run(
            DetachStorage(id=new_id(), deadline_s=deadline_s, flush_timeout_s=flush_timeout_s)
        )
        if detach.state is not State.SUCCEEDED:
            log.warning("the storage was not detached cleanly: %s", detach.message)
    services.desk.shutdown()


def open_listener(http: HttpConfig) -> socket.socket:
    """The listening socket.  Opened here, not by uvicorn, so that port 0 and a taken port are ours to tell."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            http.host, http.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise CannotStart(f"cannot listen on {http.host}:{http.port}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(LISTEN_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise CannotStart(f"cannot listen on {http.host}:{http.port}: {error}; choose another --port") from error
    return listener


def _uvicorn_config(http: HttpConfig, services: Services) -> uvicorn.Config:
    config = uvicorn.Config(
        build_app(services),
        loop="none",
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=LISTEN_BACKLOG,
        timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        ssl_certfile=http.ssl_certfile or None,
        ssl_keyfile=http.ssl_keyfile or None,
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise CannotStart(f"cannot use --ssl-certfile {http.ssl_certfile!r} and --ssl-keyfile: {error}") from error
    return config


async def _before(stop: asyncio.Event, work: Awaitable[None]) -> bool:
    """Do `work` unless told to stop first; whether it was done.  Its error is raised."""
    task = asyncio.ensure_future(work)
    waiter = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((task, waiter), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        task.cancel()
        waiter.cancel()
        await asyncio.gather(task, waiter, return_exceptions=True)
