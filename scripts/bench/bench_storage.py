"""Speed of the file storage through a real storage process, beside plain files on the same file system.

    python scripts/bench/bench_storage.py [--folder DIR] [--total-mib N] [--rounds N] [--fsync none|data|full]
                                          [--only plain|care|remote]

For each page size the same bytes go to the same number of files twice: by the storage process (headers, checksums,
rename to the final name; ops of 64 pages, as many in line as there are), and by the plainest loop there is (open,
write, fsync if asked for, close; open, read into the same memory, close).  Both are measured in every round, in
alternating order, and a side's files are deleted before the other side starts.  What is printed is the median of the
rounds' ratios with the quartiles, and the median speeds.  The first round warms page tables and is not counted.  Reads
come from the page cache.

The second table does the same with what a store takes care of, against the file store without it: encryption, a limit
that is always reached (every page of a round is new, those of earlier rounds are evicted while it is written), and
pages of which one in ten fails once (against the same saboteur, idle), stores made of stores, and a zero-copy plug-in
over a dictionary (against the memory store, which is one).  "At once" is the share of pages that were stored, or found,
at the first offer; the time is that until all of them were.

The third table is about stores that live in servers of their own, which are started on loopback ports: our backend
through a storage process, beside the plainest loop over the store's client library (`remote.py`).  A look-up asks for
a span of 100 pages that are all there, from the rank's side of the socket and back.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from remote import Plain as PlainClient
from remote import Remote, running
from stored import Stored

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sglang_hicache.cache.pools import HostPool
from sglang_hicache.storage.registry import ALLOW_FAULTY_ENV

PAGE_SIZES = (64 * 1024, 1024 * 1024, 8 * 1024 * 1024)
#: Page size of the second table.
CARE_PAGE_BYTES = 1024 * 1024
#: The case whose store is never cleared.
FULL = "always full"
AIMS = {"read": 0.75, "write": 0.70}
#: No limit.
MEMORY: dict[str, Any] = {"max_size": 0}
PLUG_IN = {
    "backend_name": "pointers", "module_path": "tests.storage.plugins.slots", "class_name": "Pointers",
    "interface_v1": 1, "clear_all": True, "shelf": "bench",
}  # fmt: skip
#: Of the client library's own throughput.
REMOTE_AIM = 0.8
#: Pages of a look-up, and how many look-ups are made.
LOOKUP_PAGES, LOOKUPS = 100, 500
GIB = 2**30


class Plain:
    """Pages as files, with nothing around them."""

    def __init__(self, folder: Path, pool: HostPool, fsync: str) -> None:
        self._folder = folder
        self._pool = pool
        self._fsync = fsync

    def write(self) -> None:
        self._folder.mkdir()
        for page in range(self._pool.pages):
            descriptor = os.open(f"{self._folder}/{page}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(descriptor, self._pool.page(page))
            if self._fsync == "data":
                os.fdatasync(descriptor)
            elif self._fsync == "full":
                os.fsync(descriptor)
            os.close(descriptor)

    def read(self) -> None:
        for page in range(self._pool.pages):
            descriptor = os.open(f"{self._folder}/{page}", os.O_RDONLY)
            os.readv(descriptor, [self._pool.page(page)])
            os.close(descriptor)

    def clear(self) -> None:
        shutil.rmtree(self._folder)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that it takes, and what it gives."""
    start_s = time.perf_counter()
    result = work()
    return time.perf_counter() - start_s, result


