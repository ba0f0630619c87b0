"""A saboteur around any backend: does to its calls what the field has done to others.

For tests and drills only; a server refuses it unless it was started with SGLANG_HICACHE_ALLOW_FAULTY=1.  Every fault
is decided by the number of the call or page, never by time or chance; a control file (`fault_control.py`) changes them
while the backend works, in every process that has it open.  Kinds, by what they hit:

    any call    error, no_space   StorageError             exception     an error that is none of ours
                none, short_list, wrong_type               answers against the contract
                slow   takes `delay_ms` longer             twice   is made twice, and the second answer counts
                hold   waits at a `Gate` until let through      crash   the process dies
                hang   never returns; with a control file: until that says "hang" no more of this call
    read        flip   one bit differs from what is stored
                short  an object of another size; with `at`: filled up to there, and called whole all the same
                disappear   gone before the read           duplicate   the page read before it, under this name
    write       flip   one bit is stored wrong             short   cut at `at`, or in the middle, and called written
                disappear   called written, and is not     duplicate   the page written before it, under this name
    exists      stale  says that all pages are there       disappear   says that none is

Error and no_space hit single pages of a read or write, and whole calls of any other kind.

Threads: as any backend.  A held call holds only its own lane.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from sglang_hicache.errors import StorageError
from sglang_hicache.storage.backend import Capabilities, PageOutcome, PageResult, StorageBackend
from sglang_hicache.storage.fault_control import FaultControl
from sglang_hicache.storage.faulty_settings import Fault, FaultySettings
from sglang_hicache.storage.page_format import HEADER_BYTES, IncomingPage, OutgoingPage, PageName

_PAGE_KINDS = ("error", "no_space", "flip", "short", "disappear", "duplicate")

#: How often a hanging call looks whether the control file lets it go.
_LOOK_S = 0.02


class SabotageError(RuntimeError):
    """Stands for any error of a library that a backend forgot to translate."""


class Gate:
    """A place where a backend stops and says "I am inside" until the test says "go on".  Two pipes with names, so that
    it works across processes and without a clock."""

    def __init__(self, folder: Path) -> None:
        for name in ("inside", "go"):
            os.mkfifo(folder / name, 0o600)
        self.folder = folder
        # Opened for both directions, so that neither side ever waits for the other one to open.
        self._inside = os.open(folder / "inside", os.O_RDWR)
        self._go = os.open(folder / "go", os.O_RDWR)

    def wait_inside_blocking(self, timeout_s: float = 10.0) -> None:
        """Return when a call has arrived at the gate."""
        poll = select.poll()
        poll.register(self._inside, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            raise TimeoutError(f"nobody came to the gate {self.folder} in {timeout_s} s")
        os.read(self._inside, 1)

    def go(self) -> None:
        """Let one call through, the one that waits or the next one."""
        os.write(self._go, b"g")

    def close(self) -> None:
        """Take the gate down; the pipes stay for a call that still waits in them."""
        os.close(self._inside)
        os.close(self._go)

    @staticmethod
    def pass_blocking(folder: str) -> None:
        """The backend's side: say that you are here and wait."""
        inside = os.open(Path(folder, "inside"), os.O_WRONLY)
        try:
            os.write(inside, b"i")
        finally:
            os.close(inside)
        go = os.open(Path(folder, "go"), os.O_RDONLY)
        try:
            os.read(go, 1)
        finally:
            os.close(go)


class _Forged:
    """Bytes under a page's name: what a backend uses of an `OutgoingPage`, with other content."""

    def __init__(self, page: OutgoingPage, stored: bytes | bytearray) -> None:
        self.name = page.name
        self.parent = page.parent
        self.depth = page.depth
        self.payload = memoryview(stored)[HEADER_BYTES:]
        self.size_bytes = len(stored)
        self._header = bytes(stored[:HEADER_BYTES])

    def header(self) -> bytes:
        return self._header

    def chunks(self) -> Iterator[tuple[int, memoryview]]:
        yield 0, self.payload


