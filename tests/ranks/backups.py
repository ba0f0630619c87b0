"""What the tests of the backup ask of a simulated server: its books, what its store holds, how its store fails."""

from __future__ import annotations

from collections.abc import Callable

from sglang_hicache import wire
from sglang_hicache.cache.backup_books import Books
from sglang_hicache.cache.page import page_keys
from tests.ranks.world import PAGE, World, server_config

#: Nothing is ever fetched: what is written alone matters, and no request waits for a store that stands still.
ATTACH = {"backend": "memory", "extra_config_json": '{"prefetch_threshold": 4000}'}

Refuse = Callable[[int, wire.WritePages, int], str]


def attach(world: World, **fields: object) -> None:
    command = world.command(wire.AttachStorage, **(ATTACH | fields))
    world.settle()
    assert world.answer(command).success


def world_with_storage(ranks: int = 2, device_pages: int = 200, host_pages: int = 200, **cache: object) -> World:
    """A quiet world with room for everything, whose storage is attached."""
    config = server_config(ranks, device_pages, host_pages, **cache)
    world = World(0, ranks, fault_rate=0.0, config=config)
    attach(world)
    return world


def books(world: World) -> Books:
    """Of rank 0; those of the others say the same."""
    first, *others = (rank.core.tiers.backup.books for rank in world.ranks)
    for other in others:
        assert (other.counters, other.lost) == (first.counters, first.lost)
    return first


def lost(world: World) -> dict[str, int]:
    """Tokens by reason."""
    return {str(reason): tokens for reason, tokens in books(world).lost.items()}


def prompt(number: int, pages: int) -> list[int]:
    """Some text of its own that fills so many pages, and a token to compute."""
    return [100 * number + i % 50 for i in range(pages * PAGE + 1)]


def computed(world: World, *prompts: list[int], new_tokens: int = 1) -> None:
    """Requests that come and go, one after the other."""
    for tokens in prompts:
        world.submit(tokens, max_new_tokens=new_tokens)
        world.settle()


def stored(world: World, tokens: list[int]) -> int:
    """Pages of a prompt that every rank has in the store, from the first one on."""
    n = 0
    for key in page_keys(tokens, PAGE)[: len(tokens) // PAGE]:
        if not all((rank.number, key) in world.store for rank in world.ranks):
            break
        n += 1
    return n


def refuse_writes(world: World, refuse: Refuse | None) -> None:
    """Let the stores refuse pages: (rank, message, index of the page) -> code.  None: they take everything."""
    for rank in world.ranks:
        for process in rank.storage.values():

            def refuses(message: wire.ReadPages | wire.WritePages, at: int, rank: int = rank.number) -> str:
                is_write = isinstance(message, wire.WritePages)
                return refuse(rank, message, at) if refuse is not None and is_write else ""

            process.refuses = refuses


def hold(world: World) -> None:
    """The stores stand still."""
    for rank in world.ranks:
        for process in rank.storage.values():
            if process.state == "open":
                process.state = "held"


def let_go(world: World) -> None:
    for rank in world.ranks:
        for process in rank.storage.values():
            if process.state == "held":
                process.state = "open"


def ticks(world: World, count: int = 12) -> None:
    """Requests are computed and copies end; what the stores do is their affair."""
    for _ in range(count):
        for rank in world.ranks:
            while rank.copies:
                rank.finish_copy()
            world.deliver(rank)
        world.lead()
        for rank in world.ranks[1:]:
            while rank.inbox:
                world.follow(rank)
        world.now_us += 1000


def give_up_device(world: World) -> None:
    """Every rank evicts what it can from the device, as if something large had come."""
    for rank in world.ranks:
        controller = rank.core.tiers.controller
        while (node := controller.tree.device_victim()) is not None:
            assert controller._evict_from_device(node)


def give_up_host(world: World) -> None:
    """The same for the host."""
    for rank in world.ranks:
        controller = rank.core.tiers.controller
        while (node := controller.tree.host_victim()) is not None:
            controller.host.free(controller.tree.clear_host(node))


def is_prefix_closed(world: World) -> bool:
    """No page lies in the store without those before it."""
    return all(
        all((rank, before) in world.store for before in page_keys([t for t in content if isinstance(t, int)], PAGE))
        for (rank, _), content in world.store.items()
    )
