"""Modes, switch, dry run, asynchronous commands, and operations: what a caller says, what ranks hear, what is told."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from sglang_hicache import extra_config, wire
from sglang_hicache.tokenizer.operations import MOST_REMEMBERED
from sglang_hicache.tokenizer.services import Phase
from tests.contract.fake_server import ADMIN, API_KEY, FakeServer, make_config

PATH = "/hicache/storage-backend"
OPERATIONS = "/hicache/operations"
FILE = {"hicache_storage_backend": "file"}


@pytest.fixture
def patient(model: Path) -> Iterator[FakeServer]:
    """A server whose commands are not over before a test is."""
    config = make_config(model)
    storage = structs.replace(config.storage, attach_timeout_s=60.0, drain_timeout_s=60.0)
    server = FakeServer(structs.replace(config, storage=storage))
    yield server
    server.close()


def put(server: FakeServer, **body: Any) -> Any:
    return server.call("PUT", PATH, json=FILE | body, headers=ADMIN)


def delete(server: FakeServer, query: str = "", **body: Any) -> Any:
    content = json.dumps(body) if body else None
    return server.call("DELETE", f"{PATH}{query}", content=content, headers=ADMIN)


def operation(server: FakeServer, operation_id: str) -> Any:
    return server.call("GET", f"{OPERATIONS}/{operation_id}", headers=ADMIN)


def nothing_was_sent(server: FakeServer) -> bool:
    """No rank has heard of a command."""
    return not [message for _, message in server.sent if not isinstance(message, wire.QueryStatus)]


# ------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize(
    ("body", "mode", "drain_s"),
    [
        ({}, "idle", 0.3),
        ({"mode": "idle"}, "idle", 0.3),
        ({"mode": "drain"}, "drain", 0.3),
        ({"mode": "drain", "timeout_s": 7}, "drain", 7),
        ({"mode": "force"}, "force", 1.0),
        ({"force": True}, "force", 1.0),
        ({"mode": "force", "force": True, "timeout_s": 0.25}, "force", 0.25),
        ({"mode": None, "timeout_s": None}, "idle", 0.3),
    ],
)
def test_a_mode_is_a_deadline(server: FakeServer, body: dict[str, Any], mode: str, drain_s: float) -> None:
    """Of a detach it is the command's; of a switch that of the old one, which goes on after the answer."""
    assert delete(server, **body).status_code == 200
    detach = server.commands(wire.DetachStorage)[0]
    assert (detach.mode, detach.deadline_s, detach.flush_timeout_s) == (mode, drain_s, None)
    assert put(server, switch=True, **body).status_code == 200
    switch = server.commands(wire.AttachStorage)[0]
    assert (switch.mode, switch.drain_s, switch.switch, switch.keeps_trying) == (mode, drain_s, True, False)
    assert switch.deadline_s == server.config.storage.attach_timeout_s


def test_detach_takes_its_query_as_well(server: FakeServer) -> None:
    assert delete(server, "?mode=drain&timeout_s=2.5&force=false").status_code == 200
    command = server.commands(wire.DetachStorage)[0]
    assert (command.mode, command.deadline_s) == ("drain", 2.5)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"mode": "gently"}, ["'gently'", "idle", "drain", "force"]),
        ({"mode": "idle", "force": True}, ['"force": true', '"mode": "idle"']),
        ({"mode": "drain", "force": True}, ["contradicts"]),
        ({"timeout_s": 5}, ["timeout_s (5)", '"mode": "drain"']),
        ({"mode": "idle", "timeout_s": 5}, ["timeout_s", "waits for none"]),
        ({"mode": "drain", "timeout_s": 0}, ["timeout_s is 0", "3600"]),
        ({"mode": "drain", "timeout_s": -1}, ["timeout_s is -1"]),
        ({"mode": "force", "timeout_s": 3601}, ["timeout_s is 3601"]),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(server: FakeServer, body: dict[str, Any], words: list[str]) -> None:
    for reply, failure in (
        (delete(server, **body), "Failed to detach HiCache storage backend."),
        (put(server, **body), "Failed to attach HiCache storage backend."),
        (put(server, switch=True, **body), "Failed to attach HiCache storage backend."),
    ):
        assert reply.status_code == 400
        first, rest = reply.text.split("\n", 1)
        assert first == failure
        assert all(word in rest for word in words), rest
    assert nothing_was_sent(server)


