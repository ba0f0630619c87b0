"""Speed, memory and hit rate of the prefix tree, beside limits measured in the same run.

    python scripts/bench/bench_tree.py [--quick] [--seed N] [--default-collector]

The load: 2,000 sessions of 8 turns with 512 fresh random tokens each; every arrival picks one of 512 open
sessions, and a finished session is replaced by the next.  A turn matches its whole sequence, allocates what is
missing (evicting if it must) and inserts.  Prints one table per pool size (unlimited, 8 % of all tokens) and
page size (64, 1), the growth of the tree from 10 k to 1 M pages, and the bytes it needs per page.  The garbage
collector is set as in a rank (`--default-collector`: as Python comes).

Limits of the same run.  Speed: nothing but dict and bytes, a walk that looks up the first page of each turn and
compares the rest by memcmp (for match), and the same plus storing a slice of key and pages (for insert), in an
unlimited pool.  Hit rate: an ideal LRU that counts turns and knows no tree, over the same arrivals; and the same
over 40 other orders of arrival, because a single order is worth no more than two digits.
"""

from __future__ import annotations

import argparse
import gc
import random
import struct
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sglang_hicache.cache.digest import StateDigest
from sglang_hicache.cache.evict import EvictionPolicy
from sglang_hicache.cache.pools import PageAllocator
from sglang_hicache.cache.tree import PrefixTree
from sglang_hicache.collector import settle_collector

TURNS = 8
TURN_TOKENS = 512
OPEN_SESSIONS = 512
LIMITED_SHARE = 0.08
#: What other trees did on this kind of machine with page 64, calls per second: (Rust core, its low end, Python trees).
KNOWN = {
    "match": {"unlimited": ("62-67 k", 62_000, "18-28 k"), "8 %": ("110 k", 110_000, "18-28 k")},
    "insert": {"unlimited": ("62-74 k", 62_000, "20-30 k"), "8 %": ("82 k", 82_000, "20-30 k")},
    "evict": {"8 %": ("21 k", 21_000, "15-22 k")},
}


@dataclass(slots=True)
class Spent:
    """Calls and seconds of one kind of call."""

    calls: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.calls / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class Outcome:
    match: Spent
    insert: Spent
    evict: Spent
    tokens: int = 0
    hits: int = 0
    ideal_hit_rate: float = 0.0


class IdealCache:
    """LRU over sessions, evicted from their last turn, counted in turns."""

    def __init__(self, capacity: int) -> None:
        self._free = capacity
        self._held: OrderedDict[int, int] = OrderedDict()
        self._asked = self._found = 0

    def take(self, session: int, turns: int) -> None:
        held = self._held.pop(session, 0)
        self._asked += turns
        self._found += held
        self._free -= turns - held
        while self._free < 0:
            oldest = next(iter(self._held))
            self._held[oldest] -= 1
            self._free += 1
            if not self._held[oldest]:
                del self._held[oldest]
        self._held[session] = turns

    @property
    def hit_rate(self) -> float:
        return self._found / self._asked


def arrivals(sessions: int, open_sessions: int, seed: int) -> Iterator[tuple[int, int]]:
    """(session, number of its turn from 1) in order of arrival."""
    rng = random.Random(seed)
    waiting = iter(range(sessions))
    running = [[next(waiting), 0] for _ in range(min(open_sessions, sessions))]
    while running:
        at = rng.randrange(len(running))
        running[at][1] += 1
        yield running[at][0], running[at][1]
        if running[at][1] == TURNS:
            session = next(waiting, None)
            if session is None:
                running.pop(at)
            else:
                running[at] = [session, 0]


