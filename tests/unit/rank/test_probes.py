"""The probes of a rank against played processes: every way in which a try of a store can end, and that each is told."""

from __future__ import annotations

import pytest

from sglang_hicache import wire
from sglang_hicache.errors import ProtocolError, UserError
from sglang_hicache.scheduler.probes import MOST_PROBES, Key, Probes
from sglang_hicache.sockets import Poller
from tests.unit.rank.conftest import PlayedClient

GOOD = wire.DryRunReport(write_page_s=0.25, read_page_s=0.5)
AT_READ = wire.DryRunReport(steps=[wire.DryRunStep(name="connect", took_s=0.1)], failed_step="read")
DEADLINE_US = 1_000


class Played:
    """Probes whose processes are played: `clients[number]`, from 1 on."""

    def __init__(self) -> None:
        self.clients: dict[int, PlayedClient] = {}
        self.refusal: Exception | None = None
        self.poller = Poller()
        self.probes = Probes(self._launch, self.poller)

    def _launch(self, number: int, backend: str, extra_config_json: str) -> PlayedClient:
        if self.refusal is not None:
            raise self.refusal
        self.clients[number] = PlayedClient()
        return self.clients[number]

    def start(self, key: Key = "c") -> PlayedClient:
        self.probes.start(key, "memory", "{}", DEADLINE_US)
        return self.clients[max(self.clients)]

    def poll(self, now_us: int = 0) -> list[tuple[Key, str, str]]:
        """Key, failed step and code of what has ended."""
        return [(key, report.failed_step, report.code) for key, report in self.probes.poll(now_us)]


@pytest.fixture
def played():
    found = Played()
    yield found
    found.probes.close()


def test_a_report_is_told_once_and_the_process_does_not_linger(played):
    client = played.start(7)
    client.said = [wire.DryRunDone(report=AT_READ, is_last=False)]
    assert played.poll() == [] and played.probes.wake_at_us() == DEADLINE_US
    client.said = [wire.DryRunDone(report=GOOD)]
    assert played.probes.poll(0) == [(7, GOOD)]
    assert client.did == ["kill"], "it has cleaned up, and may hang on its way out"
    client.status = -9
    assert played.poll(DEADLINE_US) == []
    assert client.did == ["kill", "reap", "close"]
    assert played.probes.wake_at_us() is None


def test_a_report_that_is_seen_after_the_end_counts(played):
    client = played.start()
    client.said, client.status = [wire.DryRunDone(report=GOOD)], 0
    assert played.probes.poll(6) == [("c", GOOD)]
    assert client.did[-1] == "close" and played.probes.wake_at_us() is None


def test_one_that_hangs_is_told_at_its_deadline_with_how_far_it_came_and_reaped_later(played):
    client = played.start()
    client.said = [wire.DryRunDone(report=AT_READ, is_last=False)]
    assert played.poll(DEADLINE_US - 1) == []
    assert played.poll(DEADLINE_US) == [("c", "read", "hung")]
    assert client.did == ["kill"]
    assert played.poll(2 * DEADLINE_US) == [] and played.probes.wake_at_us() is None
    client.said = [wire.DryRunDone(report=GOOD)]
    assert played.poll(2 * DEADLINE_US) == [], "whatever it says now, it has been told"
    client.status = -9
    played.poll(3 * DEADLINE_US)
    assert client.did[-2:] == ["reap", "close"]


@pytest.mark.parametrize(
    ("status", "code", "how"),
    [(-11, "crashed", "signal 11"), (-9, "killed", "signal 9"), (1, "crashed", "exit code 1")],
)
def test_one_that_crashes_is_told(played, status, code, how):
    client = played.start()
    client.said, client.status = [wire.DryRunDone(report=AT_READ, is_last=False)], status
    ((key, report),) = played.probes.poll(1)
    assert (key, report.failed_step, report.code) == ("c", "read", code)
    assert how in report.reason


def test_one_that_speaks_nonsense_is_killed(played):
    client = played.start()
    client.said = [ProtocolError("malformed message")]
    assert played.poll() == [("c", "connect", "crashed")]
    assert client.did == ["kill"]


@pytest.mark.parametrize(
    ("refusal", "code"),
    [(UserError("${env.X}: not set"), "bad_config"), (OSError(12, "x"), "other"), (ProtocolError("x"), "other")],
)
def test_one_that_cannot_be_started_is_told(played, refusal, code):
    played.refusal = refusal
    played.probes.start("c", "memory", "{}", DEADLINE_US)
    assert played.probes.wake_at_us() == 0
    ((_, report),) = played.probes.poll(0)
    assert report.code == code and str(refusal) in report.reason


def test_the_fifth_at_a_time_is_refused_also_while_a_killed_one_does_not_end(played):
    clients = [played.start(f"c{number}") for number in range(MOST_PROBES)]
    played.probes.start("x", "memory", "{}", DEADLINE_US)
    ((key, report),) = played.probes.poll(0)
    assert key == "x" and "4 dry runs are under way already" in report.reason
    assert len(played.poll(DEADLINE_US)) == MOST_PROBES
    played.probes.start("x", "memory", "{}", DEADLINE_US)
    assert [key for key, _, _ in played.poll()] == ["x"]
    clients[0].status = -9
    played.poll()
    played.start("x")
    assert played.poll() == []


def test_no_number_of_dry_runs_keeps_a_canary_from_being_tried(played):
    """Or the store that is well again would not come back as long as somebody tries others."""
    for number in range(MOST_PROBES):
        played.start(f"c{number}")
    played.start(1).said = [wire.DryRunDone(report=GOOD)]
    assert played.probes.poll(0) == [(1, GOOD)]


def test_one_that_is_given_up(played):
    client = played.start()
    assert played.probes.knows("c") and not played.probes.knows("d")
    assert not played.probes.cancel("d")
    assert played.probes.cancel("c")
    assert client.did == ["kill"]
    assert played.poll() == [("c", "connect", "cancelled")]
    assert not played.probes.cancel("c"), "that is over"
    assert played.probes.knows("c")


def test_closing_leaves_no_process(played):
    client = played.start()
    played.probes.close()
    assert client.did == ["kill", "close"]
    assert played.poll() == []
