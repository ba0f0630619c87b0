"""A rank whose model is synthetic; everything else is real, storage process included.  See `synthetic_server.py`.

Ready in a fifth of a second, because torch is never imported.
"""

from __future__ import annotations

from sglang_hicache import child
from sglang_hicache.config import ServerConfig
from sglang_hicache.scheduler import process
from sglang_hicache.workers.synthetic import SyntheticWorker


def load_synthetic(config: ServerConfig, rank: int) -> SyntheticWorker:
    """In the place of the model."""
    worker = SyntheticWorker(rank=rank, tp_size=config.tp_size)
    worker.load_blocking(config.pool.page_size)
    return worker


if __name__ == "__main__":
    process.load_worker_blocking = load_synthetic
    child.run("scheduler", process.main)
