"""Replays a Mooncake-format trace through the real scheduler: hit rate per tier, time per request.

    python scripts/bench/bench_trace.py FILE [--requests N | --quick] [--storage] [--in-flight N] [--decode-tokens N]
                                             [--device-tokens N] [--host-tokens N] [--page-size N] [--chunk-tokens N]
                                             [--eviction-policy NAME] [--unchecked]

A line of the trace is a JSON object with `input_length`, `output_length` and `hash_ids`: one id per 512-token block of
the prompt.  One rank, no sockets: the leader writes plans, the core applies them, and the synthetic worker does what
they say, and checks on every row that the cached pages hold the tokens before it.  `--storage` attaches an endless
store, a dictionary that answers the same messages as a storage process, at once.  Prompts are computed chunk by chunk;
of an output only the first `--decode-tokens`, because a decode step says nothing about a cache.  The clock of the plans
is played, so the same trace gives the same hits on any machine.

The hits are those that requests are told (`cached_tokens`).  The ideal is a cache that never forgets: a plain table of
blocks that knows nothing of the tree.  The time of a request is everything between its arrival and its end; below it
stand the shares of the scheduler (plans, tree, pools, ops) and of the hands (worker and store).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sglang_hicache import wire
from sglang_hicache.cache.controller import Copy
from sglang_hicache.collector import settle_collector
from sglang_hicache.config import (
    CacheConfig,
    HttpConfig,
    ModelConfig,
    PoolConfig,
    SchedulerConfig,
    ServerConfig,
    StorageConfig,
)
from sglang_hicache.scheduler.core import Effects, SchedulerCore
from sglang_hicache.scheduler.tick import Leader
from sglang_hicache.storage.attachment_events import Spawn
from sglang_hicache.workers.batch import ForwardBatch
from sglang_hicache.workers.synthetic import PageContent, SyntheticWorker

BLOCK_TOKENS = 512
QUICK_REQUESTS = 500
#: What the played clock moves in a tick.
TICK_US = 1_000


@dataclass(frozen=True, slots=True)
class Line:
    """One request of the trace."""

    input_tokens: int
    output_tokens: int
    block_ids: list[int]

    def token_ids(self) -> list[int]:
        """A prompt in which every block consists of its own id."""
        tokens = [block_id for block_id in self.block_ids for _ in range(BLOCK_TOKENS)]
        return tokens[: self.input_tokens]


def read_trace(file: Path, requests: int | None) -> Iterator[Line]:
    with file.open() as lines:
        for line in islice(lines, requests):
            record = json.loads(line)
            yield Line(record["input_length"], record["output_length"], record["hash_ids"])


class IdealCache:
    """Remembers of every block, behind the blocks before it, how much has been seen."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._blocks: dict[tuple[int, int], tuple[int, int]] = {}

    def take(self, block_ids: list[int], tokens: int) -> int:
        """Tokens of this prompt that were seen before: whole pages, and one token is left to compute."""
        most = (tokens - 1) // self._page_size * self._page_size
        left = tokens // self._page_size * self._page_size
        hit, before, is_prefix = 0, 0, True
        for block_id in block_ids:
            length = min(BLOCK_TOKENS, left)
            number, seen = self._blocks.get((before, block_id), (len(self._blocks) + 1, 0))
            if is_prefix:
                hit += min(seen, length)
                is_prefix = seen >= length
            self._blocks[before, block_id] = (number, max(seen, length))
            before = number
            left -= length
        return min(hit, most)


class UncheckedWorker:
    """Moves nothing and checks nothing: what is left is the scheduler."""

    def forward_blocking(self, batch: ForwardBatch) -> list[int]:
        return [0 for row in batch.rows if row.sampling is not None]

    def copy_out(self, op_id: int, device_pages: list[int], host_pages: list[int]) -> None:
        """Nothing to move."""

    copy_in = copy_out

    def host_content(self, page: int) -> None:
        """There is none."""

    def put_host_content(self, page: int, content: None) -> None:
        """Nowhere to put it."""


class PlayedStore:
    """A storage process without a process: answers every message at once, forgets nothing."""

    def __init__(self, worker: SyntheticWorker | UncheckedWorker) -> None:
        self._worker = worker
        self._pages: dict[bytes, PageContent | None] = {}

    def __len__(self) -> int:
        return len(self._pages)

    def handle(self, message: wire.ToStorage) -> wire.OpFact | None:
        if isinstance(message, wire.LookupPages):
            return self._closed(message.op_id, self._held(message.keys))
        if isinstance(message, wire.ReadPages):
            held = self._held(message.keys)
            for key, page in zip(message.keys[:held], message.host_pages, strict=False):
                self._worker.put_host_content(page, self._pages[key])
            return self._closed(message.op_id, held)
        if isinstance(message, wire.WritePages):
            for key, page in zip(message.keys, message.host_pages, strict=True):
                self._pages.setdefault(key, self._worker.host_content(page))
            return self._closed(message.op_id, len(message.keys))
        return None  # a revoked op has been answered before

    def _held(self, keys: list[bytes]) -> int:
        return next((at for at, key in enumerate(keys) if key not in self._pages), len(keys))

    def _closed(self, op_id: int, pages: int) -> wire.OpFact:
        return wire.OpFact(op_id, pages, settled=True, closed=True)


