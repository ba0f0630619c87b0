"""What a prefetch leaves out is counted, token for token, and what it was cut off from is not taken for missing."""

from __future__ import annotations

from sglang_hicache import wire
from sglang_hicache.cache.page import encode_tokens
from tests.ranks.backups import prompt
from tests.ranks.reads import tick, world_with_storage
from tests.ranks.world import PAGE, World, server_config


def missed(world: World) -> int:
    """Tokens that were not asked for because prefetches may hold half of the host pool only."""
    return world.ranks[0].core.tiers.prefetcher.counters["host_capacity"]


def world_that_reads(**fields: str) -> World:
    """40 host pages, of which prefetches may hold 20."""
    world = world_with_storage(1, device_pages=200, **fields)
    world.ranks[0].storage[1].state = "held"
    return world


def test_what_does_not_fit_beside_other_prefetches_is_counted() -> None:
    world = world_that_reads()
    world.submit(prompt(1, 15))
    tick(world)
    assert missed(world) == 0
    world.submit(prompt(2, 15))
    tick(world)
    assert missed(world) == 10 * PAGE, "five of fifteen pages were asked for"
    world.submit(prompt(3, 15))
    tick(world)
    assert missed(world) == 25 * PAGE, "and of these none"
    # The gate was asked about what there was room for, and wait_complete bypasses it.
    counters = world.ranks[0].core.tiers.prefetcher.counters
    assert {name: n for name, n in counters.items() if name.startswith("gate_")} == {"gate_fetch": 20 * PAGE}


def test_a_page_that_a_read_was_cut_off_from_is_not_taken_for_missing() -> None:
    """1. A read hangs. 2. The same text is computed and stored by another request. 3. The read is given up with no
    page: that says nothing of the store, and what is stored is not written a second time."""
    config = server_config(1, device_pages=200, host_pages=200)
    world = World(0, 1, fault_rate=0.0, config=config)
    world.command(wire.AttachStorage, backend="memory", prefetch_policy="wait_complete",
                  extra_config_json='{"prefetch_threshold": 4}')  # fmt: skip
    world.settle()
    tokens, rank = prompt(1, 6), world.ranks[0]
    world.submit(tokens, max_new_tokens=1)
    world.settle()
    tiers = rank.core.tiers
    tiers.flush()
    rid = world.submit(tokens, max_new_tokens=1)
    tick(world)
    rank.storage[1].step()
    tick(world)
    assert tiers.ops.counts() == {"read": 1}
    request, pages = rank.core._requests[rid], tiers.controller.allocate_host(6)
    for i, page in enumerate(pages):
        rank.worker.host[page] = ("", *tokens[: (i + 1) * PAGE])
    key = encode_tokens(tokens[: 6 * PAGE])
    node, _ = tiers.controller.tree.insert_host(request.seed, key, 0, pages, rank.core.tick)
    node.stored = tiers.storage.tag
    tiers.prefetcher.policy = "best_effort"
    for _ in range(3):
        tick(world)
    assert not tiers.ops.counts().get("write")
