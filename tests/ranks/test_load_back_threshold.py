"""A host hit shorter than the threshold is computed again: a copy that short costs more than it saves."""

from __future__ import annotations

import pytest

from sglang_hicache import wire
from tests.ranks.world import PAGE, World, server_config

PROMPT = [5, 3, 1] * 9  # 6 whole pages and a rest
HIT = 6 * PAGE


@pytest.mark.parametrize(("threshold", "from_host"), [(HIT, HIT), (HIT + 1, 0)])
def test_a_short_host_hit_is_computed_again(threshold: int, from_host: int) -> None:
    config = server_config(1, device_pages=16, load_back_threshold=threshold)
    world = World(0, 1, fault_rate=0.0, config=config)
    for prompt in (PROMPT, [9] * 40, [11] * 40, PROMPT):  # the two in the middle push the first off the device
        rid = world.submit(prompt)
        world.settle()
    (last,) = [output.cached for output in world.ranks[0].outputs if output.rid == rid and output.finish is not None]
    assert last == wire.CachedTokens(device=0, host=from_host)
    world.check()
