"""The saboteur does what it says, where it says, and refuses what could never happen."""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from pathlib import Path

import pytest

from sglang_hicache.errors import StorageError, UserError
from sglang_hicache.storage.backend import PageResult
from sglang_hicache.storage.checked import ATTEMPTS, BatchResult
from sglang_hicache.storage.fault_control import write_faults
from sglang_hicache.storage.faulty_settings import Fault
from sglang_hicache.storage.page_format import HEADER_BYTES, OutgoingPage
from tests.storage import pages
from tests.storage.conftest import Open


def _config(call: str, kind: str, **fault: object) -> dict:
    return {"inner": "memory", "faults": {call: {"kind": kind, **fault}}}


def _write(backend, count: int) -> BatchResult:
    contents = [pages.content(seed) for seed in range(count)]
    return pages.store(backend).write_blocking(pages.keys(count), contents, b"", 0)


def _read(backend, count: int) -> tuple[BatchResult, list[memoryview]]:
    targets = pages.empty(count)
    return pages.store(backend).read_blocking(pages.keys(count), targets), targets


@pytest.mark.parametrize(("call", "kind"), [("exists", "flip"), ("read", "stale"), ("open", "disappear")])
def test_a_fault_that_could_never_strike_is_refused(call: str, kind: str) -> None:
    with pytest.raises(UserError, match=f"fault '{kind}' cannot strike '{call}', only "):
        pages.backend("faulty", _config(call, kind))


@pytest.mark.parametrize("at", [0, 130, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 4095, 10**6])
def test_a_bit_flips_at_the_byte_that_was_named(open_backend: Open, at: int) -> None:
    backend = open_backend("faulty", _config("write", "flip", at=at, count=1))
    page = OutgoingPage(pages.layout(), pages.key(1), pages.content(1), b"", 0)
    backend.write_blocking([page])
    (stored,) = backend._inner._objects.values()
    wanted = page.header() + page.payload
    differs = [index for index in range(len(wanted)) if wanted[index] != stored[index]]
    assert differs == [min(at, HEADER_BYTES + 4095)]
    assert (wanted[differs[0]] ^ stored[differs[0]]).bit_count() == 1


