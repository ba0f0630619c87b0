"""What a shared prefix costs from each tier, what determinism costs, and what a storage costs that never hits.

    python scripts/bench/bench_serving.py [--quick] [--tp 1 2] [--model-path DIR] [--json FILE]
                                          [--only tiers|deterministic|misses|sick]

Drives real servers over HTTP.  Every number stands beside a limit measured in the same run: a hit beside the same
prompt computed from nothing (what the cache saves) and beside a prompt that is only as long as the part that no cache
holds (what a hit can reach at best).  Comparisons of two servers ask them in turn, in alternating order, and give the
median of the pairwise ratios with a 95 % bootstrap interval.

"sick" asks for prompts that no tier has seen, on a server whose store takes 5 ms longer for every call, fails every
call, or never answers one, and on a server without a store: time to first token, and whether the worst of it stayed
within what the prefetch policy and the look-up deadline allow.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from served import Answer, Server, share_of_cores

from sglang_hicache.storage.registry import ALLOW_FAULTY_ENV

PAGE = 64
#: States that a prefix can be in.  "restart" is storage again, read by a server that did not write it.
TIERS = ("cold", "device", "host", "storage", "restart")

#: What a sick store does, and the saboteur's word for it.
SICK = {"takes 5 ms longer per call": "slow", "fails every call": "error", "never answers": "hang"}
SLOW_MS = 5.0
LOOKUP_S = 0.05


class Sizes(NamedTuple):
    """How much is measured."""

    prefix_tokens: int
    tail_tokens: int
    output_tokens: int
    rounds: int
    pairs: int


FULL = Sizes(4096, 48, 64, 7, 40)
QUICK = Sizes(4096, 48, 24, 2, 6)


class Prompts:
    """Prompts that nobody has asked before; token ids below the vocabulary of any model."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def take(self, tokens: int) -> list[int]:
        """Fresh random token ids; the first 300 ids are left out, special tokens live there."""
        return [self._random.randrange(300, 1000) for _ in range(tokens)]


def hierarchical(store: Path) -> list[str]:
    """Flags for all three tiers; storage answers are waited for, so that a hit is a hit."""
    return [
        "--enable-hierarchical-cache",
        *("--hicache-storage-backend", "file", "--file-storage-path", str(store)),
        *("--hicache-storage-prefetch-policy", "wait_complete"),
        # A loaded benchmark machine may need longer than the default of 50 ms; a late look-up would count as a miss.
        *("--hicache-storage-lookup-timeout", "2"),
    ]


def pools(sizes: Sizes) -> list[str]:
    """A device pool of two prompts and a half: the third prompt evicts the first, which the host pool still holds."""
    whole = sizes.prefix_tokens + sizes.tail_tokens + sizes.output_tokens + 2 * PAGE
    tokens = whole * 5 // 2 // PAGE * PAGE
    return ["--page-size", str(PAGE), "--max-total-tokens", str(tokens), "--hicache-ratio", "8"]


class TierRun:
    """Asks one server, and its successor, for the same prefixes in every state that a prefix can be in."""

    def __init__(self, sizes: Sizes, prompts: Prompts) -> None:
        self._sizes, self._prompts = sizes, prompts
        self.prefixes = [prompts.take(sizes.prefix_tokens) for _ in range(sizes.rounds)]
        self.answers: dict[str, list[Answer]] = {tier: [] for tier in (*TIERS, "limit")}

    def _ask(self, server: Server, state: str, prefix: list[int]) -> None:
        answer = server.ask(prefix + self._prompts.take(self._sizes.tail_tokens), self._sizes.output_tokens)
        if state in ("device", "host", "storage"):
            expect(answer, state, len(prefix))
        elif state == "restart":
            expect(answer, "storage", len(prefix))
        self.answers[state].append(answer)

    def first_server(self, server: Server) -> None:
        """Cold, device, host and storage; and the limit: nothing cached, and nothing but the tail to compute."""
        for prefix in self.prefixes:
            self._ask(server, "cold", prefix)
            self._ask(server, "device", prefix)
            for _ in range(3):  # push it off the device
                server.ask(self._prompts.take(self._sizes.prefix_tokens), 1)
            self._ask(server, "host", prefix)
            server.settle()
            server.flush()
            self._ask(server, "storage", prefix)
            self._ask(server, "limit", [])
        server.settle()

    def second_server(self, server: Server) -> None:
        """The same prefixes, known to storage only."""
        for prefix in self.prefixes:
            self._ask(server, "restart", prefix)