@dataclass(slots=True)
class Tally:
    """Tokens, and seconds."""

    prompt: int = 0
    device: int = 0
    host: int = 0
    storage: int = 0
    ideal: int = 0
    #: Requests that ended by their messages: too long for the pool.
    refused: int = 0
    ticks: int = 0
    #: From arrival to the last token, per request.
    request_s: list[float] = field(default_factory=list)
    scheduler_s: float = 0.0
    hands_s: float = 0.0


class Server:
    """One rank: core, leader and hands, ticking as fast as it can."""

    def __init__(self, config: ServerConfig, worker: SyntheticWorker | UncheckedWorker) -> None:
        self.core = SchedulerCore(config, 0)
        self.store = PlayedStore(worker)
        self.tally = Tally()
        self._leader = Leader(config, 1)
        self._worker = worker
        self._now_us = 1
        self._arrived_s: dict[str, float] = {}

    def attach(self) -> None:
        self._leader.add_command(wire.AttachStorage(id="attach", deadline_s=30.0, backend="memory"), self._now_us)
        self.run_until(0)
        if self.core.tiers.slot.gate() is None:
            raise SystemExit(f"the played store was not attached: {self.core.tiers.slot.last_error}")

    def submit(self, rid: str, token_ids: list[int], max_new_tokens: int) -> None:
        sampling = wire.SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
        self._arrived_s[rid] = time.perf_counter()
        self._leader.add_request(wire.NewRequest(rid=rid, token_ids=token_ids, sampling=sampling))

    def run_until(self, in_flight: int) -> None:
        """Tick until at most so many requests are under way; at 0 until nothing is, backups included."""
        while len(self._arrived_s) > in_flight or not in_flight:
            if not self._tick():
                if self._arrived_s:
                    raise SystemExit(f"the scheduler rests while {len(self._arrived_s)} requests are under way")
                return

    def _tick(self) -> bool:
        """False if there was nothing to do."""
        clock = time.perf_counter
        start = clock()
        self._now_us += TICK_US
        plan = self._leader.next_plan(self._now_us, self.core)
        if plan is None:
            return False
        effects = self.core.apply(plan)
        outputs = effects.outputs
        applied = clock()
        ops, storage = self._carry_out(effects)
        token_ids = self._worker.forward_blocking(effects.batch) if effects.batch is not None else []
        computed = clock()
        if effects.batch is not None:
            outputs = outputs + self.core.apply_results(token_ids)
        self._leader.applied(self.core.digest)
        self._leader.add_own_facts(ops, storage, [])
        end = clock()
        tally = self.tally
        tally.ticks += 1
        tally.hands_s += computed - applied
        tally.scheduler_s += end - computed + applied - start
        for output in outputs:
            if output.finish is not None:
                self._ended(output, end)
        return True

    def _carry_out(self, effects: Effects) -> tuple[list[wire.OpFact], list[wire.StorageFact]]:
        for copy in effects.copies_out:
            self._worker.copy_out(copy.op_id, copy.device_pages, copy.host_pages)
        for copy in effects.copies_in:
            self._worker.copy_in(copy.op_id, copy.device_pages, copy.host_pages)
        copies: list[Copy] = effects.copies_out + effects.copies_in
        ops = [wire.OpFact(copy.op_id, len(copy.host_pages), settled=True, closed=True) for copy in copies]
        answers = [self.store.handle(message) for _, message in effects.to_storage]
        opened = [wire.StorageFact("opened", each.epoch) for each in effects.storage if isinstance(each, Spawn)]
        return ops + [answer for answer in answers if answer is not None], opened

    def _ended(self, output: wire.RequestOutput, now_s: float) -> None:
        tally, spent_s = self.tally, now_s - self._arrived_s.pop(output.rid)
        if output.finish.type == "abort":
            tally.refused += 1
            return
        tally.request_s.append(spent_s)
        tally.prompt += output.prompt_tokens
        tally.device += output.cached.device
        tally.host += output.cached.host
        tally.storage += output.cached.storage


def replay(server: Server, lines: Iterator[Line], options: argparse.Namespace) -> None:
    tally, ideal = server.tally, IdealCache(options.page_size)
    for number, line in enumerate(lines):
        if line.input_tokens < server.core.longest_tokens:
            tally.ideal += ideal.take(line.block_ids, line.input_tokens)
        server.submit(f"r{number}", line.token_ids(), max(1, min(options.decode_tokens, line.output_tokens)))
        # With one in flight the backups of a request end before the next one arrives, as on a server with time.
        server.run_until(options.in_flight - 1)
        if number % 1000 == 999:
            print(f"  ... {number + 1} requests", file=sys.stderr)
    server.run_until(0)
    server.core.check()


