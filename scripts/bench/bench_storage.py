"""Speed of the file storage through a real storage process, beside plain files on the same file system.

    python scripts/bench/bench_storage.py [--folder DIR] [--total-mib N] [--rounds N] [--fsync none|data|full]

For each page size the same bytes go to the same number of files twice: by the storage process (headers, checksums,
rename to the final name; ops of 64 pages, as many in line as there are), and by the plainest loop there is (open,
write, fsync if asked for, close; open, read into the same memory, close).  Both are measured in every round, in
alternating order, and a side's files are deleted before the other side starts.  What is printed is the median of the
rounds' ratios with the quartiles, and the median speeds.  The first round warms page tables and is not counted.  Reads
come from the page cache.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sglang_hicache import wire
from sglang_hicache.cache.pools import HostPool
from sglang_hicache.sockets import Poller
from sglang_hicache.workers.storage_client import StorageClient

PAGE_SIZES = (64 * 1024, 1024 * 1024, 8 * 1024 * 1024)
OP_PAGES = 64
AIMS = {"read": 0.75, "write": 0.70}
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


class Stored:
    """The same pages through a storage process."""

    def __init__(self, folder: Path, run_dir: Path, pool: HostPool, fsync: str) -> None:
        config = msgspec.json.encode({"file_storage_path": str(folder), "fsync": fsync}).decode()
        opened = wire.OpenBackend(
            rank=0, epoch=1, backend="file", extra_config_json=config, namespace=secrets.token_hex(32), head_start=0,
            head_end=1, writes=True, page_bytes=pool.page_bytes, host_pages=pool.pages, log_level="warning",
        )  # fmt: skip
        self._pool = pool
        self._keys = [secrets.token_bytes(32) for _ in range(pool.pages)]
        self._client = StorageClient(opened, pool.fd, str(run_dir))
        self._poller = Poller()
        for thing in self._client.fds():
            self._poller.register(thing)
        self._next_op = 0
        self._until(lambda message: isinstance(message, wire.BackendOpened))

    def write(self) -> None:
        self._transfer(
            lambda op_id, span: wire.WritePages(
                op_id=op_id,
                keys=self._keys[span],
                host_pages=list(range(span.start, span.stop)),
                parent=self._keys[span.start - 1] if span.start else b"",
                depth=span.start,
            )
        )

    def read(self) -> None:
        self._transfer(
            lambda op_id, span: wire.ReadPages(
                op_id=op_id, keys=self._keys[span], host_pages=list(range(span.start, span.stop))
            )
        )

    def clear(self) -> None:
        self._client.send(wire.ClearPages(command_id="clear"))
        self._until(lambda message: isinstance(message, wire.ClearDone))

    def close(self) -> None:
        self._client.stop()
        while self._client.reap() is None:
            self._poller.wait(100)
        self._client.close()

    def _transfer(self, make: Callable[[int, slice], wire.ToStorage]) -> None:
        """Send every op at once and wait for all of them."""
        open_ops = {}
        for start in range(0, self._pool.pages, OP_PAGES):
            self._next_op += 1
            span = slice(start, min(start + OP_PAGES, self._pool.pages))
            open_ops[self._next_op] = span.stop - span.start
            self._client.send(make(self._next_op, span))

        def is_last(message: wire.FromStorage) -> bool:
            if isinstance(message, wire.OpProgress) and message.closed:
                if message.pages != open_ops.pop(message.op_id):
                    raise SystemExit(f"an op stopped short: {message}")
            return not open_ops

        self._until(is_last)

    def _until(self, is_over: Callable[[wire.FromStorage], bool]) -> None:
        while True:
            self._poller.wait(None)
            # Every message is looked at, also behind the last one: it is counted by being looked at.
            verdicts = [is_over(message) for message in self._client.receive()]
            if any(verdicts):
                return
            if self._client.exited():
                raise SystemExit("the storage process ended")


def timed(work: Callable[[], None]) -> float:
    """Seconds that it takes."""
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def measure(folder: Path, page_bytes: int, total_bytes: int, rounds: int, fsync: str) -> None:
    """Print two rows: write and read of one page size."""
    seconds: dict[tuple[str, str], list[float]] = {}
    with HostPool(total_bytes // page_bytes, page_bytes) as pool:
        block = os.urandom(page_bytes)
        for page in range(pool.pages):
            pool.page(page)[:] = block
        plain = Plain(folder / "plain", pool, fsync)
        stored = Stored(folder / "stored", folder, pool, fsync)
        for number in range(rounds + 1):
            sides = [("plain", plain), ("stored", stored)]
            for name, side in sides if number % 2 else reversed(sides):
                # Cleared before the other side starts, so that both write into the memory that the last one gave back:
                # memory that the machine has never touched is slower by far.
                spent_s = {"write": timed(side.write), "read": timed(side.read)}
                side.clear()
                if number:
                    for kind, value_s in spent_s.items():
                        seconds.setdefault((kind, name), []).append(value_s)
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
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench_storage_", dir=options.folder))
    print("| page | direction | plain GiB/s | stored GiB/s | ratio (quartiles) | aim |")
    print("|---|---|--:|--:|--:|---|")
    try:
        for page_bytes in PAGE_SIZES:
            measure(folder, page_bytes, options.total_mib * 2**20, options.rounds, options.fsync)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
