"""How long a change of the storage takes, alone and under load, and what the requests around it feel.

    python scripts/bench/bench_failover.py [--quick] [--tp N] [--streams N] [--model-path DIR] [--json FILE]

One real server on a file store that can be made sick (`sglang_hicache/storage/faulty.py`), asked over HTTP.  Each of
the changes is made again and again, without load and under streams whose prompts begin with prefixes that mostly only
the store still has:

    detach          drain: what is under way may end
    detach, hung    force, from a store whose every call hangs
    switch          to another folder, and the old one drains
    failover        every call of the store fails, from then until a standby serves; detected, not commanded
    outage          the same without a standby: until the store, which is well again after a while, is back by itself

The answer is what the operator waits for: of a command the time of its reply, of a failover and an outage the time
until storage serves again (of the outage from the moment on when the store is well: what is left of the back-off, and
a try).  Time to first token is of the requests that began within half a second of the change, beside those of the two
seconds before.  Without streams one client keeps asking where a change needs traffic to be noticed.  Tokens again: what
was computed although the store had it, per second of the outage that the server has booked.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from served import Server, share_of_cores

from sglang_hicache.storage.fault_control import write_faults
from sglang_hicache.storage.faulty_settings import Fault
from sglang_hicache.storage.registry import ALLOW_FAULTY_ENV

STORAGE = "/hicache/storage-backend"
PAGE = 64
#: Seconds around a change that count as its own, on both sides, and those before them that it is compared with.
AROUND_S, BEFORE_S = 0.5, 2.0
#: How often the state is asked for while a change that nobody commanded is awaited, and for how long at most.
LOOK_S, PATIENCE_S = 0.02, 60.0
#: Seconds that a store stays sick in an outage.
SICK_S = 3.0


class Sizes(NamedTuple):
    """How much is measured."""

    prefixes: int
    prefix_tokens: int
    tail_tokens: int
    output_tokens: int
    rounds: int


FULL = Sizes(64, 1024, 32, 8, 8)
QUICK = Sizes(24, 512, 32, 4, 1)


class Asked(NamedTuple):
    """One request of the load."""

    began_s: float
    first_token_s: float


class Change(NamedTuple):
    """One change: when it began, when it was answered, and how long the operator waited for it."""

    began_s: float
    ended_s: float
    answer_s: float
    #: Tokens that were computed again, for each second of the outages that belong to it; None: there were none.
    again_per_s: float | None = None


class Load:
    """Streams that ask as long as the block lasts, each request after the one before."""

    def __init__(self, server: Server, sizes: Sizes, streams: int) -> None:
        self._server, self._sizes = server, sizes
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask_blocking, args=(number,)) for number in range(streams)]
        self.asked: list[Asked] = []
        self.failed: list[str] = []

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _ask_blocking(self, number: int) -> None:
        chance = random.Random(number)
        while not self._end.is_set():
            shared = prefix(chance.randrange(self._sizes.prefixes), self._sizes)
            prompt = shared + tokens(chance, self._sizes.tail_tokens)
            began_s = time.perf_counter()
            try:
                answer = self._server.ask(prompt, self._sizes.output_tokens)
            except (SystemExit, httpx.HTTPError) as error:
                self.failed.append(str(error))
            else:
                self.asked.append(Asked(began_s, answer.first_token_s))

    def between(self, began_s: float, ended_s: float) -> list[float]:
        """Times to first token of the requests that began in this time."""
        return [asked.first_token_s for asked in list(self.asked) if began_s <= asked.began_s < ended_s]


def tokens(chance: random.Random, count: int) -> list[int]:
    """Random token ids; the first 300 are left out, special tokens live there."""
    return [chance.randrange(300, 1000) for _ in range(count)]


def prefix(number: int, sizes: Sizes) -> list[int]:
    """One of the prefixes that requests share."""
    return tokens(random.Random(f"prefix {number}"), sizes.prefix_tokens)


class Site:
    """A server, its stores, and the hand that makes the first of them sick."""

    def __init__(self, folder: Path, server: Server) -> None:
        self._folder = folder
        self.server = server
        self._control = folder / "faults.json"
        self._pause = threading.Event()
        self.heal()

    def break_it(self, kind: str) -> None:
        """From now on every call of the first store fails, or hangs."""
        calls = ("open", "exists", "read", "write") if kind == "error" else ("exists", "read", "write")
        write_faults(self._control, {call: Fault(kind=kind) for call in calls})

    def heal(self) -> None:
        """The store is well; calls that hang go on."""
        write_faults(self._control, {})

    def primary(self, **fault_tolerance: Any) -> dict[str, Any]:
        """Body of an attach of the store that can be made sick."""
        inner = {"file_storage_path": str(self._folder / "pages")}
        config = {"inner": "file", "inner_config": inner, "control": str(self._control)}
        return self._body("faulty", config | ({"fault_tolerance": fault_tolerance} if fault_tolerance else {}))

    def standby(self) -> dict[str, Any]:
        """Extra config of the store that takes over: another one on the same folder, which is well."""
        return {"file_storage_path": str(self._folder / "pages"), "fsync": "none"}

    def other(self, number: int) -> dict[str, Any]:
        """Body of an attach of a plain store in a folder of its own."""
        return self._body("file", {"file_storage_path": str(self._folder / f"pages{number % 2}")})

    def _body(self, backend: str, config: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps(config)
        return {"hicache_storage_backend": backend, "hicache_storage_backend_extra_config_json": text}

    def change(self, method: str, **body: Any) -> Change:
        """A command, timed."""
        began_s = time.perf_counter()
        self.server.admin(method, STORAGE, body)
        ended_s = time.perf_counter()
        return Change(began_s, ended_s, ended_s - began_s)

    def restore(self) -> None:
        """The first store is well and attached, and nothing is under way any more."""
        self.heal()
        self.server.admin("PUT", STORAGE, self.primary() | {"switch": True, "mode": "drain"})

    def wait_blocking(self, seconds: float) -> None:
        """Let the load run."""
        self._pause.wait(seconds)

    def wait_for_blocking(self, holds: Callable[[dict[str, Any]], bool], what: str) -> float:
        """Until the status says so; when that was."""
        deadline_s = time.perf_counter() + PATIENCE_S
        while not holds(status := self.server.admin("GET", STORAGE)):
            if time.perf_counter() > deadline_s:
                raise SystemExit(f"never: {what}; last status {json.dumps(status)}")
            self._pause.wait(LOOK_S)
        return time.perf_counter()

    def again_per_s(self, last: int) -> float | None:
        """Tokens computed again per second, over the outages after the one with this number."""
        found = [each for each in self._incidents() if each["number"] > last and each["kind"] == "outage"]
        lasted_s = sum(each["lasted_s"] for each in found)
        return sum(each["reprefilled_tokens"] for each in found) / lasted_s if lasted_s else None

    def last_incident(self) -> int:
        """Number of the latest one, 0 before the first."""
        return max((each["number"] for each in self._incidents()), default=0)

    def _incidents(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.server.admin("GET", "/hicache/incidents")["incidents"]
        return found


# ------------------------------------------------------------------------------------------------- the changes


def detach(site: Site, number: int) -> Change:
    """Drain."""
    return site.change("DELETE", mode="drain")


def detach_hung(site: Site, number: int) -> Change:
    """Force, once the store hangs."""
    site.break_it("hang")
    site.wait_blocking(AROUND_S)
    return site.change("DELETE", mode="force")


def switch(site: Site, number: int) -> Change:
    """To a store that is not the one of the round before."""
    return site.change("PUT", **site.other(number), switch=True, mode="drain")


def failover(site: Site, number: int) -> Change:
    """From the first failure until a standby serves."""
    standby = {"backend": "file", "extra_config": site.standby()}
    body = site.primary(level="failover", standby=[standby], healthy_s=3600)
    site.server.admin("PUT", STORAGE, body | {"switch": True, "mode": "drain"})
    last, began_s = site.last_incident(), time.perf_counter()
    site.break_it("error")
    ended_s = site.wait_for_blocking(lambda status: serves(status, "standby"), "a standby serves")
    return Change(began_s, ended_s, ended_s - began_s, site.again_per_s(last))


def outage(site: Site, number: int) -> Change:
    """From the moment when the store is well until it is back."""
    site.server.admin("PUT", STORAGE, site.primary(level="auto_reconnect") | {"switch": True, "mode": "drain"})
    last, began_s = site.last_incident(), time.perf_counter()
    site.break_it("error")
    site.wait_for_blocking(lambda status: status["breaker"]["state"] in ("open", "half_open"), "the breaker opens")
    site.wait_blocking(SICK_S)
    well_s = time.perf_counter()
    site.heal()
    ended_s = site.wait_for_blocking(lambda status: serves(status, "primary"), "the store is back")
    return Change(began_s, ended_s, ended_s - well_s, site.again_per_s(last))


def serves(status: dict[str, Any], which: str) -> bool:
    """Is this one attached?"""
    attached = all(rank["state"] == "attached" for rank in status["ranks"])
    return attached and status["breaker"]["serving"].startswith(which)


#: Name, function, and whether it needs traffic to be noticed.
CHANGES: tuple[tuple[str, Callable[[Site, int], Change], bool], ...] = (
    ("detach", detach, False),
    ("detach, hung", detach_hung, True),
    ("switch", switch, False),
    ("failover", failover, True),
    ("outage", outage, True),
)


# ------------------------------------------------------------------------------------------------ measurements


def measure(site: Site, sizes: Sizes, name: str, streams: int) -> dict[str, Any]:
    """One change, again and again."""
    make, needs_traffic = next((make, needs) for known, make, needs in CHANGES if known == name)
    clients = max(streams, 1) if needs_traffic else streams
    changes, before, around = [], [], []
    with Load(site.server, sizes, clients) as load:
        for number in range(sizes.rounds):
            site.restore()
            site.wait_blocking(AROUND_S + BEFORE_S)
            change = make(site, number)
            site.wait_blocking(AROUND_S)
            changes.append(change)
            before += load.between(change.began_s - AROUND_S - BEFORE_S, change.began_s - AROUND_S)
            around += load.between(change.began_s - AROUND_S, change.ended_s + AROUND_S)
        site.heal()
    again = [change.again_per_s for change in changes if change.again_per_s is not None]
    return {
        "change": name, "streams": clients, "answers_s": [change.answer_s for change in changes],
        "before_s": before, "around_s": around, "requests": len(load.asked) + len(load.failed),
        "failed": load.failed, "again_per_s": sum(again) / len(again) if again else None,
    }  # fmt: skip


def quantile(values: list[float], share: float) -> float | None:
    """The smallest value that so large a share of all does not exceed; None of nothing."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None