def expect(answer: Answer, tier: str, tokens: int) -> None:
    """A measurement of a hit that was none is no measurement."""
    whole_pages = tokens // PAGE * PAGE
    if answer.cached[tier] < whole_pages * 9 // 10:
        raise SystemExit(f"expected {whole_pages} tokens from {tier}, got {answer.cached}")


def measure_tiers(folder: Path, tp_size: int, flags: list[str], sizes: Sizes) -> dict[str, dict[str, float]]:
    """Medians of time to first token and of output speed for every state of a prefix."""
    run = TierRun(sizes, Prompts(tp_size))
    every = [*flags, "--tp-size", str(tp_size), *pools(sizes), *hierarchical(folder / "pages")]
    with Server(folder, every) as server:
        server.ask(Prompts(99).take(256), 8)  # the first request pays for warm-up
        run.first_server(server)
    with Server(folder, every) as server:
        server.ask(Prompts(98).take(256), 8)
        run.second_server(server)
    return {
        state: {
            "first_token_ms": 1e3 * statistics.median(answer.first_token_s for answer in answers),
            "tokens_per_s": statistics.median(answer.tokens_per_s for answer in answers),
        }
        for state, answers in run.answers.items()
    }


def print_tiers(tp_size: int, sizes: Sizes, measured: dict[str, dict[str, float]]) -> None:
    """One line per state."""
    print(f"\nTP {tp_size}: prefix of {sizes.prefix_tokens} tokens, tail of {sizes.tail_tokens}, {sizes.rounds} rounds")
    print(f"{'prefix is':>10} {'first token':>12} {'of cold':>9} {'of limit':>9} {'output':>14}")
    cold, limit = measured["cold"]["first_token_ms"], measured["limit"]["first_token_ms"]
    for state, found in measured.items():
        first = found["first_token_ms"]
        speed = f"{found['tokens_per_s']:.1f} tok/s"
        print(f"{state:>10} {first:>9.1f} ms {first / cold:>9.3f} {first / limit:>9.2f} {speed:>14}")