@pytest.mark.parametrize("query", ["?timeout_s=soon", "?timeout_s=nan&mode=drain", "?force=yes", "?async=1", "?mode="])
def test_a_query_that_cannot_be_read_is_refused(server: FakeServer, query: str) -> None:
    reply = delete(server, query)
    assert reply.status_code == 400 and "must be" in reply.text
    assert nothing_was_sent(server)


@pytest.mark.parametrize("body", ["[]", "{", '{"mode": 3}', '{"timeout_s": "5"}', '{"timeout_s": NaN}', "null"])
def test_a_detach_with_a_malformed_body(server: FakeServer, body: str) -> None:
    reply = server.call("DELETE", PATH, content=body, headers=ADMIN)
    assert reply.status_code == 400 and reply.json()["type"] == "Bad Request"
    reply = server.call("DELETE", f"{PATH}?force=true", content=body, headers=ADMIN)
    assert reply.status_code == 400 and "one of the two" in reply.json()["message"]
    assert nothing_was_sent(server)


@pytest.mark.parametrize("given", [{"prefetch_threshold": 7}, '{"prefetch_threshold": 7}'])
def test_the_extra_config_has_a_second_name_and_may_be_an_object(server: FakeServer, given: Any) -> None:
    assert put(server, hicache_storage_backend_extra_config=given).status_code == 200
    assert json.loads(server.commands(wire.AttachStorage)[0].extra_config_json) == {"prefetch_threshold": 7}
    both = {"hicache_storage_backend_extra_config_json": "{}", "hicache_storage_backend_extra_config": given}
    reply = put(server, **both)
    assert reply.status_code == 400 and "send one of them" in reply.text


@pytest.mark.parametrize("name", ["hicache_storage_backend_extra_config_json", "hicache_storage_backend_extra_config"])
def test_an_extra_config_is_not_a_book(server: FakeServer, name: str) -> None:
    reply = put(server, **{name: json.dumps({"file_storage_path": "/" + "x" * 300_000})})
    assert reply.status_code == 400 and "no extra config needs more" in reply.text
    assert len(reply.text) < 1000 and nothing_was_sent(server)


def test_a_second_name_is_no_way_around_the_redaction(server: FakeServer) -> None:
    reply = put(server, hicache_storage_backend_extra_config={"password": "hunter2", "colour": 1})
    assert reply.status_code == 400 and "colour" in reply.text
    assert "hunter2" not in reply.text


# ------------------------------------------------------------------------------------------------ dry run


def report(rank: int) -> wire.DryRunReport:
    if rank == 0:
        steps = [wire.DryRunStep(name="connect", took_s=0.01), wire.DryRunStep(name="write", took_s=0.02)]
        return wire.DryRunReport(steps=steps, write_page_s=0.02, write_rate=5e6, info={"url": "redis://joe:pw1@host"})
    return wire.DryRunReport(failed_step="connect", code="refused", reason="redis://joe:pw1@host refused")


def test_a_dry_run_tells_what_each_rank_found(server: FakeServer) -> None:
    server.answer_report = report
    reply = put(server, dry_run=True, switch=True, timeout_s=7)
    assert reply.status_code == 200 and not server.commands(wire.AttachStorage)
    tried = server.commands(wire.DryRunStorage)
    assert sorted(rank for rank, _ in server.sent) == [0, 1]
    assert (tried[0].backend, tried[0].extra_config_json, tried[0].deadline_s) == ("file", "{}", 7)
    found = reply.json()
    assert (found["ok"], found["backend"]) == (True, "file")
    first, second = found["ranks"]
    assert [step["name"] for step in first["steps"]] == ["connect", "write"]
    assert first["write_rate"] == 5e6 and first["ok"] is True
    assert (second["failed_step"], second["code"]) == ("connect", "refused")
    assert "pw1" not in reply.text


