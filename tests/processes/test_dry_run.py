"""Dry runs with real processes, and values that differ from node to node."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from sglang_hicache import wire
from sglang_hicache.cache.pools import HostPool
from sglang_hicache.errors import UserError
from sglang_hicache.scheduler.probes import MOST_PROBES, Key, Probes
from sglang_hicache.scheduler.storage_launcher import StorageLauncher, this_node
from sglang_hicache.sockets import Poller
from sglang_hicache.storage import registry
from sglang_hicache.storage.attachment_events import Spawn
from sglang_hicache.storage.placeholders import Node
from sglang_hicache.workers.batch import KVLayout
from tests.processes.server import ADMIN_KEY, Server
from tests.ranks.world import server_config

PATIENCE_S = 60.0

LAYOUT = KVLayout(
    layers=2, page_size=4, kv_heads_local=2, head_dim=64, dtype="float32", head_start=0, head_end=2, kv_heads_total=4,
    writes=True, architecture="{}", numerics_class="fast",
)  # fmt: skip

Launcher = Callable[..., StorageLauncher]


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launcher]:
    """Makes the launcher of a rank on some node."""
    monkeypatch.setenv(registry.ALLOW_FAULTY_ENV, "1")
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)
    pools: list[HostPool] = []

    def make(node: Node | None = None, allowed: tuple[str, ...] = ()) -> StorageLauncher:
        config = server_config(2)
        storage = msgspec.structs.replace(config.storage, config_env=allowed)
        config = msgspec.structs.replace(config, run_dir=str(run_dir), storage=storage)
        pools.append(HostPool(8, LAYOUT.page_bytes))
        return StorageLauncher(config, node.rank if node else 0, LAYOUT, pools[-1], node)

    yield make
    for pool in pools:
        pool.close()
    assert os.listdir(run_dir) == [], "sockets stay behind"


def test_fm61_a_rank_starts_no_process_for_a_plug_in_that_is_not_on_the_list(launcher: Launcher) -> None:
    """Whoever sent the command, and however it got past whoever should have refused it."""
    config = json.dumps({"backend_name": "x", "module_path": "some.module", "class_name": "Store"})
    for start in (lambda: launcher()(Spawn(1, "dynamic", config)), lambda: launcher().dry_run(1, "dynamic", config)):
        with pytest.raises(UserError, match="the plug-in some.module:Store may not be loaded here"):
            start()


class Trying:
    """Probes and the time that a rank's loop would give them."""

    def __init__(self, launcher: StorageLauncher) -> None:
        self.poller = Poller()
        self.probes = Probes(launcher.dry_run, self.poller)
        self.reports: dict[Key, wire.DryRunReport] = {}

    def start(self, key: Key, backend: str, config: dict[str, Any], seconds: float = PATIENCE_S) -> None:
        self.probes.start(key, backend, json.dumps(config), _now_us() + int(seconds * 1e6))

    def run(self, until: Callable[[], bool]) -> None:
        """As the loop does: sleep until something happens, look."""
        deadline_us = _now_us() + int(PATIENCE_S * 1e6)
        while not until():
            assert _now_us() < deadline_us, f"only {self.reports}"
            self.reports |= dict(self.probes.poll(_now_us()))
            wake_us = self.probes.wake_at_us()
            self.poller.wait(100 if wake_us is None else min(100, max(0, (wake_us - _now_us()) // 1000 + 1)))

    def end(self) -> None:
        """Until every process is reaped."""
        self.run(lambda: not self.probes._probes)


@pytest.fixture
def trying(launcher: Launcher) -> Iterator[Trying]:
    found = Trying(launcher())
    yield found
    for probe in list(found.probes._probes):
        probe.client.kill()
    found.end()


def _now_us() -> int:
    return time.monotonic_ns() // 1_000


def _faulty(call: str, kind: str, **fault: Any) -> dict[str, Any]:
    return {"inner": "memory", "faults": {call: {"kind": kind, **fault}}}


def test_good_bad_hung_and_crashed_stores_at_the_same_time(trying: Trying, tmp_path: Path) -> None:
    root = tmp_path / "store"
    trying.start("good", "file", {"file_storage_path": str(root)})
    trying.start("full", "faulty", _faulty("write", "no_space"))
    trying.start("hung", "faulty", _faulty("read", "hang"), seconds=3.0)
    trying.start("crashed", "faulty", _faulty("exists", "crash"))
    trying.start("one too many", "memory", {})
    trying.end()
    found = {key: (report.failed_step, report.code) for key, report in trying.reports.items()}
    # On a machine that is busy enough it is not that far after three seconds; it is killed and told all the same.
    assert found.pop("hung")[1] == "hung"
    # Its words about the step are lost with it, if the machine has not sent them yet.
    assert found.pop("crashed")[1] == "killed"
    assert found == {
        "good": ("", ""), "full": ("write", "no_space"), "one too many": ("connect", "other"),
    }  # fmt: skip
    assert trying.reports["good"].info["path"] == str(root)
    assert not root.exists()


def test_one_that_is_given_up_is_gone(trying: Trying) -> None:
    trying.start("c", "faulty", _faulty("open", "hang"))
    assert trying.probes.cancel("c")
    trying.end()
    assert trying.reports["c"].code == "cancelled"


def test_places_are_free_again_and_nothing_stays_of_many(trying: Trying) -> None:
    for turn in range(2):
        for number in range(MOST_PROBES):
            trying.start(turn * MOST_PROBES + number, "memory", {})
        trying.end()
    assert len(trying.reports) == 2 * MOST_PROBES
    assert not any(report.failed_step for report in trying.reports.values())


def test_a_rank_that_leaves_takes_its_dry_runs_with_it(launcher: Launcher) -> None:
    trying = Trying(launcher())
    trying.start("c", "faulty", _faulty("open", "hang"))
    (probe,) = trying.probes._probes
    trying.probes.close()
    assert probe.client._process.wait(PATIENCE_S) == -9


def nodes(tmp_path: Path) -> list[Node]:
    """Two machines of one server."""
    return [
        Node(0, "gpu1", lambda: "10.0.0.1", {"SITE": "east", "TOKEN": "east-secret"}),
        Node(1, "gpu2", lambda: "10.0.0.2", {"SITE": "west", "TOKEN": "west-secret"}),
    ]


def test_fm08_each_rank_resolves_its_own_value(launcher: Launcher, tmp_path: Path) -> None:
    """One config for all ranks; each of the two nodes opens a store at a place of its own, and only there."""
    config = {"file_storage_path": f"{tmp_path}/${{node.hostname}}/${{node.ip}}/${{rank}}/${{env.SITE}}"}
    opened = {}
    for node in nodes(tmp_path):
        client = launcher(node, ("SITE",))(Spawn(1, "file", json.dumps(config)))
        poller = Poller()
        for thing in client.fds():
            poller.register(thing)
        try:
            heard: list[Any] = []
            while not heard:
                assert poller.wait(int(PATIENCE_S * 1000)), "the store was not opened"
                heard = client.receive()
            opened[node.rank] = heard[0].info["path"]
        finally:
            client.kill()
            client._process.wait(PATIENCE_S)
            client.close()
    assert opened == {0: f"{tmp_path}/gpu1/10.0.0.1/0/east", 1: f"{tmp_path}/gpu2/10.0.0.2/1/west"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu1", "gpu2", "run"]


def test_fm08_a_rank_that_lacks_a_value_says_so_and_starts_nothing(launcher: Launcher, tmp_path: Path) -> None:
    trying = Trying(launcher(Node(1, "gpu2", lambda: "10.0.0.2", {}), ("SITE",)))
    trying.start("c", "file", {"file_storage_path": f"{tmp_path}/${{env.SITE}}"})
    trying.run(lambda: bool(trying.reports))
    report = trying.reports["c"]
    assert report.code == "bad_config" and "SITE is not set in the environment of rank 1 on gpu2" in report.reason


def test_values_that_look_secret_stay_out_of_every_text(launcher: Launcher, tmp_path: Path) -> None:
    trying = Trying(launcher(nodes(tmp_path)[0], ("TOKEN",)))
    trying.start("c", "file", {"file_storage_path": "/proc/${env.TOKEN}"})
    trying.end()
    trying.start("d", "file", {"file_storage_path": f"{tmp_path}/${{env.TOKEN}}"})
    trying.end()
    assert trying.reports["d"].info["path"] == f"{tmp_path}/***"
    assert "east-secret" not in trying.reports["c"].reason
    assert "/proc/***" in trying.reports["c"].reason


def test_this_machine_knows_itself() -> None:
    node = this_node(2)
    assert node.rank == 2 and node.hostname and node.environment is os.environ
    try:
        assert node.ip().count(".") == 3
    except UserError as error:
        assert "${node.ip}" in str(error), "a machine without a network"


@pytest.mark.long
def test_a_server_tries_stores_out_on_every_rank_and_leaves_while_it_does(tmp_path: Path) -> None:
    """Over HTTP, with a rank on either side: a store that works, one that does not, and one that hangs at the end."""
    environment = {registry.ALLOW_FAULTY_ENV: "1", "SITE": "east"}
    flags = ("--enable-hierarchical-cache", "--max-total-tokens", "4096", "--hicache-config-env", "SITE")
    with Server(tmp_path / "server", *flags, tp_size=2, env=environment) as server:

        def ask(backend: str, config: dict[str, Any]) -> httpx.Response:
            body = {"hicache_storage_backend": backend, "hicache_storage_backend_extra_config": config, "dry_run": True}
            return server.http.put(
                "/hicache/storage-backend", json=body, headers={"Authorization": f"Bearer {ADMIN_KEY}"}
            )

        good = ask("file", {"file_storage_path": f"{tmp_path}/store/${{env.SITE}}/${{rank}}"})
        assert good.status_code == 200 and good.json()["ok"], good.text
        assert [rank["info"]["path"] for rank in good.json()["ranks"]] == [f"{tmp_path}/store/east/{r}" for r in (0, 1)]
        assert not (tmp_path / "store").exists()
        bad = ask("file", {"file_storage_path": "/proc/nobody"})
        assert bad.status_code == 400
        assert [(rank["failed_step"], rank["code"]) for rank in bad.json()["ranks"]] == [("connect", "not_found")] * 2
        with ThreadPoolExecutor(1) as hands:
            hung = hands.submit(ask, "faulty", _faulty("open", "hang"))
            server.wait_for_log("(?s)" + ".*".join(["DryRunStorage goes to 2 ranks"] * 3))
            server.process.send_signal(signal.SIGTERM)
            assert [rank["code"] for rank in hung.result(PATIENCE_S).json()["ranks"]] == ["cancelled"] * 2
        server.process.wait(PATIENCE_S)


def test_a_process_that_cannot_be_watched_does_not_stay(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank has no descriptor left, just when the process has been started."""
    started: list[int] = []

    def full(pid: int) -> int:
        started.append(pid)
        raise OSError(errno.EMFILE, "Too many open files")

    trying = Trying(launcher())
    before = sorted(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "pidfd_open", full)
        trying.start("a", "memory", {})
    trying.run(lambda: "a" in trying.reports)
    assert "Too many open files" in trying.reports["a"].reason
    with pytest.raises(ChildProcessError):
        os.waitpid(started[0], 0)
    assert sorted(os.listdir("/proc/self/fd")) == before
