"""Process edge of `python -m sglang_hicache.scheduler rank R`, which the launcher starts."""

from sglang_hicache.child import run
from sglang_hicache.scheduler.process import main

if __name__ == "__main__":
    run("scheduler", main)