HEADINGS = (
    "change", "streams", "answer p50 / max", "first token p50 / p99 before", "and around it", "failed", "tokens again",
)  # fmt: skip
_WIDTHS = (14, 9, 22, 30, 22, 12, 18)


def row(found: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    again = found["again_per_s"]
    return (
        found["change"],
        str(found["streams"] or "none"),
        _pair(quantile(found["answers_s"], 0.5), max(found["answers_s"])),
        _pair(quantile(found["before_s"], 0.5), quantile(found["before_s"], 0.99)),
        _pair(quantile(found["around_s"], 0.5), quantile(found["around_s"], 0.99)),
        f"{len(found['failed'])} of {found['requests']}",
        "-" if again is None else f"{again:,.0f} tokens/s",
    )


def _pair(one: float | None, other: float | None) -> str:
    return "-" if one is None or other is None else f"{1e3 * one:,.0f} / {1e3 * other:,.0f} ms"


def print_row(cells: tuple[str, ...]) -> None:
    """Aligned."""
    print("".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS)), flush=True)


@contextmanager
def running(folder: Path, sizes: Sizes, flags: list[str]) -> Iterator[Site]:
    """The server, warm, with every prefix in its store; device and host hold some of them at most."""
    pool = sizes.prefixes * sizes.prefix_tokens // 4 // PAGE * PAGE
    every = [*flags, "--page-size", str(PAGE), "--max-total-tokens", str(pool), "--enable-hierarchical-cache",
             "--hicache-ratio", "1.5", "--hicache-storage-lookup-timeout", "1"]  # fmt: skip
    with Server(folder / "server", every) as server:
        site = Site(folder, server)
        server.admin("PUT", STORAGE, site.primary())
        for number in range(sizes.prefixes):
            server.ask(prefix(number, sizes), 1)
        server.settle()
        yield site


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round each: shows that it works, not how fast")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size (default: 1)")
    parser.add_argument("--streams", type=int, default=32, help="requests at a time under load (default: 32)")
    parser.add_argument("--model-path", help="default: the built-in model")
    parser.add_argument("--only", choices=[name for name, _, _ in CHANGES], help="one of the changes")
    parser.add_argument("--json", type=Path, help="also write every measurement to this file")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else FULL
    os.environ[ALLOW_FAULTY_ENV] = "1"
    flags = ["--log-level", "warning", "--tp-size", str(arguments.tp)]
    flags += ["--model-path", arguments.model_path] if arguments.model_path else []
    names = [arguments.only] if arguments.only else [name for name, _, _ in CHANGES]
    print(f"{share_of_cores()} cores, TP {arguments.tp}, {sizes.prefixes} prefixes of {sizes.prefix_tokens} tokens, "
          f"{sizes.rounds} rounds, times as a client sees them")  # fmt: skip
    print_row(HEADINGS)
    results = []
    with tempfile.TemporaryDirectory(prefix="bench-failover-") as name:
        with running(Path(name), sizes, flags) as site:
            for streams in (0, arguments.streams):
                for change in names:
                    results.append(measure(site, sizes, change, streams))
                    print_row(row(results[-1]))
    if arguments.json:
        arguments.json.write_text(json.dumps({"cores": share_of_cores(), "changes": results}) + "\n", encoding="utf-8")
    if failed := [text for found in results for text in found["failed"]]:
        raise SystemExit(f"{len(failed)} requests have failed, the first: {failed[0]}")


if __name__ == "__main__":
    main()