def test_flips_spread_over_header_and_payload(open_backend: Open) -> None:
    backend = open_backend("faulty", _config("write", "flip"))
    where = set()
    for number in range(200):
        page = OutgoingPage(pages.layout(size=256), pages.key(number), pages.content(1, 256), b"", 0)
        backend.write_blocking([page])
        stored = backend._inner._objects[page.name]
        wanted = page.header() + page.payload
        where |= {index // 128 for index in range(len(wanted)) if wanted[index] != stored[index]}
    assert where == {0, 1, 2, 3}


def test_a_page_under_another_name_is_whole_and_refused(open_backend: Open) -> None:
    backend = open_backend("faulty", _config("write", "duplicate", first=1, count=1))
    assert _write(backend, 3).pages == 3
    one, two, _ = backend._inner._objects.values()
    assert one == two
    assert _read(backend, 3)[0] == BatchResult(1, 1, "corrupt: header of another page")


def test_a_forgetful_store_says_written_and_holds_nothing(open_backend: Open) -> None:
    backend = open_backend("faulty", _config("write", "disappear", first=1, count=1))
    assert _write(backend, 3).pages == 3
    assert len(backend._inner._objects) == 2


def test_a_read_that_ends_early_leaves_what_was_there_before(open_backend: Open) -> None:
    backend = open_backend("faulty", _config("read", "short", at=HEADER_BYTES + 1000, count=1))
    _write(backend, 1)
    result, (target,) = _read(backend, 1)
    assert (result.pages, result.corrupt) == (0, 1)
    assert target[:1000] == pages.content(0)[:1000]
    assert not any(target[1000:])


def test_a_call_that_is_made_twice_is_answered_by_the_second(open_backend: Open) -> None:
    backend = open_backend("faulty", _config("write", "twice", count=1))
    page = OutgoingPage(pages.layout(), pages.key(1), pages.content(1), b"", 0)
    assert backend.write_blocking([page]) == [PageResult.PRESENT]


def test_a_slow_call_takes_longer_and_answers_right(open_backend: Open) -> None:
    backend = open_backend("faulty", _config("exists", "slow", delay_ms=30))
    _write(backend, 2)
    begin = time.monotonic()
    assert pages.store(backend).lookup_blocking(pages.keys(3)) == 2
    assert time.monotonic() - begin >= 0.03


@pytest.mark.parametrize("call", ["touch", "set_aside"])
def test_errors_of_every_call_come_out(open_backend: Open, call: str) -> None:
    backend = open_backend("faulty", _config(call, "error"))
    name = pages.layout().name(pages.key(1))
    with pytest.raises(StorageError, match=f"sabotaged {call}"):
        backend.touch_blocking([name]) if call == "touch" else backend.set_aside_blocking(name)


@pytest.mark.parametrize("call", ["read", "write"])
def test_fm50_many_pages_fail_once_and_a_long_batch_goes_through(open_backend: Open, call: str) -> None:
    """A page has several tries of its own: the batch does not end because many pages have needed a second one."""
    backend = open_backend("faulty", _config(call, "error", share=0.05))
    assert _write(backend, 128).pages == 128
    result, targets = _read(backend, 128)
    assert result == BatchResult(128)
    assert targets == [pages.content(seed) for seed in range(128)]
    assert backend.stats()[f"faults_{call}"] > ATTEMPTS


def _controlled(path: Path, **more: object) -> dict:
    return {"inner": "memory", "control": str(path), **more}


def test_a_control_file_changes_the_faults_and_their_counting_while_the_backend_works(
    open_backend: Open, tmp_path: Path
) -> None:
    control = tmp_path / "control.json"
    backend = open_backend("faulty", _controlled(control, faults={"touch": {"kind": "error", "first": 1}}))
    backend.touch_blocking([])  # no file: what the extra config says
    with pytest.raises(StorageError):
        backend.touch_blocking([])
    write_faults(control, {"touch": Fault(kind="error", first=1, count=1)})
    backend.touch_blocking([])
    with pytest.raises(StorageError):
        backend.touch_blocking([])
    backend.touch_blocking([])
    write_faults(control, {})
    for _ in range(3):
        backend.touch_blocking([])
    assert backend.info()["control"] == str(control)


def test_faults_of_a_control_file_that_is_there_already_strike_the_open(open_backend: Open, tmp_path: Path) -> None:
    control = tmp_path / "control.json"
    write_faults(control, {"open": Fault(kind="error")})
    with pytest.raises(StorageError, match="sabotaged open"):
        open_backend("faulty", _controlled(control))


def test_a_pipe_in_the_place_of_a_control_file_holds_nobody(open_backend: Open, tmp_path: Path) -> None:
    os.mkfifo(control := tmp_path / "control.json")
    open_backend("faulty", _controlled(control, faults={"touch": {"kind": "slow"}}))


@pytest.mark.parametrize(
    "text", [b"", b"[]", b'{"faults": {"exists": {"kind": "flip"}}}', b'{"fault": {}}', b'{"\xff": 1}']
)
def test_a_control_file_that_is_not_valid_changes_nothing_and_is_told_once(
    open_backend: Open, tmp_path: Path, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    control = tmp_path / "control.json"
    write_faults(control, {"touch": Fault(kind="error")})
    backend = open_backend("faulty", _controlled(control))
    control.write_bytes(text)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with pytest.raises(StorageError):
                backend.touch_blocking([])
    control.unlink()
    with pytest.raises(StorageError):
        backend.touch_blocking([])
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"the control file {control} says nothing new"
    ]


def test_a_call_that_hangs_comes_back_when_the_control_file_lets_it(open_backend: Open, tmp_path: Path) -> None:
    control = tmp_path / "control.json"
    write_faults(control, {"exists": Fault(kind="hang")})
    backend = open_backend("faulty", _controlled(control))
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(backend.exists_blocking([])))
    thread.start()
    moment = threading.Event()
    while not backend.stats().get("faults_exists"):
        moment.wait(0.001)
    write_faults(control, {"read": Fault(kind="hang")})
    thread.join(30)
    assert answers == [0]


def test_a_control_file_is_for_its_writer_alone_and_leaves_no_draft(tmp_path: Path) -> None:
    control = tmp_path / "control.json"
    write_faults(control, {})
    write_faults(control, {"read": Fault(kind="slow", delay_ms=5)})
    assert stat.S_IMODE(control.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [control]


def test_a_control_file_needs_an_absolute_path() -> None:
    with pytest.raises(UserError, match="absolute path"):
        pages.backend("faulty", {"inner": "memory", "control": "control.json"})