def test_a_dry_run_that_fails_on_one_rank_is_a_400(server: FakeServer) -> None:
    server.answer_report = report
    server.answer_command = lambda rank, command: (rank == 0, "")
    reply = put(server, dry_run=True)
    assert reply.status_code == 400
    assert server.commands(wire.DryRunStorage)[0].deadline_s == server.config.storage.attach_timeout_s
    assert reply.json()["ok"] is False and [rank["ok"] for rank in reply.json()["ranks"]] == [True, False]
    ended = operation(server, reply.headers["X-HiCache-Operation"]).json()
    assert (ended["kind"], ended["state"]) == ("dry_run", "failed")
    assert ended["ranks"][1]["report"]["code"] == "refused"


def test_a_dry_run_that_a_rank_does_not_answer_is_unknown(server: FakeServer) -> None:
    server.answer_command = lambda rank, command: (True, "") if rank else None
    reply = put(server, dry_run=True)
    assert reply.status_code == 504
    assert reply.json()["ok"] is False and "not answered by rank 0" in reply.json()["message"]
    assert [rank["rank"] for rank in reply.json()["ranks"]] == [1]


def test_the_extra_config_of_a_dry_run_is_checked(server: FakeServer) -> None:
    assert put(server, dry_run=True, hicache_storage_backend_extra_config={"colour": 1}).status_code == 400
    assert nothing_was_sent(server)


# ---------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize(
    ("method", "path", "body", "kind"),
    [
        ("PUT", PATH, FILE, "attach"),
        ("PUT", PATH, FILE | {"switch": True}, "switch"),
        ("PUT", PATH, FILE | {"dry_run": True}, "dry_run"),
        ("DELETE", PATH, None, "detach"),
        ("POST", f"{PATH}/clear", None, "clear"),
        ("POST", "/flush_cache", None, "flush"),
    ],
)
def test_every_command_is_an_operation(server: FakeServer, method: str, path: str, body: Any, kind: str) -> None:
    for ok, state in ((True, "succeeded"), (False, "failed")):
        server.answer_command = lambda rank, command, ok=ok: (ok, f"said by {rank}")
        reply = server.call(method, path, json=body, headers=ADMIN)
        told = operation(server, reply.headers["X-HiCache-Operation"]).json()
        assert (told["kind"], told["state"], told["message"]) == (kind, state, "said by 0 | said by 1")
        assert [(rank["rank"], rank["success"], rank["message"]) for rank in told["ranks"]] == [
            (0, ok, "said by 0"),
            (1, ok, "said by 1"),
        ]
        assert told["began"] <= told["ended"] and told["began"].endswith("Z") and told["took_s"] >= 0


def test_operations_are_listed_newest_first(server: FakeServer) -> None:
    ids = [put(server, mode="drain").headers["X-HiCache-Operation"] for _ in range(3)]
    listed = server.call("GET", OPERATIONS, headers=ADMIN).json()["operations"]
    assert [each["id"] for each in listed] == list(reversed(ids))
    assert (listed[0]["mode"], listed[0]["backend"]) == ("drain", "file")
    assert all(len(each) >= 20 for each in ids), "nobody may guess one"


def test_a_late_answer_completes_its_operation(server: FakeServer) -> None:
    """1. One rank is silent, the client hears 504. 2. The rank speaks. 3. The operation tells how it ended."""
    server.answer_command = lambda rank, command: (True, "attached") if rank == 0 else None
    reply = put(server)
    assert reply.status_code == 504
    operation_id = reply.headers["X-HiCache-Operation"]
    told = operation(server, operation_id).json()
    assert (told["state"], [rank["rank"] for rank in told["ranks"]]) == ("unknown", [0])
    late = wire.CommandAnswer(id=operation_id, rank=1, success=False, message="could not")
    server.desk.deliver(late)
    told = operation(server, operation_id).json()
    assert (told["state"], told["message"]) == ("failed", "attached | could not")


