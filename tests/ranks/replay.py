"""Apply recorded plans to one core in this interpreter and print the digest after each.

    python -m tests.ranks.replay PLANS     (started with its own PYTHONHASHSEED by test_hash_seeds.py)
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from sglang_hicache import wire
from sglang_hicache.config import ServerConfig
from sglang_hicache.scheduler.core import SchedulerCore
from tests.ranks.world import next_token


class Recording(msgspec.Struct):
    config: ServerConfig
    plans: list[wire.TickPlan]


def digests(recording: Recording, rank: int) -> list[int]:
    core = SchedulerCore(recording.config, rank)
    found = []
    for plan in recording.plans:
        effects = core.apply(plan)
        if effects.batch is not None:
            texts = [s.request.tokens[: s.request.computed + s.tokens] for s in core._shares if s.is_last]
            core.apply_results([next_token(tokens) for tokens in texts])
        found.append(core.digest)
    return found


if __name__ == "__main__":
    recorded = msgspec.msgpack.decode(Path(sys.argv[1]).read_bytes(), type=Recording)
    print(*digests(recorded, int(sys.argv[2])), sep="\n")
