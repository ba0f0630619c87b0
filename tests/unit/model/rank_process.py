"""The ranks of a tensor-parallel worker: `python -m tests.unit.model.rank_process SIZE FOLDER`.

Reads jobs as JSON from standard input and forks one process per rank, so that torch is imported once and not
once per rank; nothing has computed before the fork.  Rank r leaves its results in FOLDER/rank_r.json.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from tests.unit.model.scenarios import differences
from tests.unit.model.support import greedy_batch, model_config, open_worker, prompts


def _run(job: dict[str, Any], rank: int, size: int) -> dict[str, Any]:
    torch.set_num_threads(job.get("threads", 1))
    config = model_config(
        Path(job["folder"]), job["dtype"], deterministic=job["kind"] == "exact", device=job.get("device", "cpu")
    )
    worker = open_worker(config, job["page_size"], rank=rank, tp_size=size, meet=job["meet"])
    try:
        layout = worker.layout
        result = {
            "heads": [layout.head_start, layout.head_end],
            "writes": layout.writes,
            "numerics_class": layout.numerics_class,
        }
        if job["kind"] == "exact":
            result["differences"] = differences(worker)
        else:
            result["tokens"] = greedy_batch(worker, prompts(job["lengths"]), job["count"])
        return result
    finally:
        worker.close()


def _be_rank(jobs: list[dict[str, Any]], rank: int, size: int, folder: Path) -> None:
    """The child's whole life; never returns into the parent's code."""
    try:
        results = [_run(job, rank, size) for job in jobs]
        (folder / f"rank_{rank}.json").write_text(json.dumps(results))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main() -> int:
    size, folder = int(sys.argv[1]), Path(sys.argv[2])
    jobs = json.load(sys.stdin)
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            _be_rank(jobs, rank, size, folder)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(main())