def test_an_asynchronous_command_is_answered_at_once(patient: FakeServer) -> None:
    server = patient

    async def scenario() -> None:
        gate: list[Callable[[], None]] = []

        def hold(rank: int, command: Any) -> None:
            answer = wire.CommandAnswer(id=command.id, rank=rank, success=True, message="done")
            gate.append(lambda: server.desk.deliver(answer))

        server.answer_command = hold
        for request in (
            server.request("PUT", PATH, json=FILE | {"async": True}, headers=ADMIN),
            server.request("DELETE", f"{PATH}?async=true", headers=ADMIN),
            server.request("PUT", PATH, json=FILE | {"async": True, "dry_run": True}, headers=ADMIN),
        ):
            reply = await request
            assert reply.status_code == 202
            accepted = reply.json()
            url, operation_id = accepted["status_url"], accepted["operation_id"]
            assert url == reply.headers["Location"] == f"{OPERATIONS}/{operation_id}"
            assert reply.headers["X-HiCache-Operation"] == operation_id
            told = (await server.request("GET", url, headers=ADMIN)).json()
            assert (told["state"], told["ended"], told["ranks"]) == ("running", None, [])
            status = (await server.request("GET", PATH, headers=ADMIN)).json()
            assert [each["id"] for each in status["operation"]] == [operation_id]
            for answer in gate:
                answer()
            gate.clear()
            while (told := (await server.request("GET", url, headers=ADMIN)).json())["state"] == "running":
                await asyncio.sleep(0)
            assert told["state"] == "succeeded"

    server.run(scenario())


def test_a_refused_body_is_refused_at_once_even_if_asynchronous(server: FakeServer) -> None:
    assert put(server, **{"async": True, "mode": "gently"}).status_code == 400
    assert nothing_was_sent(server)


def test_running_operations_are_never_forgotten(patient: FakeServer) -> None:
    server = patient

    async def scenario() -> None:
        server.answer_command = lambda rank, command: None
        running = (await server.request("PUT", PATH, json=FILE | {"async": True}, headers=ADMIN)).json()
        while not server.commands(wire.AttachStorage):
            await asyncio.sleep(0)
        server.answer_command = lambda rank, command: (True, "done")
        ids = []
        for _ in range(MOST_REMEMBERED + 3):
            reply = await server.request("POST", "/flush_cache", headers=ADMIN)
            ids.append(reply.headers["X-HiCache-Operation"])
        listed = (await server.request("GET", OPERATIONS, headers=ADMIN)).json()["operations"]
        assert len(listed) == MOST_REMEMBERED
        assert listed[-1]["id"] == running["operation_id"], "the oldest, and the only one that still runs"
        assert (await server.request("GET", f"{OPERATIONS}/{ids[0]}", headers=ADMIN)).status_code == 404

    server.run(scenario())


# --------------------------------------------------------------------------------------------------- cancel


class Ranks:
    """Ranks that hold every command but a cancel, and answer both as they are told."""

    def __init__(self, server: FakeServer, *, can_cancel: bool) -> None:
        self.server = server
        self.held: list[tuple[int, Any]] = []
        server.answer_command = self.hear
        self.can_cancel = can_cancel

    def hear(self, rank: int, command: Any) -> tuple[bool, str] | None:
        if not isinstance(command, wire.CancelCommand):
            self.held.append((rank, command))
            return None
        if self.can_cancel:  # in the tick of the cancel, and said before it
            self.answer(rank, success=False, message="cancelled")
        return self.can_cancel, "given up" if self.can_cancel else "it drains already"

    def answer(self, rank: int, *, success: bool, message: str) -> None:
        for holder, command in self.held:
            if holder == rank:
                answer = wire.CommandAnswer(id=command.id, rank=rank, success=success, message=message)
                self.server.desk.deliver(answer)


def test_cancel(patient: FakeServer) -> None:
    server = patient

    async def scenario() -> None:
        Ranks(server, can_cancel=True)
        accepted = (await server.request("PUT", PATH, json=FILE | {"async": True}, headers=ADMIN)).json()
        reply = await server.request("DELETE", accepted["status_url"], headers=ADMIN)
        assert reply.status_code == 200 and reply.json()["cancelled"] is True
        told = (await server.request("GET", accepted["status_url"], headers=ADMIN)).json()
        assert (told["state"], told["message"]) == ("cancelled", "cancelled")
        cancel = (await server.request("GET", f"{OPERATIONS}/{reply.json()['operation_id']}", headers=ADMIN)).json()
        assert (cancel["kind"], cancel["target"], cancel["state"]) == ("cancel", told["id"], "succeeded")
        assert {command.target for command in server.commands(wire.CancelCommand)} == {told["id"]}
        again = await server.request("DELETE", accepted["status_url"], headers=ADMIN)
        assert again.status_code == 409 and "cancelled" in again.json()["error"]["message"]

    server.run(scenario())