def bootstrap(ratios: list[float], draws: int = 4000) -> tuple[float, float, float]:
    """Median, and the 95 % interval of medians of resampled ratios."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(draws))
    return statistics.median(ratios), medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def compare(first: Server, second: Server, ask: Callable[[Server, int], float], pairs: int) -> list[float]:
    """second / first for each pair; who goes first alternates, so that drift and warmth favour nobody."""
    ratios = []
    for pair in range(-2, pairs):  # two pairs to warm up, not counted
        order = (first, second) if pair % 2 else (second, first)
        seconds = {server: ask(server, pair) for server in order}
        if pair >= 0:
            ratios.append(seconds[second] / seconds[first])
    return ratios


@contextlib.contextmanager
def two_servers(folder: Path, common: list[str], extra: list[str]) -> Iterator[tuple[Server, Server]]:
    """A server with the common flags, and one with the extra ones as well."""
    with Server(folder / "plain", common) as plain, Server(folder / "with", [*common, *extra]) as other:
        yield plain, other


def measure_cost(folder: Path, common: list[str], extra: list[str], sizes: Sizes) -> tuple[float, float, float]:
    """Ratio of whole request times for prompts that no tier has seen: every look-up misses, every page is written."""
    common = [*common, "--page-size", str(PAGE), "--max-total-tokens", "65536"]
    with two_servers(folder, common, extra) as (plain, other):

        def ask(server: Server, pair: int) -> float:
            if server is other and "--hicache-storage-backend" in extra:
                server.settle()  # writes of the last pair would be paid by whoever is asked now
            # Both get the same prompt of this pair, and nobody has ever seen it.
            return server.ask(Prompts(1000 + pair).take(sizes.prefix_tokens // 2), sizes.output_tokens).total_s

        return bootstrap(compare(plain, other, ask, sizes.pairs))


def print_cost(what: str, cost: tuple[float, float, float], pairs: int) -> None:
    """One comparison on one line."""
    median, low, high = ((value - 1) * 100 for value in cost)
    print(f"{what}: {median:+.1f} % (95 % interval {low:+.1f} to {high:+.1f} %, {pairs} interleaved pairs)")


def sick_flags(store: Path, kind: str) -> list[str]:
    """Flags for a store that passes its self-test, and from then on is slow, fails or hangs."""
    fault = {"kind": SICK[kind], "delay_ms": SLOW_MS}
    # Of the self-test: three look-ups, one read, one write.
    faults = {"exists": fault | {"first": 3}, "read": fault | {"first": 1}, "write": fault | {"first": 1}}
    config = {"inner": "file", "inner_config": {"file_storage_path": str(store)}, "faults": faults}
    return [
        "--enable-hierarchical-cache",
        *("--hicache-storage-backend", "faulty", "--hicache-storage-backend-extra-config", json.dumps(config)),
        *("--hicache-storage-prefetch-policy", "timeout", "--hicache-storage-lookup-timeout", str(LOOKUP_S)),
        # A store that hangs is otherwise detached after half a minute: then it would cost nothing.
        *("--hicache-storage-op-timeout", "3600"),
    ]


def measure_sick(folder: Path, common: list[str], kind: str, sizes: Sizes) -> dict[str, float]:
    """Time to first token with a sick store, against none."""
    tokens = sizes.prefix_tokens // 2
    common = [*common, "--page-size", str(PAGE), "--max-total-tokens", "65536"]
    first_token_s: dict[Server, list[float]] = {}
    with two_servers(folder, common, sick_flags(folder / "pages", kind)) as (plain, sick):

        def ask(server: Server, pair: int) -> float:
            answer = server.ask(Prompts(2000 + pair).take(tokens), 1)
            if pair >= 0:
                first_token_s.setdefault(server, []).append(answer.first_token_s)
            return answer.first_token_s

        ratio, low, high = bootstrap(compare(plain, sick, ask, sizes.pairs))
        worst_s = max(with_s - without_s for without_s, with_s in zip(first_token_s[plain], first_token_s[sick]))
    # The default of the policy `timeout`: 1 s and 0.25 s per 1,024 tokens.
    bound_s = LOOKUP_S + 1.0 + 0.25 * tokens / 1024
    return {"ratio": ratio, "low": low, "high": high, "worst_ms": 1e3 * worst_s, "bound_ms": 1e3 * bound_s}


def print_sick(kind: str, found: dict[str, float], pairs: int) -> None:
    """One store on one line; a request that fails ends the benchmark before this."""
    ratio, low, high = ((found[name] - 1) * 100 for name in ("ratio", "low", "high"))
    verdict = "held" if found["worst_ms"] <= found["bound_ms"] else "broken"
    print(
        f"first token at 100 % misses with a store that {kind}, against none, TP 1: {ratio:+.1f} % (95 % interval "
        f"{low:+.1f} to {high:+.1f} %, {pairs} interleaved pairs), at worst {found['worst_ms']:+.0f} ms; "
        f"bound {found['bound_ms']:.0f} ms {verdict}, no request failed"
    )


def main() -> None:
    """Runs what was asked for and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it works, not how fast")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2], help="tensor-parallel sizes (default: 1 2)")
    parser.add_argument("--model-path", help="default: the built-in model")
    parser.add_argument("--only", choices=("tiers", "deterministic", "misses", "sick"), help="one part of it")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else FULL
    flags = ["--log-level", "warning", *(["--model-path", arguments.model_path] if arguments.model_path else [])]
    parts = [arguments.only] if arguments.only else ["tiers", "deterministic", "misses", "sick"]
    os.environ[ALLOW_FAULTY_ENV] = "1"
    results: dict[str, object] = {"cores": share_of_cores(), "sizes": sizes._asdict()}

    print(f"{share_of_cores()} cores, page size {PAGE}, times as a client sees them")
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as name:
        folder = Path(name)
        for tp_size in arguments.tp if "tiers" in parts else ():
            measured = measure_tiers(folder / f"tp{tp_size}", tp_size, flags, sizes)
            results[f"tiers_tp{tp_size}"] = measured
            print_tiers(tp_size, sizes, measured)
        print()
        if "deterministic" in parts:
            cost = measure_cost(folder / "deterministic", flags, ["--enable-deterministic-inference"], sizes)
            results["deterministic_cost"] = cost
            print_cost("deterministic inference against the default, TP 1", cost, sizes.pairs)
        if "misses" in parts:
            cost = measure_cost(folder / "misses", flags, hierarchical(folder / "misses" / "pages"), sizes)
            results["misses_cost"] = cost
            print_cost("three tiers at 100 % misses against none but the device, TP 1", cost, sizes.pairs)
        for kind in SICK if "sick" in parts else ():
            found = measure_sick(folder / kind.replace(" ", "_"), flags, kind, sizes)
            results[f"sick_{kind}"] = found
            print_sick(kind, found, sizes.pairs)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
