"""Replays a Mooncake-format trace through tree and pools: hit rate per tier, time per request.

    python scripts/bench/bench_trace.py FILE [--device-tokens N] [--host-tokens N] [--page-size N]
                                             [--eviction-policy NAME] [--limit N]

A line of the trace is a JSON object with `input_length` and `hash_ids`: one id per 512-token block of the
prompt.  Requests run one after the other: match, load back what only the host has, allocate (evicting if
needed), insert, write through to the host.  No model and no bytes: the time is what the cache itself costs.
The ideal is a cache that never forgets, kept as a plain table of blocks that knows nothing of the tree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sglang_hicache.cache.check import check_pools, check_tree, check_unlocked
from sglang_hicache.cache.digest import StateDigest
from sglang_hicache.cache.evict import EvictionPolicy
from sglang_hicache.cache.node import Node
from sglang_hicache.cache.pools import PageAllocator
from sglang_hicache.cache.tree import PrefixTree

BLOCK_TOKENS = 512


@dataclass(slots=True)
class Request:
    input_tokens: int
    block_ids: list[int]


def read_trace(file: Path, limit: int | None) -> Iterator[Request]:
    with file.open() as lines:
        for line in islice(lines, limit):
            record = json.loads(line)
            yield Request(record["input_length"], record["hash_ids"])


def key_of(request: Request, page_size: int) -> bytes:
    """Whole pages of a prompt in which every block consists of its own id."""
    key = b"".join(struct.pack("<I", block_id) * BLOCK_TOKENS for block_id in request.block_ids)
    tokens = min(request.input_tokens, len(request.block_ids) * BLOCK_TOKENS)
    return key[: tokens // page_size * page_size * 4]


class IdealCache:
    """Remembers of every block, behind the blocks before it, how much has been seen."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[int, int], tuple[int, int]] = {}

    def take(self, block_ids: list[int], tokens: int) -> int:
        """Tokens of this prompt (whole pages) that were seen before; and remember all of it."""
        hit, before, is_prefix = 0, 0, True
        for block_id in block_ids:
            length = min(BLOCK_TOKENS, tokens)
            number, seen = self._blocks.get((before, block_id), (len(self._blocks) + 1, 0))
            if is_prefix:
                hit += min(seen, length)
                is_prefix = seen >= length
            self._blocks[before, block_id] = (number, max(seen, length))
            before = number
            tokens -= length
        return hit


@dataclass(slots=True)
class Tally:
    """Tokens, and seconds per request."""

    prompt: int = 0
    device: int = 0
    host: int = 0
    ideal: int = 0
    too_long: int = 0
    seconds: list[float] = field(default_factory=list)


class Cache:
    """The smallest driver of both tiers: write-through, load-back, no ops in flight."""

    def __init__(self, page_size: int, device_pages: int, host_pages: int, policy: str) -> None:
        self.page_size = page_size
        digest = StateDigest()
        self.tree = PrefixTree(page_size, digest, EvictionPolicy.named(policy))
        self.device = PageAllocator("device", device_pages, digest, first=1)
        self.host = PageAllocator("host", host_pages, digest)

    def serve(self, key: bytes, tick: int) -> tuple[int, int]:
        """(tokens found on the device, tokens found on the host) of one prompt, which is cached afterwards."""
        tree = self.tree
        match = tree.match(b"", key)
        node = match.host_node
        tree.touch(node, tick)
        tree.lock_device(node)
        tree.lock_host(node)
        loaded = self._take_device(match.host_len // self.page_size)
        at = 0
        for part in tree.span(node, len(loaded)):
            tree.set_device(part, loaded[at : at + part.page_count])
            at += part.page_count
        held = match.device_pages + loaded
        fresh = self._take_device(len(key) // (4 * self.page_size) - len(held))
        insertion = tree.insert(b"", key, held + fresh, tick)
        tree.lock_host(insertion.node)
        for part in insertion.path:
            part.hit_count += 1
            if part.host_pages is None and not self._write_through(part):
                break
        tree.unlock_host(insertion.node)
        tree.unlock_host(node)
        tree.unlock_device(node)
        return match.device_len, match.host_len

    def _take_device(self, pages: int) -> list[int]:
        while (taken := self.device.alloc(pages)) is None:
            victim = self.tree.device_victim()
            if victim is None:
                raise SystemExit(f"the device pool has no room for {pages} pages beside locked ones")
            if victim.host_pages is None and victim.children:
                device_pages, host_pages = self.tree.drop_subtree(victim)
                self.device.free(device_pages)
                self.host.free(host_pages)
            else:
                self.device.free(self.tree.drop_device(victim))
        return taken

    def _write_through(self, node: Node) -> bool:
        while (taken := self.host.alloc(node.page_count)) is None:
            victim = self.tree.host_victim()
            if victim is None:
                return False
            self.host.free(self.tree.clear_host(victim))
        self.tree.set_host(node, taken)
        return True


def replay(cache: Cache, requests: Iterator[Request]) -> Tally:
    tally, ideal = Tally(), IdealCache()
    for tick, request in enumerate(requests, start=1):
        key = key_of(request, cache.page_size)
        tokens = len(key) // 4
        if tokens > cache.device.total * cache.page_size:
            tally.too_long += 1
            continue
        start = time.perf_counter()
        device, host = cache.serve(key, tick)
        tally.seconds.append(time.perf_counter() - start)
        tally.prompt += tokens
        tally.device += device
        tally.host += host
        tally.ideal += ideal.take(request.block_ids, tokens)
    return tally


def print_tally(tally: Tally) -> None:
    both = tally.device + tally.host
    microseconds = sorted(1e6 * spent for spent in tally.seconds)
    print(f"  {len(microseconds)} requests, {tally.prompt / 1e6:.1f} M prompt tokens; too long: {tally.too_long}")
    for name, tokens in (("device", tally.device), ("host", tally.host), ("both", both), ("ideal", tally.ideal)):
        share = f"{tokens / tally.ideal:.4f} of ideal" if tally.ideal else ""
        print(f"    hit rate {name:7s} {tokens / tally.prompt:.4f}   {share}")
    mean, median = statistics.fmean(microseconds), statistics.median(microseconds)
    slowest = microseconds[len(microseconds) * 99 // 100]
    print(f"    time per request  mean {mean:.0f} us  median {median:.0f} us  99 % {slowest:.0f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="trace, one JSON object per line")
    parser.add_argument("--device-tokens", type=int, default=1_000_000)
    parser.add_argument("--host-tokens", type=int, default=8_000_000)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--eviction-policy", default="lru")
    parser.add_argument("--limit", type=int, help="first requests only")
    options = parser.parse_args()
    page_size = options.page_size
    cache = Cache(
        page_size, options.device_tokens // page_size, options.host_tokens // page_size, options.eviction_policy
    )
    print(
        f"bench_trace: device {options.device_tokens} tokens, host {options.host_tokens} tokens,"
        f" page {page_size}, {options.eviction_policy}"
    )
    print_tally(replay(cache, read_trace(options.file, options.limit)))
    check_tree(cache.tree)
    check_pools(cache.tree, cache.device, cache.host)
    check_unlocked(cache.tree)


if __name__ == "__main__":
    main()