def test_who_waits_for_a_cancelled_command_hears_that_it_failed(patient: FakeServer) -> None:
    server = patient

    async def scenario() -> None:
        ranks = Ranks(server, can_cancel=True)
        waiting = asyncio.ensure_future(server.request("PUT", PATH, json=FILE, headers=ADMIN))
        while not ranks.held:
            await asyncio.sleep(0)
        await server.request("DELETE", f"{OPERATIONS}/{ranks.held[0][1].id}", headers=ADMIN)
        reply = await waiting
        assert reply.status_code == 400 and "cancelled" in reply.text

    server.run(scenario())


def test_a_cancel_that_the_ranks_refuse_changes_nothing(patient: FakeServer) -> None:
    server = patient

    async def scenario() -> None:
        ranks = Ranks(server, can_cancel=False)
        accepted = (await server.request("DELETE", f"{PATH}?async=true&mode=drain", headers=ADMIN)).json()
        reply = await server.request("DELETE", accepted["status_url"], headers=ADMIN)
        assert reply.status_code == 400
        assert (reply.json()["cancelled"], reply.json()["message"]) == (False, "it drains already")
        assert reply.json()["target"]["state"] == "running"
        for rank in (0, 1):
            ranks.answer(rank, success=False, message="no")
        while (told := (await server.request("GET", accepted["status_url"], headers=ADMIN)).json())["ended"] is None:
            await asyncio.sleep(0)
        assert told["state"] == "failed", "that it failed has nothing to do with the cancel"

    server.run(scenario())


def test_what_cannot_be_cancelled(server: FakeServer) -> None:
    unknown = server.call("DELETE", f"{OPERATIONS}/0123", headers=ADMIN)
    assert unknown.status_code == 404 and "0123" in unknown.json()["error"]["message"]
    ended = server.call("DELETE", f"{OPERATIONS}/{put(server).headers['X-HiCache-Operation']}", headers=ADMIN)
    assert ended.status_code == 409 and "ended already" in ended.json()["error"]["message"]
    assert not server.commands(wire.CancelCommand)


def test_a_cancel_is_not_cancelled(patient: FakeServer) -> None:
    server = patient

    async def scenario() -> None:
        server.answer_command = lambda rank, command: None
        accepted = (await server.request("PUT", PATH, json=FILE | {"async": True}, headers=ADMIN)).json()
        cancel = asyncio.ensure_future(server.request("DELETE", accepted["status_url"], headers=ADMIN))
        while not server.commands(wire.CancelCommand):
            await asyncio.sleep(0)
        cancel_id = server.commands(wire.CancelCommand)[0].id
        reply = await server.request("DELETE", f"{OPERATIONS}/{cancel_id}", headers=ADMIN)
        assert reply.status_code == 409 and "itself a cancel" in reply.json()["error"]["message"]
        for rank in (0, 1):
            server.desk.deliver(wire.CommandAnswer(id=cancel_id, rank=rank, success=True))
        assert (await cancel).status_code == 200

    server.run(scenario())


# --------------------------------------------------------------------------------------- what else is told


def test_status_tells_places_and_breaker(server: FakeServer) -> None:
    places = [
        wire.Place(role="current", state="attached", epoch=3, backend="file", in_flight=2),
        wire.Place(role="candidate", state="attaching", epoch=4, backend="memory"),
    ]
    breaker = wire.BreakerStatus(state="open", level="failover", reason="redis://joe:pw1@host", serving="standby 1")
    server.answer_status = lambda rank: {
        "state": "attached", "epoch": 3, "backend": "file", "places": places, "breaker": breaker,
    }  # fmt: skip
    reply = server.call("GET", PATH, headers=ADMIN)
    status = reply.json()
    roles = [(place["role"], place["state"], place["backend"]) for place in status["ranks"][1]["places"]]
    assert roles == [("current", "attached", "file"), ("candidate", "attaching", "memory")]
    assert (status["breaker"]["state"], status["breaker"]["serving"]) == ("open", "standby 1")
    assert "pw1" not in reply.text


