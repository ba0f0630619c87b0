"""Several drills in a row: who needs what, on which server, and against which reference.

A server of the drill's own takes a few seconds to start, so drills that want the same one share it, one after the
other; each begins detached and with empty caches.  A server on which a drill did not pass is not used again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from sglang_hicache.ctl.drill.load import Answers, reference_answers
from sglang_hicache.ctl.drill.own_server import OwnServer
from sglang_hicache.ctl.drill.programs import Programs
from sglang_hicache.ctl.drill.result import Assertion, Result, Verdict
from sglang_hicache.ctl.drill.runner import SERVER_ERRORS, Drill
from sglang_hicache.ctl.drill.scenario import NeedsTable, Scenario, ServerTable
from sglang_hicache.ctl.drill.site import ForeignSite, OwnSite
from sglang_hicache.ctl.drill.stores import filled, foreign_stores, own_stores
from sglang_hicache.ctl.drill.stream import StreamClient
from sglang_hicache.storage import registry

#: What is computed depends on these alone.
_EXACT_FLAGS = ("--enable-deterministic-inference", "--page-size", "16")
#: Pools so small that the load does not fit, so that storage is needed all the time.
_CACHE_FLAGS = (
    "--max-total-tokens", "1024", "--enable-hierarchical-cache", "--hicache-ratio", "1.2", "--enable-cache-report",
    "--check-rank-digests", "--hicache-storage-lookup-timeout", "0.5", "--hicache-state-file", "{folder}/state.json",
)  # fmt: skip

Tell = Callable[[str], None]


class OwnSession:
    """Drills on servers of their own; `with` ends the last one."""

    def __init__(self, folder: Path, tell: Tell) -> None:
        self._folder = folder
        self._tell = tell
        self._servers = 0
        self._references: dict[bytes, Answers] = {}
        #: The server that runs, and what it was started for.
        self._server: OwnServer | None = None
        self._wanted: tuple[ServerTable, Path] | None = None

    def __enter__(self) -> OwnSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_server_blocking()

    def run_blocking(self, scenario: Scenario) -> Result:
        """One drill."""
        if missing := missing_needs(scenario.needs):
            return Result(scenario.name, scenario.about, missing, Verdict.SKIPPED)
        try:
            answers = self._reference_blocking(scenario)
            with ExitStack() as stack:
                return self._run_blocking(scenario, answers, stack)
        except SERVER_ERRORS as error:
            return Result(scenario.name, scenario.about, str(error), Verdict.ERROR)

    def end_server_blocking(self) -> list[str]:
        """Stop the server, if there is one; what was not in order about its end."""
        server, self._server, self._wanted = self._server, None, None
        return server.stop_blocking() if server is not None else []

    def _run_blocking(self, scenario: Scenario, answers: Answers, stack: ExitStack) -> Result:
        server, folder = self._server_blocking(scenario.server)
        drill_folder = folder / scenario.name
        drill_folder.mkdir(mode=0o700)
        programs = stack.enter_context(Programs(scenario.programs, drill_folder))
        for name in scenario.programs:
            programs.start_blocking(name)
        stores = own_stores(scenario.stores, drill_folder, programs.names())
        site = OwnSite(server, stores, programs, scenario.server.tp_size)
        result = Drill(scenario, site, answers, is_exact=True, key="", tell=self._tell).run_blocking()
        if result.verdict is Verdict.PASSED:
            shutil.rmtree(drill_folder)
        else:
            result.message = f"{result.message} What the server said is in {folder}".strip()
            self.end_server_blocking()
        return result

    def _server_blocking(self, wanted: ServerTable) -> tuple[OwnServer, Path]:
        """The one that runs, if it is of the wanted kind, else a new one."""
        kind = msgspec.structs.replace(wanted, store="", prefetch_policy="")
        if self._server is None or self._wanted is None or self._wanted[0] != kind:
            self.end_server_blocking()
            folder = self._new_folder("server")
            flags = [filled(flag, {"folder": str(folder)}) for flag in (*_CACHE_FLAGS, *wanted.flags)]
            self._server = self._started_blocking(folder, [*_model_flags(wanted), *flags])
            self._wanted = kind, folder
        assert self._wanted is not None
        return self._server, self._wanted[1]

    def _reference_blocking(self, scenario: Scenario) -> Answers:
        """The answers of a fresh server that has no storage and reuses nothing."""
        flags = _model_flags(scenario.server)
        kind = msgspec.json.encode([flags, scenario.load])
        if kind not in self._references:
            self.end_server_blocking()
            server = self._started_blocking(self._new_folder("reference"), [*flags, "--disable-radix-cache"])
            try:
                self._references[kind] = reference_answers(scenario.load, server.client)
            finally:
                server.stop_blocking()
        return self._references[kind]

    def _started_blocking(self, folder: Path, flags: list[str]) -> OwnServer:
        self._tell(f"starting a server: {' '.join(flags)}")
        server = OwnServer(folder, flags)
        server.start_blocking()
        return server

    def _new_folder(self, name: str) -> Path:
        self._servers += 1
        return self._folder / f"{name}-{self._servers}"


def run_all_own(scenarios: Sequence[Scenario], folder: Path, tell: Tell) -> list[Result]:
    """All of them, in their order of the same server; the results in the order in which they were asked for."""
    found: dict[str, Result] = {}
    with OwnSession(folder, tell) as session:
        groups: dict[Any, list[Scenario]] = {}
        for scenario in scenarios:
            table = scenario.server
            groups.setdefault((table.tp_size, *table.flags, *table.model_flags), []).append(scenario)
        for group in groups.values():
            for scenario in group:
                tell(f"--- {scenario.name}")
                found[scenario.name] = session.run_blocking(scenario)
            ran = [found[scenario.name] for scenario in group if found[scenario.name].outcome is None]
            _judge_end(ran[-1:], session)
    return [found[scenario.name] for scenario in scenarios]


def _judge_end(last: Sequence[Result], session: OwnSession) -> None:
    """How the server ended belongs to the last drill that ran on it."""
    problems = session.end_server_blocking()
    for result in last:
        verdict = Verdict.FAILED if problems else Verdict.PASSED
        result.assertions.append(Assertion("the server ends in order", verdict, "; ".join(problems) or "exit code 0"))


def run_foreign(scenario: Scenario, client: StreamClient, key: str, tell: Tell) -> Result:
    """One drill on a server that serves somebody; `UserError` before anything is done where it may not be."""
    if missing := missing_needs(scenario.needs):
        return Result(scenario.name, scenario.about, missing, Verdict.SKIPPED)
    site = ForeignSite(client, {})
    site.stores = foreign_stores(scenario, site.status())
    is_exact = _is_exact(client)
    tell("recording the answers of the server as it is")
    answers = reference_answers(scenario.load, client, key=key)
    return Drill(scenario, site, answers, is_exact=is_exact, key=key, tell=tell).run_blocking()


def missing_needs(needs: NeedsTable) -> str:
    """What a drill needs and this machine has not, in words."""
    programs = [f"the program {name}" for name in needs.programs if shutil.which(name) is None]
    backends = [f"the storage backend {name}" for name in needs.backends if name not in registry.names()]
    missing = programs + backends
    return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not there" if missing else ""


def _model_flags(table: ServerTable) -> list[str]:
    return [*_EXACT_FLAGS, "--tp-size", str(table.tp_size), *table.model_flags]


def _is_exact(client: StreamClient) -> bool:
    return bool(client.ask("/server_info").get("enable_deterministic_inference"))
