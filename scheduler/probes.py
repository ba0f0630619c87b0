"""The rank's hands on dry runs and canaries: a process for each try of a backend that is not attached.

Owned by the loop of one rank, on the scheduler thread; decides nothing and never waits.  Each process has its own
memory and its own sockets, so that whatever the backend does stays in it.  One that is not done by its deadline is
killed: it is reported at once, and reaped whenever it ends.
"""

from __future__ import annotations

import logging
import signal
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from sglang_hicache import wire
from sglang_hicache.errors import ProtocolError, UserError
from sglang_hicache.observe import without_secrets
from sglang_hicache.sockets import Poller, Pull
from sglang_hicache.storage.diagnosis import Diagnosis, diagnose
from sglang_hicache.workers.storage_client import StorageClient

log = logging.getLogger(__name__)

#: Dry runs at the same time, and as many canaries, which no operator can keep from being tried.  Those that were killed
#: and have not ended count: each is a process.
MOST_PROBES = 4

#: Names of dry runs that are remembered, for whoever wants to give one up that has ended.
_REMEMBERED = 1024

#: A dry run is known by the id of its command, a canary by its number.
Key = str | int

_TOO_MANY = Diagnosis("other", f"{MOST_PROBES} dry runs are under way already; try again when one has ended")
_CANCELLED = Diagnosis("cancelled", "the dry run was given up before it had ended")
_HUNG = Diagnosis(
    "hung",
    "the store did not answer to the end in time, and the try was killed; check whether it hangs, or give more time",
)

_NOTHING_YET = wire.DryRunReport(failed_step="connect")

Launch = Callable[[int, str, str], StorageClient]


@dataclass(slots=True)
class _Probe:
    """One process."""

    key: Key
    client: StorageClient
    #: Clock at which it is killed; None: its report is told, only its end is waited for.
    deadline_us: int | None
    #: How far it came, as it last told.
    report: wire.DryRunReport = _NOTHING_YET
    #: What the poller wakes for.
    watched: list[Pull | int] = field(default_factory=list)


class Probes:
    """All tries of one rank."""

    def __init__(self, launch: Launch, poller: Poller) -> None:
        self._launch = launch
        self._poller = poller
        self._probes: list[_Probe] = []
        self._reports: list[tuple[Key, wire.DryRunReport]] = []
        self._known: deque[Key] = deque(maxlen=_REMEMBERED)
        self._number = 0

    def start(self, key: Key, backend: str, extra_config_json: str, deadline_us: int) -> None:
        """Begin; the report comes from `poll`, also where nothing could be begun."""
        self._known.append(key)
        if sum(isinstance(probe.key, type(key)) for probe in self._probes) >= MOST_PROBES:
            self._fail(key, _TOO_MANY)
            return
        self._number += 1
        try:
            client = self._launch(self._number, backend, extra_config_json)
        except (OSError, UserError, ProtocolError) as error:
            self._fail(key, diagnose(error, backend))
            return
        probe = _Probe(key, client, deadline_us)
        for thing in client.fds():
            self._poller.register(thing)
            probe.watched.append(thing)
        self._probes.append(probe)

    def knows(self, key: Key) -> bool:
        """Was this started here, not long ago?"""
        return key in self._known

    def cancel(self, key: Key) -> bool:
        """Give up; False if it has said what it found already."""
        for probe in self._probes:
            if probe.key == key and probe.deadline_us is not None:
                self._give_up(probe, _CANCELLED)
                return True
        return False

    def poll(self, now_us: int) -> list[tuple[Key, wire.DryRunReport]]:
        """What has been found out since the last call."""
        for probe in list(self._probes):
            self._hear(probe)
            if probe.client.exited():
                self._hear(probe)  # its last words may have come after the first look
                self._ended(probe)
            elif probe.deadline_us is not None and now_us >= probe.deadline_us:
                self._give_up(probe, _HUNG)
        reports, self._reports = self._reports, []
        return reports

    def wake_at_us(self) -> int | None:
        """When to look although nothing has arrived."""
        if self._reports:
            return 0
        return min((p.deadline_us for p in self._probes if p.deadline_us is not None), default=None)

    def close(self) -> None:
        """At the very end: nothing of what is left may outlive the rank."""
        for probe in self._probes:
            probe.client.kill()
            probe.client.close()
        self._probes.clear()

    def _hear(self, probe: _Probe) -> None:
        try:
            messages = probe.client.receive()
        except ProtocolError as error:
            self._give_up(probe, Diagnosis("crashed", f"the process of the try said what nobody understands: {error}"))
            return
        for message in messages:
            if not isinstance(message, wire.DryRunDone) or probe.deadline_us is None:
                continue
            if not message.is_last:
                probe.report = message.report
            else:
                probe.deadline_us = None
                self._reports.append((probe.key, message.report))
                probe.client.kill()  # it has cleaned up, and waits for this

    def _give_up(self, probe: _Probe, why: Diagnosis) -> None:
        probe.client.kill()
        if probe.deadline_us is not None:
            probe.deadline_us = None
            self._fail(probe.key, why, probe.report)

    def _ended(self, probe: _Probe) -> None:
        """The process is gone.  It does not go by itself before its report has been heard."""
        status = probe.client.reap()
        for thing in probe.watched:
            self._poller.unregister(thing)
        probe.client.close()
        self._probes.remove(probe)
        if probe.deadline_us is not None:
            how = f"signal {-status}" if status is not None and status < 0 else f"exit code {status}"
            code = "killed" if status == -signal.SIGKILL else "crashed"
            why = Diagnosis(code, f"the process of the try has ended without a word ({how}); look into its log")
            self._fail(probe.key, why, probe.report)

    def _fail(self, key: Key, why: Diagnosis, report: wire.DryRunReport = _NOTHING_YET) -> None:
        log.warning("a try of a store failed: %s", why, extra={"command": str(key)})
        found = msgspec.structs.replace(report, code=why.code, reason=without_secrets(why.text))
        self._reports.append((key, found))
