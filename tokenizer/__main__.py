"""Process edge of `python -m sglang_hicache.tokenizer`, which the launcher starts."""

from sglang_hicache.child import run
from sglang_hicache.tokenizer.process import main

if __name__ == "__main__":
    run("tokenizer", main)
