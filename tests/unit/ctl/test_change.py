"""Attach, switch, detach, dry run and clear: what is sent, what is waited for, and how each end is told."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache.ctl import operations
from tests.unit.ctl.answers import ID, operation
from tests.unit.ctl.conftest import Ran
from tests.unit.ctl.fake import FakeServer, Said

Run = Callable[..., Ran]
STORAGE, OPERATION = "/hicache/storage-backend", f"/hicache/operations/{ID}"
ACCEPTED = Said({"operation_id": ID, "status_url": OPERATION}, 202, ID)
STEP_NAMES = ("connect", "write", "exists", "read", "compare", "delete")


@pytest.fixture(autouse=True)
def answers(server: FakeServer) -> None:
    for method in ("PUT", "DELETE"):
        server.says(method, STORAGE, ACCEPTED)
    server.says("GET", OPERATION, Said(operation("running")), Said(operation()))


@pytest.mark.parametrize(
    ("line", "body"),
    [
        ("attach file", {"hicache_storage_backend": "file", "mode": "drain", "async": True}),
        (
            "attach memory --mode idle --prefetch-policy timeout --write-policy write_back",
            {
                "hicache_storage_backend": "memory", "mode": "idle", "async": True,
                "hicache_storage_prefetch_policy": "timeout", "hicache_write_policy": "write_back",
            },
        ),
        (
            'switch file --force --timeout 2.5 --extra-config {"fsync":"none"}',
            {
                "hicache_storage_backend": "file", "mode": "force", "async": True, "timeout_s": 2.5, "switch": True,
                "hicache_storage_backend_extra_config_json": '{"fsync": "none"}',
            },
        ),
        ("detach", {"mode": "drain", "async": True}),
        ("detach --mode force", {"mode": "force", "async": True}),
    ],
)  # fmt: skip
def test_what_is_sent(server: FakeServer, run: Run, line: str, body: dict[str, Any]) -> None:
    ran = run(*line.split())
    assert (ran.code, ran.err) == (0, "")
    assert (server.asked[0].method, server.asked[0].body) == ("DELETE" if "detach" in line else "PUT", body)
    assert ran.out == "attach succeeded after 0.2 s: the ranks' words\n"
    assert [asked.path for asked in server.asked[1:]] == [OPERATION, OPERATION]


@pytest.mark.parametrize(
    ("state", "code"), [("succeeded", 0), ("failed", 1), ("cancelled", 1), ("unknown", 4)]
)
def test_each_end_has_its_code(server: FakeServer, run: Run, state: str, code: int) -> None:
    server.says("GET", OPERATION, Said(operation(state)))
    ran = run("attach", "file")
    assert ran.code == code and f"attach {state}" in (ran.err if code else ran.out)
    ran = run("attach", "file", "--json")
    assert ran.code == code and ran.err == ""
    told = json.loads(ran.out)
    assert told["ok"] is (code == 0) and told["operation_id"] == ID
    assert told["operation"]["state"] == state and "the ranks' words" in told["message"]


def test_a_refusal_begins_nothing(server: FakeServer, run: Run) -> None:
    server.says("PUT", STORAGE, Said("Failed to attach HiCache storage backend.\nunknown backend 'fil'", 400))
    ran = run("attach", "fil")
    assert ran.code == 1 and ran.out == ""
    assert ran.err.splitlines() == ["error: Failed to attach HiCache storage backend.", "unknown backend 'fil'"]
    ran = run("attach", "fil", "--json")
    assert ran.code == 1 and json.loads(ran.out)["ok"] is False and "unknown backend 'fil'" in ran.out
    assert {asked.path for asked in server.asked} == {STORAGE}


def test_no_wait(server: FakeServer, run: Run) -> None:
    ran = run("detach", "--no-wait")
    assert ran.code == 0 and f"hicachectl operations wait {ID}" in ran.out
    assert json.loads(run("detach", "--no-wait", "--json").out)["operation_id"] == ID
    assert {asked.method for asked in server.asked} == {"DELETE"}


def test_ctrl_c_says_that_it_goes_on_and_where_to_look(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(client: object, operation_id: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(operations, "_ask", interrupt)
    ran = run("switch", "file")
    assert ran.code == 130
    assert f"operation {ID} goes on" in ran.err
    assert f"operations wait {ID}" in ran.err and f"operations cancel {ID}" in ran.err


def test_an_id_is_shown_and_not_obeyed(server: FakeServer, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_SILENCE_S", 0.0)
    server.says("PUT", STORAGE, Said({}, 202, "id\x1b[2J"))
    assert "\\x1b" in (ran := run("attach", "file")).err and "\x1b" not in ran.out + ran.err


@pytest.mark.parametrize("told", [[], {}, '"x"', {"state": "running"}, 7])
def test_what_is_no_operation_is_no_end_of_one(server: FakeServer, run: Run, told: object) -> None:
    """The change has begun: neither yes nor no."""
    server.says("GET", OPERATION, Said(told))
    ran = run("attach", "file")
    assert ran.code == 4 and "is no operation" in ran.err


def test_a_long_wait_says_what_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_SILENCE_S", 0.0)
    ran = run("attach", "file", "--json")
    assert ran.code == 0 and json.loads(ran.out)["ok"] is True
    assert ran.err == f"waiting for operation {ID}; Ctrl-C ends the waiting, not the operation\n"


def test_a_server_that_is_gone_while_it_is_waited_for(
    server: FakeServer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have ended before the server did: neither yes nor no."""
    monkeypatch.setattr(operations, "_PATIENCE_S", 0.0)
    server.says("GET", OPERATION, Said(operation("running")), Said(status=0))
    ran = run("attach", "file")
    assert ran.code == 4 and f"how operation {ID} ended is not known" in ran.err