def new_pool(page_bytes: int, total_bytes: int) -> HostPool:
    """Host memory with something in it."""
    pool = HostPool(total_bytes // page_bytes, page_bytes)
    block = os.urandom(page_bytes)
    for page in range(pool.pages):
        pool.page(page)[:] = block
    return pool


def measure(folder: Path, page_bytes: int, total_bytes: int, rounds: int, fsync: str) -> None:
    """Print two rows: write and read of one page size."""
    seconds: dict[tuple[str, str], list[float]] = {}
    with new_pool(page_bytes, total_bytes) as pool:
        plain = Plain(folder / "plain", pool, fsync)
        config = {"file_storage_path": str(folder / "stored"), "fsync": fsync, "max_size": 0, "min_free_space": 0}
        stored = Stored(folder, pool, "file", config)
        for number in range(rounds + 1):
            sides = [("plain", plain), ("stored", stored)]
            for name, side in sides if number % 2 else reversed(sides):
                # Cleared before the other side starts, so that both write into the memory that the last one gave back:
                # memory that the machine has never touched is slower by far.
                for kind, work in (("write", side.write), ("read", side.read)):
                    spent_s, share = timed(work)
                    if share not in (None, 1.0):
                        raise SystemExit(f"only {share:.3f} of the pages went through a {kind}")
                    if number:
                        seconds.setdefault((kind, name), []).append(spent_s)
                side.clear()
        stored.close()
    for kind in ("write", "read"):
        print_row(kind, page_bytes, total_bytes, seconds[kind, "plain"], seconds[kind, "stored"])


def print_row(kind: str, page_bytes: int, total_bytes: int, plain_s: list[float], stored_s: list[float]) -> None:
    """One line of the table."""
    low, middle, high = statistics.quantiles([p / s for p, s in zip(plain_s, stored_s)], n=4)
    plain, stored = (total_bytes / GIB / statistics.median(values) for values in (plain_s, stored_s))
    verdict = "met" if middle >= AIMS[kind] else "missed"
    print(
        f"| {page_bytes // 1024} KiB | {kind} | {plain:.2f} | {stored:.2f} | {middle:.2f} ({low:.2f}-{high:.2f}) "
        f"| {AIMS[kind]:.2f} {verdict} |",
        flush=True,
    )


def cases(folder: Path, total_bytes: int, fsync: str) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Name to what it is compared with, backend and extra config."""
    key = folder / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(32))

    def file(name: str, max_bytes: int = 0) -> dict[str, Any]:
        path = str(folder / name)
        return {"file_storage_path": path, "fsync": fsync, "max_size": max_bytes, "min_free_space": 0}

    def inside(backend: str, config: dict[str, Any]) -> dict[str, Any]:
        return {"backend": backend, "extra_config": config}

    far, right = inside("file", file("far")), inside("file", file("right"))

    def sabotaged(name: str, share: float) -> dict[str, Any]:
        fault = {"kind": "error", "share": share}
        return {"inner": "file", "inner_config": file(name), "faults": {"read": fault, "write": fault}}

    return {
        "the file store": ("the file store", "file", file("bare")),
        "encrypted": ("the file store", "file", file("encrypted") | {"encryption": {"key_file": str(key)}}),
        FULL: ("the file store", "file", file("full", total_bytes * 3 // 2)),
        "an idle saboteur": ("the file store", "faulty", sabotaged("idle", 0.0)),
        "10 % of pages fail": ("an idle saboteur", "faulty", sabotaged("failing", 0.1)),
        "memory before files": ("the file store", "tiered", {"tiers": [inside("memory", MEMORY), far]}),
        "a mirror of two": ("the file store", "mirror", {"copies": [inside("file", file("left")), right]}),
        "the memory store": ("the file store", "memory", MEMORY),
        "a plug-in": ("the memory store", "dynamic", PLUG_IN),
    }


def measure_care(folder: Path, total_bytes: int, rounds: int, fsync: str) -> None:
    """Print the second table."""
    seconds: dict[tuple[str, str], list[float]] = {}
    shares: dict[tuple[str, str], list[float]] = {}
    found = cases(folder, total_bytes, fsync)
    with new_pool(CARE_PAGE_BYTES, total_bytes) as pool:
        stores = {
            name: Stored(folder, pool, backend, config, rank)
            for rank, (name, (_, backend, config)) in enumerate(found.items())
        }
        for number in range(rounds + 1):
            order = list(stores.items())
            for name, store in order if number % 2 else reversed(order):
                for kind, work in (("write", store.write), ("read", store.read)):
                    spent_s, share = timed(work)
                    if number:
                        seconds.setdefault((kind, name), []).append(spent_s)
                        shares.setdefault((kind, name), []).append(share)
                # A full store keeps its pages: what comes next must be made room for.
                store.rename() if name == FULL else store.clear()
        for store in stores.values():
            store.close()
    print(f"\n| {CARE_PAGE_BYTES // 1024} KiB | direction | GiB/s | ratio (quartiles) | to | at once |")
    print("|---|---|--:|--:|---|--:|")
    for name, (base, _, _) in found.items():
        for kind in ("write", "read"):
            own_s, at_once = seconds[kind, name], statistics.fmean(shares[kind, name])
            low, middle, high = statistics.quantiles([b / o for b, o in zip(seconds[kind, base], own_s)], n=4)
            speed = total_bytes / GIB / statistics.median(own_s)
            print(f"| {name} | {kind} | {speed:.2f} | {middle:.2f} ({low:.2f}-{high:.2f}) | {base} | {at_once:.4f} |")


def measure_remote(folder: Path, total_bytes: int, rounds: int) -> None:
    """Print the third table, and the look-ups."""
    print("\n| store | page | direction | plain MB/s | stored MB/s | ratio (quartiles) | aim |")
    print("|---|---|---|--:|--:|--:|---|")
    with running(folder, total_bytes) as remotes:
        for remote in remotes:
            for page_bytes in PAGE_SIZES:
                with new_pool(page_bytes, total_bytes) as pool:
                    measure_one_remote(folder, remote, pool, rounds)
        print(f"\n| store | look-up of {LOOKUP_PAGES} pages, ms: median | p99 |\n|---|--:|--:|")
        for remote in remotes:
            measure_look_ups(folder, remote)


def measure_one_remote(folder: Path, remote: Remote, pool: HostPool, rounds: int) -> None:
    """Two rows for each plain client."""
    seconds: dict[tuple[str, str], list[float]] = {}
    plain: dict[str, PlainClient] = {name: make(pool) for name, make in remote.plain.items()}
    stored = Stored(folder, pool, remote.backend, remote.config)
    for number in range(rounds + 1):
        sides: list[tuple[str, Any]] = [*plain.items(), ("stored", stored)]
        for name, side in sides if number % 2 else reversed(sides):
            for kind, work in (("write", side.write), ("read", side.read)):
                spent_s, share = timed(work)
                if share not in (None, 1.0):
                    raise SystemExit(f"only {share:.3f} of the pages went through a {kind} of {remote.backend}")
                if number:
                    seconds.setdefault((kind, name), []).append(spent_s)
            side.clear()
    stored.close()
    for side in plain.values():
        side.close()
    total_mb = pool.pages * pool.page_bytes / 1e6
    for name in plain:
        for kind in ("write", "read"):
            base_s, own_s = seconds[kind, name], seconds[kind, "stored"]
            low, middle, high = statistics.quantiles([b / o for b, o in zip(base_s, own_s)], n=4)
            base, own = (total_mb / statistics.median(values) for values in (base_s, own_s))
            verdict = "met" if middle >= REMOTE_AIM else "missed"
            print(
                f"| {remote.backend} beside {name} | {pool.page_bytes // 1024} KiB | {kind} | {base:.0f} | {own:.0f} "
                f"| {middle:.2f} ({low:.2f}-{high:.2f}) | {REMOTE_AIM:.2f} {verdict} |",
                flush=True,
            )


def measure_look_ups(folder: Path, remote: Remote) -> None:
    """One row."""
    with new_pool(PAGE_SIZES[0], LOOKUP_PAGES * PAGE_SIZES[0]) as pool:
        stored = Stored(folder, pool, remote.backend, remote.config)
        stored.write()
        took_ms = []
        for _ in range(LOOKUPS):
            spent_s, found = timed(lambda: stored.look_up(LOOKUP_PAGES))
            if found != LOOKUP_PAGES:
                raise SystemExit(f"{remote.backend} finds {found} of {LOOKUP_PAGES} pages")
            took_ms.append(spent_s * 1000)
        stored.clear()
        stored.close()
    cuts = statistics.quantiles(took_ms, n=100)
    print(f"| {remote.backend} | {cuts[49]:.2f} | {cuts[98]:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="a folder on the file system to measure (default: the temporary one)"
    )
    parser.add_argument("--total-mib", type=int, default=512, help="bytes written and read per round")
    parser.add_argument(
        "--rounds", type=int, default=10, help="rounds that count; even, for either side to be first as often"
    )
    parser.add_argument("--fsync", choices=("none", "data", "full"), default="none")
    parser.add_argument("--only", choices=("plain", "care", "remote"), help="one of the three tables")
    options = parser.parse_args()
    os.environ[ALLOW_FAULTY_ENV] = "1"
    folder = Path(tempfile.mkdtemp(prefix="bench_storage_", dir=options.folder))
    total_bytes = options.total_mib * 2**20
    try:
        if options.only in (None, "plain"):
            print("| page | direction | plain GiB/s | stored GiB/s | ratio (quartiles) | aim |")
            print("|---|---|--:|--:|--:|---|")
            for page_bytes in PAGE_SIZES:
                measure(folder, page_bytes, total_bytes, options.rounds, options.fsync)
        if options.only in (None, "care"):
            measure_care(folder, total_bytes, options.rounds, options.fsync)
        if options.only in (None, "remote"):
            measure_remote(folder, total_bytes, options.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