def print_tally(server: Server, wall_s: float, has_storage: bool) -> None:
    tally = server.tally
    requests = len(tally.request_s)
    rates = {"device": tally.device, "host": tally.host}
    if has_storage:
        rates["storage"] = tally.storage
    rates |= {"all": sum(rates.values()), "ideal": tally.ideal}
    print(f"  {requests} requests, {tally.prompt / 1e6:.1f} M prompt tokens, {tally.ticks} ticks", end="")
    print(f"; refused as too long: {tally.refused}" + (f"; {len(server.store)} pages stored" if has_storage else ""))
    for name, tokens in rates.items():
        share = f"{tokens / tally.ideal:.4f} of ideal" if tally.ideal else ""
        print(f"    hit rate {name:7s} {tokens / tally.prompt:.4f}   {share}")
    microseconds = sorted(1e6 * spent_s for spent_s in tally.request_s)
    median, slowest = statistics.median(microseconds), microseconds[requests * 99 // 100]
    print(f"    time of a request  mean {statistics.fmean(microseconds):.0f} us  median {median:.0f} us", end="")
    print(f"  99 % {slowest:.0f} us")
    shares = Counter(scheduler=tally.scheduler_s, hands=tally.hands_s)
    shares["the replay itself"] = wall_s - shares.total()
    per_request = "  ".join(f"{name} {1e6 * spent_s / requests:.0f} us" for name, spent_s in shares.items())
    print(f"    wall time {wall_s:.1f} s; per request {1e6 * wall_s / requests:.0f} us: {per_request}")


def server_config(options: argparse.Namespace) -> ServerConfig:
    page_size = options.page_size
    device_tokens, host_tokens = (
        tokens // page_size * page_size for tokens in (options.device_tokens, options.host_tokens)
    )
    return ServerConfig(
        model=ModelConfig(path="", tokenizer_path="", served_name="synthetic", dtype="float32", context_length=1 << 30),
        pool=PoolConfig(page_size=page_size, device_tokens=device_tokens, host_tokens=host_tokens),
        cache=CacheConfig(
            hierarchical=host_tokens > 0, eviction_policy=options.eviction_policy, prefetch_policy="wait_complete"
        ),
        storage=StorageConfig(),
        scheduler=SchedulerConfig(chunked_prefill_size=options.chunk_tokens),
        http=HttpConfig(),
        run_dir="",
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="trace, one JSON object per line")
    parser.add_argument("--requests", type=int, help="first requests only")
    parser.add_argument("--quick", action="store_true", help=f"the first {QUICK_REQUESTS} only: for a look")
    parser.add_argument("--storage", action="store_true", help="attach an endless store in memory")
    parser.add_argument("--in-flight", type=int, default=1, help="requests at the same time")
    parser.add_argument("--decode-tokens", type=int, default=1, help="most output tokens of a request")
    parser.add_argument("--device-tokens", type=int, default=1_000_000)
    parser.add_argument("--host-tokens", type=int, default=8_000_000)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--chunk-tokens", type=int, default=8192, help="prompt tokens computed in one tick")
    parser.add_argument("--eviction-policy", default="lru")
    parser.add_argument("--unchecked", action="store_true", help="a worker that does not check what pages hold")
    options = parser.parse_args()
    if BLOCK_TOKENS % options.page_size:
        parser.error(f"--page-size {options.page_size}: {BLOCK_TOKENS} tokens, a block, must be whole pages")
    if options.quick:
        options.requests = min(options.requests or QUICK_REQUESTS, QUICK_REQUESTS)
    return options


def main() -> None:
    options = parse()
    config = server_config(options)
    if options.unchecked:
        worker: SyntheticWorker | UncheckedWorker = UncheckedWorker()
    else:
        worker = SyntheticWorker()
        worker.load_blocking(options.page_size)
        worker.allocate(config.pool.device_tokens // options.page_size + 1, None)
    server = Server(config, worker)
    if options.storage:
        server.attach()
    settle_collector()
    print(
        f"bench_trace: device {config.pool.device_tokens} tokens, host {config.pool.host_tokens} tokens,"
        f" storage {'endless' if options.storage else 'none'}, page {options.page_size}, {options.eviction_policy},"
        f" chunk {options.chunk_tokens}, {options.in_flight} in flight, pages {'un' * options.unchecked}checked"
    )
    server.tally = Tally()
    start = time.perf_counter()
    replay(server, read_trace(options.file, options.requests), options)
    print_tally(server, time.perf_counter() - start, options.storage)


if __name__ == "__main__":
    main()