def test_a_server_that_was_started_anew_while_it_is_waited_for(server: FakeServer, run: Run) -> None:
    forgotten = Said({"error": {"message": "no operation is known here"}}, 404)
    server.says("GET", OPERATION, Said(operation("running")), forgotten)
    ran = run("attach", "file")
    assert ran.code == 4 and "no operation is known here; how operation" in ran.err


def test_a_server_that_was_busy_for_a_moment(server: FakeServer, run: Run) -> None:
    server.says("GET", OPERATION, Said(status=0), Said(operation("running")), Said(status=0), Said(operation()))
    assert run("attach", "file").code == 0


# ------------------------------------------------------------------------------------------ the extra config


SECRET = '{"password": "hunter2", "path": "/x"}'


@pytest.mark.parametrize("command", ["attach", "switch", "dry-run"])
@pytest.mark.parametrize(
    "config",
    [
        SECRET, '{"url": "redis://me:hunter2@host"}', '{"a": {"access_key": "hunter2"}}',
        '{"fault_tolerance": {"standby": [{"backend": "x", "extra_config": {"token": "hunter2"}}]}}',
        '{"password": "hunter2${env.X}"}',
    ],
)  # fmt: skip
def test_a_secret_on_the_command_line_is_refused(server: FakeServer, run: Run, command: str, config: str) -> None:
    """Every user of the machine reads it in the process list, and the shell keeps it in its history."""
    ran = run(command, "file", "--extra-config", config)
    assert ran.code == 2 and not server.asked
    assert "@FILE" in ran.err and "hunter2" not in ran.out + ran.err


@pytest.mark.parametrize("key", ["hicache_storage_backend_extra_config", "hicache_storage_backend_extra_config_json"])
def test_the_body_of_an_http_attach_is_no_extra_config(server: FakeServer, run: Run, tmp_path: Path, key: str) -> None:
    """The pages of the stores show such files as `attach.json`, and the next command there is one of this tool."""
    (tmp_path / "attach.json").write_text(json.dumps({"hicache_storage_backend": "redis", key: "{}"}))
    ran = run("dry-run", "redis", "--extra-config", f"@{tmp_path / 'attach.json'}")
    assert ran.code == 2 and not server.asked
    assert "the body of an attach over HTTP" in ran.err


def test_a_name_of_a_secret_is_none(server: FakeServer, run: Run) -> None:
    assert run("attach", "file", "--extra-config", '{"password": "${env.STORE_PASSWORD}"}').code == 0


