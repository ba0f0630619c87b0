"""What the tests of live control ask of a simulated server: other stores, commands in a hurry, and their times."""

from __future__ import annotations

import json

from sglang_hicache import wire
from sglang_hicache.storage.attachment import StorageSlot
from tests.ranks.reads import tick
from tests.ranks.world import PlayedStorage, Store, World

#: Of the plan's clock, from one tick to the next.
STEP_US = 20_000


def attach(
    world: World, path: str = "", *, switch: bool = False, tolerance: dict | None = None, **fields: object
) -> str:
    """Attach, or switch to, the file store in this folder, or, without one, the memory store."""
    config: dict[str, object] = {"prefetch_threshold": 4}
    config |= {"fault_tolerance": tolerance} if tolerance else {}
    config |= {"file_storage_path": path} if path else {}
    backend = "file" if path else "memory"
    fields = {"mode": "drain", "drain_s": 2.0, "prefetch_policy": "wait_complete"} | fields
    return world.command(
        wire.AttachStorage, backend=backend, extra_config_json=json.dumps(config), switch=switch, **fields
    )


def store(world: World, path: str = "") -> Store:
    """What it holds."""
    return world.stores["file" + path if path else "memory"]


def detach(world: World, mode: str = "drain", deadline_s: float = 1.0) -> str:
    return world.command(wire.DetachStorage, mode=mode, deadline_s=deadline_s)


def slot(world: World) -> StorageSlot:
    """Of rank 0; the others have the same."""
    return world.ranks[0].core.tiers.slot


def processes(world: World, epoch: int) -> list[PlayedStorage]:
    """In rank order."""
    return [rank.storage[epoch] for rank in world.ranks]


def hold(world: World, epoch: int, *ranks: int) -> None:
    """These ranks' processes, or all, hang from now on."""
    for process in processes(world, epoch):
        if not ranks or process.rank.number in ranks:
            process.state = "held"


def moment(world: World) -> None:
    """A tick in which copies end and every process that does not hang does a thing."""
    for rank in world.ranks:
        while rank.copies:
            rank.finish_copy()
        for process in list(rank.storage.values()):
            process.step()
    tick(world)
    world.now_us += STEP_US


def until_answered(world: World, command: str, limit: int = 500) -> float:
    """Let time go by until every rank has answered; seconds of the plan's clock that it took."""
    began_us = world.now_us
    for _ in range(limit):
        if all(any(a.id == command for a in rank.answers) for rank in world.ranks):
            return (world.now_us - began_us) / 1e6
        moment(world)
    raise AssertionError(f"{command} was never answered: {slot(world)!r}")


def ended(world: World, rid: str) -> wire.RequestOutput | None:
    """The last output of a request, if there has been one."""
    return next((o for o in world.ranks[0].outputs if o.rid == rid and o.finish is not None), None)