def test_incidents_have_moments(server: FakeServer) -> None:
    incidents = [
        wire.Incident(number=1, kind="cold_start", cause="start", began_s_ago=90.0, ended_s_ago=60.0, requests=2),
        wire.Incident(number=2, kind="outage", cause="redis://joe:pw1@host is gone", backend="file", began_s_ago=5.0),
    ]
    server.answer_status = lambda rank: {"state": "attached", "epoch": 3, "incidents": incidents}
    reply = server.call("GET", "/hicache/incidents", headers=ADMIN)
    assert reply.status_code == 200 and "pw1" not in reply.text
    first, second = reply.json()["incidents"]
    assert (first["kind"], first["requests"], first["lasted_s"], first["backend"]) == ("cold_start", 2, 30.0, None)
    assert (second["number"], second["ended"], second["lasted_s"]) == (2, None, 5.0)
    assert first["began"] < first["ended"] < second["began"]
    server.answer_status = lambda rank: None
    assert server.call("GET", "/hicache/incidents", headers=ADMIN).status_code == 503


def test_the_new_routes_are_closed_without_an_admin_key(serve: Callable[..., FakeServer]) -> None:
    server = serve(admin_api_key="", api_key=API_KEY)
    headers = {"Authorization": f"Bearer {API_KEY}"}
    for method, path in (
        ("GET", OPERATIONS),
        ("GET", f"{OPERATIONS}/x"),
        ("DELETE", f"{OPERATIONS}/x"),
        ("GET", "/hicache/incidents"),
    ):
        reply = server.call(method, path, headers=headers)
        assert reply.status_code == 400 and "--admin-api-key" in reply.json()["error"]
        assert server.call(method, path).status_code == 401
    assert server.sent == []


def test_no_cancel_while_shutting_down(server: FakeServer) -> None:
    operation_id = put(server).headers["X-HiCache-Operation"]
    server.lifecycle.phase = Phase.DRAINING
    assert server.call("DELETE", f"{OPERATIONS}/{operation_id}", headers=ADMIN).status_code == 503


def test_a_defect_leaves_no_operation_running(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(message: Any) -> bool:
        raise RuntimeError("a defect")

    monkeypatch.setattr(server.ports[0], "send", broken)
    reply = put(server)
    assert reply.status_code == 504 and "met a defect" in reply.text
    monkeypatch.undo()
    assert operation(server, reply.headers["X-HiCache-Operation"]).json()["state"] == "unknown"


def test_a_config_file_on_a_disk_that_hangs_holds_nobody_up(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attach waits for its file; others are answered meanwhile."""
    (tmp_path / "config.json").write_text("{}")
    config = make_config(model)
    folder = structs.replace(config.storage, config_dir=str(tmp_path), attach_timeout_s=60.0)
    server = FakeServer(structs.replace(config, storage=folder))
    begun, answered = threading.Event(), threading.Event()
    read = extra_config.os.read
    waited: list[bool] = []

    def hang(descriptor: int, size: int) -> bytes:
        begun.set()
        waited.append(answered.wait(20))
        return read(descriptor, size)

    async def scenario() -> Any:
        body = FILE | {"hicache_storage_backend_extra_config_json": "@config.json"}
        attach = asyncio.ensure_future(server.request("PUT", PATH, json=body, headers=ADMIN))
        while not begun.is_set():
            await asyncio.sleep(0)
        assert (await server.request("GET", PATH, headers=ADMIN)).status_code == 200
        answered.set()
        return await attach

    with monkeypatch.context() as patched:
        patched.setattr(extra_config.os, "read", hang)
        assert server.run(scenario()).status_code == 200
    assert waited == [True], "the file was read beside the loop"
    server.close()


def test_dry_runs_are_given_up_all_at_once_when_the_server_ends(patient: FakeServer) -> None:
    """Ranks that are silent cost the end of the server one deadline, and not one for each dry run."""

    async def scenario() -> None:
        ids = [
            (await patient.request("PUT", PATH, json=FILE | {"dry_run": True, "async": True, "timeout_s": 60},
                                   headers=ADMIN)).json()["operation_id"]
            for _ in range(3)
        ]  # fmt: skip
        end = asyncio.ensure_future(patient.control.give_up_dry_runs())
        deadline = asyncio.get_running_loop().time() + 5.0
        while {message.target for message in patient.commands(wire.CancelCommand)} != set(ids):
            assert asyncio.get_running_loop().time() < deadline, "the second waits for the first"
            await asyncio.sleep(0)
        end.cancel()

    patient.answer_command = lambda rank, command: None
    patient.run(scenario())