def _sent(server: FakeServer) -> Any:
    return json.loads(server.asked[0].body["hicache_storage_backend_extra_config_json"])


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", SECRET), ("a.toml", 'password = "hunter2"\npath = "/x"'), ("a.yaml", SECRET)]
)
def test_a_secret_in_a_file_is_sent(server: FakeServer, run: Run, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    ran = run("attach", "file", "--extra-config", f"@{tmp_path / name}")
    assert ran.code == 0 and _sent(server) == {"password": "hunter2", "path": "/x"}
    assert "hunter2" not in ran.out + ran.err


def test_a_secret_on_standard_input(server: FakeServer, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(SECRET))
    assert run("switch", "file", "--extra-config", "-").code == 0
    assert _sent(server)["password"] == "hunter2"


@pytest.mark.parametrize(("config", "words"), [("{broken", "JSON"), ("[1]", "object"), ("@nowhere.json", "nowhere")])
def test_a_config_that_cannot_be_read(server: FakeServer, run: Run, config: str, words: str) -> None:
    ran = run("attach", "file", "--extra-config", config)
    assert ran.code == 2 and words in ran.err and not server.asked


@pytest.mark.parametrize("timeout", ["0", "-1", "3601", "nan", "inf", "soon"])
def test_a_timeout_that_is_none(server: FakeServer, run: Run, timeout: str) -> None:
    ran = run("detach", f"--timeout={timeout}")
    assert ran.code == 2 and "number of seconds" in ran.err and not server.asked


# ------------------------------------------------------------------------------------------ dry run and clear


def report(*ranks: dict[str, Any], message: str = "") -> dict[str, Any]:
    return {"ok": all(rank["ok"] for rank in ranks), "backend": "file", "message": message, "ranks": list(ranks)}


def found(rank: int, failed_step: str = "", code: str = "", reason: str = "") -> dict[str, Any]:
    done = STEP_NAMES[: STEP_NAMES.index(failed_step)] if failed_step else STEP_NAMES
    return {
        "rank": rank, "ok": not failed_step, "failed_step": failed_step, "code": code, "reason": reason,
        "steps": [{"name": name, "took_s": 0.0123} for name in done],
        "lookup_s": 0.0, "write_page_s": 0.002, "read_page_s": 1.5, "write_rate": 3.0 * 2**20, "read_rate": 0.0,
        "info": {"path": "/pages\x1b[2J"},
    }  # fmt: skip


def test_a_good_dry_run(server: FakeServer, run: Run) -> None:
    server.says("PUT", STORAGE, Said(report(found(0), found(1))))
    ran = run("dry-run", "file", "--timeout", "3")
    assert ran.code == 0 and ran.err == ""
    assert server.asked[0].body == {"hicache_storage_backend": "file", "dry_run": True, "timeout_s": 3.0}
    lines = ran.out.splitlines()
    assert lines[0] == "file: can be attached; nothing was"
    assert lines[2].split()[:4] == ["rank", "result", "connect", "write"]
    assert lines[4].startswith("1     ok") and "12.3 ms" in lines[4] and "3.0 MiB/s" in lines[4] and "1.5 s" in lines[4]
    assert "path: /pages\\x1b[2J" in ran.out
    assert json.loads(run("dry-run", "file", "--json").out) == report(found(0), found(1))


def test_a_bad_dry_run_names_the_step_the_reason_and_the_page(server: FakeServer, run: Run) -> None:
    bad = [found(rank, "read", "wrong_password", "the store says no") for rank in (0, 2)]
    server.says("PUT", STORAGE, Said(report(bad[0], found(1), bad[1]), 400))
    ran = run("dry-run", "file")
    assert ran.code == 1
    assert "cannot be attached" in ran.out and "read: wrong_password" in ran.out and "FAILED" in ran.out
    assert "- rank 0, 2: the store says no" in ran.out and "docs/runbooks/wrong_password.md" in ran.out


def test_a_dry_run_with_a_silent_rank(server: FakeServer, run: Run) -> None:
    """What the others found is worth reading all the same."""
    told = report(found(0), message="outcome unknown: not answered by rank 1") | {"ok": False}
    server.says("PUT", STORAGE, Said(told, 504))
    ran = run("dry-run", "file")
    assert ran.code == 4 and "not answered by rank 1" in ran.out and "0     ok" in ran.out


def test_a_dry_run_that_was_refused(server: FakeServer, run: Run) -> None:
    server.says("PUT", STORAGE, Said("Failed to attach HiCache storage backend.\nunknown backend", 400))
    ran = run("dry-run", "nope")
    assert ran.code == 1 and "unknown backend" in ran.err


def test_clear_asks_first(server: FakeServer, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    server.says("POST", f"{STORAGE}/clear", Said("Hierarchical cache storage backend cleared.\n", 200, ID))
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))
    ran = run("clear")
    assert ran.code == 2 and "--yes" in ran.err and not server.asked, "nobody is there to be asked"
    terminal = io.StringIO("no\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin", terminal)
    ran = run("clear")
    assert ran.code == 2 and "nothing was deleted" in ran.err and not server.asked
    ran = run("clear", "--yes", "--json")
    assert ran.code == 0 and json.loads(ran.out)["operation_id"] == ID
