"""What a sick store costs a request, beside the same request on a server without storage: the promise is 5 %.

    python scripts/bench/bench_gate.py [--quick] [--pairs N] [--only WORD] [--without-gate]
                                       [--model-path DIR] [--json FILE]

Two real servers, asked over HTTP for the same prompts in turn, in alternating order; one of them has a file store that
is made sick (`sglang_hicache/storage/faulty.py`) once both rates are known.  The first requests that meet the sick
store find out and are not counted; how slow the slowest of them was is told apart.  A row with stored prompts asks for
what the store has: where it is well that shows what the gate must not spoil.

Each row is the median of the ratios of time to first token with its 95 % interval by the sign test, which asks nothing
of how they are distributed: of n ratios in rising order the k-th lowest and the k-th highest, with the largest k for
which 2 * sum(C(n, i) for i < k) / 2^n <= 0.05 (W. J. Conover, Practical Nonparametric Statistics, 3rd ed., 1999,
section 3.2).  `--without-gate` shows the same stores with `"cost_gate": false`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench_serving import PAGE, Prompts, two_servers
from served import Server, share_of_cores

from sglang_hicache.storage.fault_control import write_faults
from sglang_hicache.storage.faulty_settings import Fault
from sglang_hicache.storage.registry import ALLOW_FAULTY_ENV

MOST_LOSS = 0.05
#: What a server does once it has answered, copies to the host above all, must not be paid by whoever is asked next.
PAUSE_S = 0.1


class Sizes(NamedTuple):
    """How much is measured."""

    prompt_tokens: int
    #: Requests to each server while the store is well, and after it fell sick, that are not counted.
    warm: int
    finds_out: int
    pairs: int


FULL = Sizes(2048, 8, 8, 40)
QUICK = Sizes(2048, 5, 4, 6)


class Sick(NamedTuple):
    """A row: what the store does, and whether it has what is asked for."""

    name: str
    faults: dict[str, Fault]
    stored: bool = False


def every_call(**fault: object) -> dict[str, Fault]:
    return {call: Fault(**fault) for call in ("exists", "read", "write")}


ROWS = (
    Sick("is well, and has the prompt", {}, stored=True),
    Sick("takes 5 ms longer per call", every_call(kind="slow", delay_ms=5.0)),
    Sick("takes 100 ms longer per call", every_call(kind="slow", delay_ms=100.0)),
    Sick("fails every call", every_call(kind="error")),
    Sick("never answers", every_call(kind="hang")),
    Sick("has the prompt, but reads 1 s longer", {"read": Fault(kind="slow", delay_ms=1000.0)}, stored=True),
    Sick("has the prompt, but no read ends", {"read": Fault(kind="hang")}, stored=True),
)


def sign_interval(values: list[float]) -> tuple[float, float, float]:
    """Median, and its interval of at least 95 %; of too few values all of them, which is less."""
    ordered, n = sorted(values), len(values)
    k = 0
    while 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n <= 0.05:
        k += 1
    k = max(1, k)
    return statistics.median(ordered), ordered[k - 1], ordered[n - k]


def flags_of(store: Path, control: Path, gate: bool) -> list[str]:
    """A store that does what the control file says."""
    config = {
        "inner": "file", "inner_config": {"file_storage_path": str(store)}, "control": str(control), "cost_gate": gate,
    }  # fmt: skip
    return [
        *("--hicache-storage-backend", "faulty", "--hicache-storage-backend-extra-config", json.dumps(config)),
        # A store that hangs is otherwise detached after half a minute: then it would cost nothing.
        *("--hicache-storage-op-timeout", "3600"),
    ]


def measure(folder: Path, common: list[str], row: Sick, sizes: Sizes, gate: bool) -> dict[str, float]:
    """The ratios of one row, in numbers."""
    prompts = Prompts(len(row.name))
    counts = (sizes.warm, sizes.finds_out, sizes.pairs)
    warm, finds_out, counted = ([prompts.take(sizes.prompt_tokens) for _ in range(count)] for count in counts)
    control = folder / "faults.json"
    with two_servers(folder, common, flags_of(folder / "pages", control, gate)) as servers:

        def pair(number: int, tokens: list[int]) -> float:
            """With storage against without; who goes first alternates, so that drift and warmth favour nobody."""
            order = servers if number % 2 else servers[::-1]
            first_token_s = {}
            for server in order:
                first_token_s[server] = server.ask(tokens, 1).first_token_s
                server.rest(PAUSE_S)
            return first_token_s[servers[1]] / first_token_s[servers[0]]

        for number, tokens in enumerate(warm + finds_out + counted if row.stored else warm):
            pair(number, tokens)
        _forget(servers)
        for number, tokens in enumerate(warm[-2:]):  # read again: the rate of reads
            pair(number, tokens)
        write_faults(control, row.faults)
        learning = [pair(number, tokens) for number, tokens in enumerate(finds_out)]
        median, low, high = sign_interval([pair(number, tokens) for number, tokens in enumerate(counted)])
    return {"ratio": median, "low": low, "high": high, "worst_before": max(learning)}


def _forget(servers: tuple[Server, Server]) -> None:
    """Only the store has anything now."""
    servers[1].settle()
    for server in servers:
        server.flush()


def print_row(name: str, found: dict[str, float]) -> None:
    """One row of the table."""
    median, low, high, worst = (
        f"{(found[key] - 1) * 100:+.1f} %" for key in ("ratio", "low", "high", "worst_before")
    )
    verdict = "held" if found["ratio"] <= 1 + MOST_LOSS else "broken"
    print(f"| {name} | {median} | {low} to {high} | {worst} | {verdict} |", flush=True)


def main() -> None:
    """Runs what was asked for and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few pairs: shows that it works, not how fast")
    parser.add_argument("--pairs", type=int, help=f"pairs of each row (default: {FULL.pairs})")
    parser.add_argument("--only", default="", help="rows whose name has this word")
    parser.add_argument("--without-gate", action="store_true", help='with "cost_gate": false')
    parser.add_argument("--model-path", help="default: the built-in model")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else FULL
    sizes = sizes._replace(pairs=arguments.pairs or sizes.pairs)
    common = [
        "--log-level", "warning", "--enable-hierarchical-cache", "--page-size", str(PAGE),
        "--max-total-tokens", str((sizes.warm + sizes.finds_out + sizes.pairs + 8) * (sizes.prompt_tokens + PAGE)),
        *(["--model-path", arguments.model_path] if arguments.model_path else []),
    ]  # fmt: skip
    os.environ[ALLOW_FAULTY_ENV] = "1"
    results: dict[str, object] = {"cores": share_of_cores(), "sizes": sizes._asdict()}
    gate = "off" if arguments.without_gate else "on"
    print(
        f"{share_of_cores()} cores, page size {PAGE}, prompts of {sizes.prompt_tokens} tokens, cost gate {gate}, "
        f"{sizes.pairs} interleaved pairs: time to first token with storage against without\n"
    )
    print("| The store | median | 95 % interval | worst while it was found out | 5 % |\n|---|--:|--:|--:|---|")
    with tempfile.TemporaryDirectory(prefix="bench-gate-") as name:
        for number, row in enumerate(row for row in ROWS if arguments.only in row.name):
            found = measure(Path(name) / str(number), common, row, sizes, not arguments.without_gate)
            results[row.name] = found
            print_row(row.name, found)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
