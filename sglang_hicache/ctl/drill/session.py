"""Several drills in a row: who needs what, on which server, and against which reference.

A server of the drill's own takes a few seconds to start, so drills that want the same one share it, one after the
other; each begins detached and with empty caches.  A server on which a drill did not pass is not used again.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from sglang_hicache.ctl.drill.load import Answers, reference_answers
from sglang_hicache.ctl.drill.own_server import OwnServer
from sglang_hicache.ctl.drill.programs import Programs, program_path
from sglang_hicache.ctl.drill.progress import Voice
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


class OwnSession:
    """Drills on servers of their own; `with` ends the last one."""

    def __init__(self, folder: Path, voice: Voice) -> None:
        self._folder = folder
        self._voice = voice
        self._servers = 0
        self._references: dict[bytes, Answers] = {}
        #: The server that runs, and what it was started for.
        self._server: OwnServer | None = None
        self._wanted: tuple[ServerTable, Path] | None = None
        #: The latest drill on it.
        self._last: Result | None = None

    def __enter__(self) -> OwnSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_server_blocking()

    def run_blocking(self, scenario: Scenario) -> Result:
        """One drill."""
        if missing := missing_needs(scenario.needs):
            return Result(scenario.name, scenario.about, missing, Verdict.SKIPPED)
        try:
            return self._run_blocking(scenario)
        except SERVER_ERRORS as error:
            return Result(scenario.name, scenario.about, str(error), Verdict.ERROR)

    def end_server_blocking(self) -> None:
        """Stop the server, if there is one.  How it ends belongs to the last drill on it."""
        server, self._server, self._wanted = self._server, None, None
        problems = server.stop_blocking() if server is not None else []
        if server is not None and self._last is not None and self._last.outcome is None:
            verdict = Verdict.FAILED if problems else Verdict.PASSED
            detail = "; ".join(problems) or "exit code 0"
            self._last.assertions.append(Assertion("the server ends in order", verdict, detail))
        self._last = None

    def _run_blocking(self, scenario: Scenario) -> Result:
        server, folder = self._server_blocking(scenario.server)
        answers = self._reference_blocking(scenario, server)
        drill_folder = folder / scenario.name
        drill_folder.mkdir(mode=0o700)
        with Programs(scenario.programs, drill_folder) as programs:
            for name in scenario.programs:
                programs.start_blocking(name)
            stores = own_stores(scenario.stores, drill_folder, programs.names())
            site = OwnSite(server, stores, programs, scenario.server.tp_size)
            result = Drill(scenario, site, answers, is_exact=True, key="", voice=self._voice).run_blocking()
        self._last = result
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
            self._servers += 1
            folder = self._folder / f"server-{self._servers}"
            flags = [*_model_flags(wanted), *_CACHE_FLAGS, *wanted.flags]
            flags = [filled(flag, {"folder": str(folder)}) for flag in flags]
            self._voice.tell(f"starting a server: {' '.join(flags)}")
            server = OwnServer(folder, flags)
            server.start_blocking()
            self._server, self._wanted = server, (kind, folder)
        assert self._wanted is not None
        return self._server, self._wanted[1]

    def _reference_blocking(self, scenario: Scenario, server: OwnServer) -> Answers:
        """The answers of a server to which nothing is attached yet."""
        questions = msgspec.structs.replace(scenario.load, streams=1, pause_s=0.0)
        kind = msgspec.json.encode([_model_flags(scenario.server), questions])
        if kind not in self._references:
            self._references[kind] = reference_answers(scenario.load, server.client)
        return self._references[kind]


def run_all_own(scenarios: Sequence[Scenario], folder: Path, voice: Voice) -> list[Result]:
    """All of them, those of the same kind of server together; the results in the order of the scenarios."""
    found: dict[str, Result] = {}
    with OwnSession(folder, voice) as session:
        groups: dict[tuple[Any, ...], list[Scenario]] = {}
        for scenario in scenarios:
            table = scenario.server
            groups.setdefault((table.tp_size, *table.flags, *table.model_flags), []).append(scenario)
        for scenario in itertools.chain(*groups.values()):
            voice.tell(f"--- {scenario.name}")
            found[scenario.name] = session.run_blocking(scenario)
    return [found[scenario.name] for scenario in scenarios]


def run_foreign(scenario: Scenario, client: StreamClient, key: str, voice: Voice) -> Result:
    """One drill on a server that serves somebody; `UserError` before anything is done where it may not be."""
    if missing := missing_needs(scenario.needs):
        return Result(scenario.name, scenario.about, missing, Verdict.SKIPPED)
    site = ForeignSite(client, {})
    site.stores = foreign_stores(scenario, site.status())
    is_exact = _is_exact(client)
    voice.tell("recording the answers of the server as it is")
    answers = reference_answers(scenario.load, client, key=key)
    return Drill(scenario, site, answers, is_exact=is_exact, key=key, voice=voice).run_blocking()


def missing_needs(needs: NeedsTable) -> str:
    """What a drill needs and this machine has not, in words."""
    programs = [f"the program {name}" for name in needs.programs if program_path(name) is None]
    backends = [f"the storage backend {name}" for name in needs.backends if name not in registry.names()]
    missing = programs + backends
    return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not there" if missing else ""


def _model_flags(table: ServerTable) -> list[str]:
    return [*_EXACT_FLAGS, "--tp-size", str(table.tp_size), *table.model_flags]


def _is_exact(client: StreamClient) -> bool:
    return bool(client.ask("/server_info").get("enable_deterministic_inference"))
