"""The saboteur does what it says, where it says, and refuses what could never happen."""

from __future__ import annotations

import time

import pytest

from sglang_hicache.errors import StorageError, UserError
from sglang_hicache.storage.backend import PageResult
from sglang_hicache.storage.checked import ATTEMPTS, BatchResult
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
