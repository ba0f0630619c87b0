"""How many tokens the device pool and the host pool hold.

Called by `resolve` once, in the launcher, for all ranks together: sizes are the same on every rank by construction, and
no rank looks at the free memory by itself.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from sglang_hicache.config import PoolConfig
from sglang_hicache.errors import UserError
from sglang_hicache.model_facts import ModelFacts

#: Device pool on CPU when nothing was asked for: eight prompts of 8k tokens, and no machine is emptied by a first try.
DEFAULT_CPU_TOKENS = 65_536

#: Share of the memory of the machine that weights and device pool may take by themselves on CPU.
CPU_MEMORY_SHARE = 0.5

DEFAULT_RATIO = 2.0

#: Kept back for everything else when the size of the host pool is chosen here; a small machine keeps back half.
HOST_RESERVE_BYTES = 10 << 30

#: Of what a rank may take: the sum is made from estimates (weights, allocator, page tables).
HOST_MARGIN = 0.95

#: Activations and the libraries' own memory on a CUDA device.
CUDA_RESERVE_BYTES = 1 << 30

#: A pool below this many pages cannot hold one request beside the page it is about to evict.
FEWEST_PAGES = 4


@dataclass(frozen=True, slots=True)
class Memory:
    """What may be used, and what bounds it (for messages)."""

    host_bytes: int
    host_bound: str
    #: Free memory of the fullest device; None on CPU, where the device pool lives in host memory.
    device_bytes: int | None = None


def pool_config(
    args: argparse.Namespace, facts: ModelFacts, dtype: str, memory: Memory, rewrites: list[str]
) -> PoolConfig:
    """Both sizes, in tokens of one rank."""
    token_bytes = facts.token_bytes(dtype, args.tp_size)
    device_tokens = _device_tokens(args, facts, token_bytes, memory, rewrites)
    host_tokens = 0
    if args.enable_hierarchical_cache:
        left_bytes = memory.host_bytes
        if memory.device_bytes is None:
            left_bytes -= facts.weights_bytes + device_tokens * token_bytes * args.tp_size
        host_tokens = _host_tokens(args, token_bytes, device_tokens, max(0, left_bytes), memory, rewrites)
    return PoolConfig(
        page_size=args.page_size, device_tokens=device_tokens, host_tokens=host_tokens, token_bytes=token_bytes
    )


def _device_tokens(
    args: argparse.Namespace, facts: ModelFacts, token_bytes: int, memory: Memory, rewrites: list[str]
) -> int:
    page = args.page_size
    asked = args.max_total_tokens
    if asked is not None:
        tokens = max(FEWEST_PAGES, asked // page) * page
        if tokens != asked:
            rewrites.append(
                f"--max-total-tokens {asked}: {tokens}, whole pages of {page} tokens, at least {FEWEST_PAGES} of them"
            )
        _check_device_room(tokens * token_bytes, args, facts, memory)
        return tokens
    if memory.device_bytes is not None:
        weights_bytes = facts.weights_bytes / args.tp_size
        fits = int((memory.device_bytes * args.mem_fraction_static - CUDA_RESERVE_BYTES - weights_bytes) // token_bytes)
        reason = f"{args.mem_fraction_static} of the free device memory, less the weights"
    else:
        budget = (memory.host_bytes * CPU_MEMORY_SHARE - facts.weights_bytes) / args.tp_size
        fits = min(DEFAULT_CPU_TOKENS, int(budget // token_bytes))
        reason = (
            "the default on CPU"
            if fits == DEFAULT_CPU_TOKENS
            else f"what half of {memory.host_bound} ({_gib(memory.host_bytes)}) holds beside the weights"
        )
    tokens = fits // page * page
    if tokens < FEWEST_PAGES * page:
        raise UserError(
            f"there is no room for a device pool of {FEWEST_PAGES} pages of {page} tokens "
            f"({token_bytes} bytes per token): {reason} is too little; free memory, use a smaller model or more ranks"
        )
    rewrites.append(f"--max-total-tokens: {tokens}, {reason}")
    return tokens


def _check_device_room(pool_bytes: int, args: argparse.Namespace, facts: ModelFacts, memory: Memory) -> None:
    """An explicit size is taken at its word, unless it cannot fit."""
    if memory.device_bytes is None:
        needed_bytes, room_bytes, bound = pool_bytes * args.tp_size, memory.host_bytes, memory.host_bound
    else:
        needed_bytes, room_bytes, bound = pool_bytes, memory.device_bytes, "the free device memory"
    if needed_bytes > room_bytes:
        raise UserError(
            f"--max-total-tokens {args.max_total_tokens} needs {_gib(needed_bytes)} for {args.tp_size} rank(s), but "
            f"{bound} leaves {_gib(room_bytes)}; give less, or leave it out"
        )


def _host_tokens(
    args: argparse.Namespace, token_bytes: int, device_tokens: int, left_bytes: int, memory: Memory, rewrites: list[str]
) -> int:
    """Size, else ratio, else the default ratio as far as memory allows; a whole number of pages, one to spare."""
    page = args.page_size
    if args.hicache_size > 0 or args.hicache_ratio is not None:
        if args.hicache_size > 0:
            flag, tokens = f"--hicache-size {args.hicache_size}", int(args.hicache_size * 1e9 // token_bytes)
        else:
            flag, tokens = f"--hicache-ratio {args.hicache_ratio}", int(device_tokens * args.hicache_ratio)
        tokens = (tokens // page + 1) * page
        needed_bytes = tokens * token_bytes * args.tp_size
        if needed_bytes > left_bytes:
            raise UserError(
                f"{flag} needs {_gib(needed_bytes)} for {args.tp_size} rank(s), but {memory.host_bound} leaves "
                f"{_gib(left_bytes)}; give less, or leave it out for what fits"
            )
        return tokens
    reserve_bytes = min(HOST_RESERVE_BYTES, left_bytes // 2)
    budget_bytes = (left_bytes - reserve_bytes) / args.tp_size * args.hicache_host_memory_fraction
    ratio = min(DEFAULT_RATIO, budget_bytes * HOST_MARGIN / (device_tokens * token_bytes))
    tokens = (int(device_tokens * ratio) // page + 1) * page
    if ratio < DEFAULT_RATIO:
        if tokens < FEWEST_PAGES * page:
            raise UserError(
                f"--enable-hierarchical-cache: {memory.host_bound} leaves {_gib(left_bytes)}, too little for "
                "a host pool; raise the limit, or give a smaller --max-total-tokens"
            )
        rewrites.append(
            f"--hicache-ratio: {ratio:.2f} instead of {DEFAULT_RATIO}, a host pool of {tokens} tokens per rank, "
            f"because {memory.host_bound} leaves {_gib(left_bytes)} for {args.tp_size} rank(s)"
        )
    return tokens


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.2f} GiB"
