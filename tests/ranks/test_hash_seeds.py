"""Each core in its own interpreter with its own PYTHONHASHSEED: nothing may depend on the order of a set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from tests.ranks.replay import Recording
from tests.ranks.test_ranks_agree import play

ROOT = Path(__file__).parents[2]


def test_cores_in_other_interpreters_agree(tmp_path: Path) -> None:
    world = play(seed=5, rounds=2, steps=900)
    file = tmp_path / "plans"
    file.write_bytes(msgspec.msgpack.encode(Recording(world.config, world.plans)))
    wanted = [str(world.ranks[0].digests[plan.number]) for plan in world.plans]
    for rank, hash_seed in enumerate(("0", "1", "4242")):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-m", "tests.ranks.replay", str(file), str(rank)],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True,
        )
        assert done.stdout.split() == wanted, f"PYTHONHASHSEED={hash_seed} leads to another state"
