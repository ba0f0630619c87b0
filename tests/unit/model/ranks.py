"""Runs jobs on several ranks, each a process of its own, which meet through a file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from sglang_hicache.cpu_environment import cpu_environment

_TIMEOUT_S = 110


def run_ranks(size: int, jobs: list[dict[str, Any]], folder: Path) -> list[list[dict[str, Any]]]:
    """Results by rank, then by job."""
    for number, job in enumerate(jobs):
        job["meet"] = str(folder / f"meet_{number}")
    command = [sys.executable, "-m", "tests.unit.model.rank_process", str(size), str(folder)]
    environment = os.environ | cpu_environment(size, size, deterministic=True)
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True) as parent:
        try:
            parent.communicate(json.dumps(jobs).encode(), timeout=_TIMEOUT_S)
        finally:
            # One rank's failure leaves the others waiting for it.
            if parent.poll() is None:
                os.killpg(parent.pid, signal.SIGKILL)
    assert parent.returncode == 0
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(size)]