def turns(sessions: int, open_sessions: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """(session, flat key of its whole sequence) in order of arrival."""
    rng = random.Random(~seed)
    histories: dict[int, bytes] = {}
    for session, turn in arrivals(sessions, open_sessions, seed):
        # Two random and two zero bytes per token: 65,536 different tokens.
        words = struct.unpack(f"<{TURN_TOKENS}H", rng.randbytes(2 * TURN_TOKENS))
        key = histories.pop(session, b"") + struct.pack(f"<{TURN_TOKENS}I", *words)
        if turn < TURNS:
            histories[session] = key
        yield session, key


def run_tree(page_size: int, pool_pages: int, sessions: int, seed: int) -> Outcome:
    """The whole load through tree and allocator, each kind of call timed by itself."""
    digest = StateDigest()
    tree = PrefixTree(page_size, digest, EvictionPolicy.named("lru"))
    pool = PageAllocator("device", pool_pages, digest, first=1)
    ideal = IdealCache(pool_pages * page_size // TURN_TOKENS)
    outcome = Outcome(Spent(), Spent(), Spent())
    match_spent, insert_spent, evict_spent = outcome.match, outcome.insert, outcome.evict
    now = time.perf_counter
    for tick, (session, key) in enumerate(turns(sessions, OPEN_SESSIONS, seed), start=1):
        total = len(key) // (4 * page_size)
        start = now()
        match = tree.match(b"", key)
        tree.touch(match.device_node, tick)
        match_spent.seconds += now() - start
        tree.lock_device(match.device_node)
        need = total - len(match.device_pages)
        if pool.free_count < need:
            start = now()
            while pool.free_count < need:
                pool.free(tree.drop_device(tree.device_victim()))
                evict_spent.calls += 1
            evict_spent.seconds += now() - start
        pages = match.device_pages + pool.alloc(need)
        start = now()
        tree.insert(b"", key, pages, tick)
        insert_spent.seconds += now() - start
        tree.unlock_device(match.device_node)
        match_spent.calls += 1
        insert_spent.calls += 1
        outcome.tokens += len(key) // 4
        outcome.hits += match.device_len
        ideal.take(session, len(key) // (4 * TURN_TOKENS))
    outcome.ideal_hit_rate = ideal.hit_rate
    return outcome


def run_limit(page_size: int, sessions: int, seed: int) -> tuple[float, float]:
    """(look-ups, look-ups with storing) per second of bare dicts of bytes over the same load."""
    page_bytes, step = 4 * page_size, 4 * TURN_TOKENS
    root: dict[bytes, tuple] = {}
    look, store = Spent(), Spent()
    now = time.perf_counter
    for _, key in turns(sessions, OPEN_SESSIONS, seed):
        pages = list(range(len(key) // page_bytes))
        start = now()
        level, at = root, 0
        held: list[int] = []
        while (found := level.get(key[at : at + page_bytes])) is not None and key.startswith(found[0], at):
            level = found[1]
            held += found[2]
            at += step
        look.seconds += now() - start
        look.calls += 1
        start = now()
        level, at = root, 0
        while (found := level.get(key[at : at + page_bytes])) is not None and key.startswith(found[0], at):
            level = found[1]
            at += step
        level[key[at : at + page_bytes]] = (key[at:], {}, pages[at // page_bytes :])
        store.seconds += now() - start
        store.calls += 1
    return look.rate, store.rate


def print_rate(name: str, pool: str, page_size: int, spent: Spent, limit: float | None) -> None:
    ratio = f"{spent.rate / limit:6.2f} of limit {limit / 1e3:5.0f} k" if limit else ""
    known = KNOWN[name].get(pool) if page_size == 64 else None
    beside = f"{spent.rate / known[1]:5.2f} x Rust core ({known[0]}); Python {known[2]}" if known else ""
    print(f"    {name:7s} {spent.rate / 1e3:7.1f} k/s  {ratio:26s}  {beside}")


def print_load(page_size: int, sessions: int, seed: int) -> None:
    pages = sessions * TURNS * TURN_TOKENS // page_size
    gc.collect()
    look, store = run_limit(page_size, sessions, seed)
    for pool, size in (("unlimited", pages), ("8 %", int(pages * LIMITED_SHARE))):
        gc.collect()
        outcome = run_tree(page_size, size, sessions, seed)
        hit_rate = outcome.hits / outcome.tokens
        print(f"\n  page {page_size}, pool {pool} ({size} pages): hit rate {hit_rate:.4f}", end="")
        print(f" = {hit_rate / outcome.ideal_hit_rate:.4f} of ideal {outcome.ideal_hit_rate:.4f}")
        print_rate("match", pool, page_size, outcome.match, look)
        print_rate("insert", pool, page_size, outcome.insert, store)
        if outcome.evict.calls:
            print_rate("evict", pool, page_size, outcome.evict, None)


def resident_bytes() -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def print_growth(largest: int, seed: int) -> None:
    """Match and insert time, and memory, while one tree of 8-page nodes grows.

    Session after session, so that the memory is the tree's and not that of half-finished sequences.
    """
    print("\n  growth, page 64, one session after the other")
    digest = StateDigest()
    tree = PrefixTree(64, digest, EvictionPolicy.named("lru"))
    gc.collect()
    base = resident_bytes()
    marks = [mark for mark in (10_000, 30_000, 100_000, 300_000, 1_000_000) if mark <= largest]
    filled, recent = 0, Outcome(Spent(), Spent(), Spent())
    now = time.perf_counter
    for tick, (_, key) in enumerate(turns(largest // 64 + 1, 1, seed), start=1):
        start = now()
        match = tree.match(b"", key)
        middle = now()
        fresh = list(range(filled, filled + len(key) // 256 - len(match.device_pages)))
        ready = now()
        tree.insert(b"", key, match.device_pages + fresh, tick)
        recent.insert.seconds += now() - ready
        recent.match.seconds += middle - start
        recent.match.calls += 1
        recent.insert.calls += 1
        filled += len(fresh)
        if filled >= marks[0]:
            gc.collect()
            per_page = (resident_bytes() - base) / filled
            rates = f"match {recent.match.rate / 1e3:6.1f} k/s  insert {recent.insert.rate / 1e3:6.1f} k/s"
            print(f"    {filled:9d} pages  {rates}  {per_page:6.0f} bytes per page (256 of them the tokens)")
            marks.pop(0)
            recent = Outcome(Spent(), Spent(), Spent())
            if not marks:
                break


def print_ideal(sessions: int) -> None:
    rates = []
    for seed in range(40):
        ideal = IdealCache(int(sessions * TURNS * LIMITED_SHARE))
        for session, turn in arrivals(sessions, OPEN_SESSIONS, seed):
            ideal.take(session, turn)
        rates.append(ideal.hit_rate)
    mean = sum(rates) / len(rates)
    print(f"\n  ideal LRU in 8 %, 40 orders of arrival: mean {mean:.4f}, {min(rates):.4f} to {max(rates):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the load: for a look, not for a figure")
    parser.add_argument("--seed", type=int, default=1, help="of the random tokens and arrivals")
    parser.add_argument("--default-collector", action="store_true", help="leave the garbage collector as it is")
    options = parser.parse_args()
    if not options.default_collector:
        settle_collector()
    sessions = 200 if options.quick else 2000
    print(f"bench_tree: {sessions} sessions x {TURNS} turns x {TURN_TOKENS} tokens, seed {options.seed}")
    # First, while the process owns no freed memory that could hide growth.
    print_growth(100_000 if options.quick else 1_000_000, options.seed)
    for page_size in (64, 1):
        print_load(page_size, sessions, options.seed)
    print_ideal(sessions)


if __name__ == "__main__":
    main()