class FaultyBackend(StorageBackend):
    """Another backend, sabotaged."""

    def __init__(self, settings: FaultySettings, inside: Sequence[StorageBackend]) -> None:
        (inner,) = inside
        self._inner = inner
        self._faults = dict(settings.faults)
        self._control = FaultControl(settings.control) if settings.control else None
        self._numbers: Counter[str] = Counter()
        self._hits: Counter[str] = Counter()
        #: By call, the whole object that was read or written last: what "duplicate" puts under another name.
        self._last: dict[str, bytes] = {}
        self.capabilities = Capabilities(
            late_io=settings.late_io or inner.capabilities.late_io, durable=inner.capabilities.durable
        )

    def sabotage(self, faults: Mapping[str, Fault]) -> None:
        """From now on these faults and no others, calls and pages counted anew."""
        self._faults = dict(faults)
        self._numbers.clear()

    def open_blocking(self) -> None:
        self._sabotaged("open", self._inner.open_blocking)

    def exists_blocking(self, names: Sequence[PageName]) -> int:
        return self._sabotaged("exists", lambda: self._inner.exists_blocking(names), len(names))

    def read_blocking(self, pages: Sequence[IncomingPage]) -> list[PageOutcome]:
        if fault := self._page_fault("read"):
            return _until_one_fails(lambda page: self._read(page, fault), pages)
        return self._sabotaged("read", lambda: self._inner.read_blocking(pages))

    def write_blocking(self, pages: Sequence[OutgoingPage]) -> list[PageOutcome]:
        if fault := self._page_fault("write"):
            return _until_one_fails(lambda page: self._write(page, fault), pages)
        return self._sabotaged("write", lambda: self._inner.write_blocking(pages))

    def delete_blocking(self, names: Sequence[PageName]) -> int:
        return self._sabotaged("delete", lambda: self._inner.delete_blocking(names))

    def set_aside_blocking(self, name: PageName) -> bool:
        return self._sabotaged("set_aside", lambda: self._inner.set_aside_blocking(name))

    def clear_blocking(self, namespace: str) -> int:
        return self._sabotaged("clear", lambda: self._inner.clear_blocking(namespace))

    def touch_blocking(self, names: Sequence[PageName]) -> None:
        self._sabotaged("touch", lambda: self._inner.touch_blocking(names))

    def use_namespace(self, namespace: str) -> None:
        self._inner.use_namespace(namespace)

    def info(self) -> dict[str, str]:
        control = {"control": self._control.path} if self._control else {}
        return self._inner.info() | {"sabotaged": ",".join(self._faults)} | control

    def stats(self) -> dict[str, int]:
        return self._inner.stats() | {f"faults_{call}": count for call, count in self._hits.items()}

    def close_blocking(self) -> None:
        self._sabotaged("close", self._inner.close_blocking)

    def _fault(self, call: str) -> Fault | None:
        """What goes wrong in this kind of call now."""
        if self._control is not None and (changed := self._control.changed()) is not None:
            self.sabotage(changed)
        return self._faults.get(call)

    def _page_fault(self, call: str) -> Fault | None:
        """The same, if it is one that strikes single pages."""
        fault = self._fault(call)
        return fault if fault is not None and fault.kind in _PAGE_KINDS else None

    def _hang_blocking(self, call: str) -> None:
        """A thread that hangs in a library is beyond help; one that a drill holds comes back when the drill says so."""
        while self._control is None or ((fault := self._fault(call)) is not None and fault.kind == "hang"):
            threading.Event().wait(None if self._control is None else _LOOK_S)

    def _struck(self, call: str, fault: Fault) -> int | None:
        """Counts the call or page; its number if the fault hits it."""
        number = self._numbers[call]
        self._numbers[call] += 1
        if number < fault.first or (fault.count is not None and number >= fault.first + fault.count):
            return None
        if xxhash.xxh3_64_intdigest(f"{call} {number}".encode()) >= fault.share * 2**64:
            return None
        self._hits[call] += 1
        return number

    def _sabotaged(self, name: str, call: Callable[[], Any], asked: int = 0) -> Any:
        """A whole call, with what goes wrong before or after it; `asked`: what `exists` was asked for."""
        fault = self._fault(name)
        if fault is None or self._struck(name, fault) is None:
            return call()
        match fault.kind:
            case "error" | "no_space":
                raise _error(fault, name)
            case "exception":
                raise SabotageError(f"sabotaged {name}")
            case "slow":
                threading.Event().wait(fault.delay_ms / 1000)
            case "twice":
                call()
            case "hold":
                Gate.pass_blocking(fault.gate)
            case "hang":
                self._hang_blocking(name)
            case "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stale":
                return asked
            case "disappear":
                return 0
        answer = call()
        match fault.kind:
            case "none":
                return None
            case "wrong_type":
                return "yes"
            case "short_list":
                return answer[:-1]
        return answer

    def _read(self, page: IncomingPage, fault: Fault) -> PageOutcome:
        number = self._struck("read", fault)
        if number is not None and fault.kind in ("error", "no_space"):
            return _error(fault, "read")
        if number is not None and fault.kind == "disappear":
            self._inner.delete_blocking([page.name])
        if number is None and fault.kind != "duplicate":
            return _only(self._inner.read_blocking([page]))
        before = bytes(HEADER_BYTES) + page.payload
        outcome = _only(self._inner.read_blocking([page]))
        if outcome is not PageResult.HIT:
            return outcome
        whole = page.header + page.payload
        last = self._last.get("read", whole)
        self._last["read"] = bytes(whole)
        if number is None:
            return outcome
        match fault.kind:
            case "short" if fault.at is None:
                return PageResult.WRONG_SIZE
            case "short":
                whole[fault.at :] = before[fault.at :]
            case "flip":
                _flip(whole, fault, number)
            case "duplicate" if len(last) == len(whole):
                whole[:] = last
        # What the inner backend let the page hash is older than the damage.
        page.restart()
        page.header[:], page.payload[:] = whole[:HEADER_BYTES], whole[HEADER_BYTES:]
        return outcome

    def _write(self, page: OutgoingPage, fault: Fault) -> PageOutcome:
        number = self._struck("write", fault)
        if number is not None and fault.kind in ("error", "no_space"):
            return _error(fault, "write")
        if number is None and fault.kind != "duplicate":
            return _only(self._inner.write_blocking([page]))
        payload = b"".join(chunk for _, chunk in page.chunks())
        stored = bytearray(page.header() + payload)
        last = self._last.get("write", stored)
        self._last["write"] = bytes(stored)
        if number is None:
            return _only(self._inner.write_blocking([page]))
        match fault.kind:
            case "disappear":
                return PageResult.WRITTEN
            case "short":
                del stored[len(stored) // 2 if fault.at is None else fault.at :]
            case "flip":
                _flip(stored, fault, number)
            case "duplicate":
                stored = last
        return _only(self._inner.write_blocking([_Forged(page, stored)]))


def _until_one_fails(call: Callable[[Any], PageOutcome], pages: Sequence[Any]) -> list[PageOutcome]:
    """Page by page, and not behind one that failed: nobody would use what comes after it."""
    outcomes: list[PageOutcome] = []
    for page in pages:
        outcomes.append(call(page))
        if isinstance(outcomes[-1], StorageError):
            break
    return outcomes


def _flip(stored: bytearray, fault: Fault, number: int) -> None:
    """Change one bit of a stored object."""
    spread = xxhash.xxh3_64_intdigest(f"bit {number}".encode())
    at = spread // 8 % len(stored) if fault.at is None else min(fault.at, len(stored) - 1)
    stored[at] ^= 1 << spread % 8


def _only(outcomes: list[PageOutcome]) -> PageOutcome:
    return outcomes[0]


def _error(fault: Fault, call: str) -> StorageError:
    return StorageError(f"sabotaged {call}", "no_space" if fault.kind == "no_space" else "io")
