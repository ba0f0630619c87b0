"""Cached KV gives the same text: token ids from every tier equal those computed without any cache.

Deterministic mode makes this exact: within one TP size results are bit-identical whatever the batch, the chunks and
the tier.  Across TP sizes sums are taken in another order, so token ids are compared within one size only; what TP
does to logits is compared with a tolerance in tests/unit/model.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes.server import Server, cached

EXACT = ("--enable-deterministic-inference", "--page-size", "16", "--chunked-prefill-size", "256")
SYSTEM = (
    "The module provides the classes that support the main interface of the library. Each function returns a list of "
    "the names that are defined in the given namespace, sorted by name, and raises an error if the name is unknown. "
) * 3
QUESTIONS = (
    "Return the value of the first argument.",
    "What happens if the file does not exist when it is opened for reading?",
    "Describe the difference between a list and a tuple in a few words.",
)


def hierarchical(store: Path) -> tuple[str, ...]:
    """A device pool so small that three prompts do not stay on it, and a store."""
    return (
        *EXACT, "--enable-hierarchical-cache", "--max-total-tokens", "768", "--hicache-ratio", "8",
        "--hicache-storage-backend", "file", "--file-storage-path", str(store),
        "--hicache-storage-prefetch-policy", "wait_complete",
        "--hicache-storage-backend-extra-config", '{"prefetch_threshold": 16}', "--check-rank-digests",
    )


def ids(replies: list[dict]) -> list[list[int]]:
    return [reply["output_ids"] for reply in replies]


@pytest.mark.parametrize("tp_size", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_fm39_same_tokens_from_every_tier_and_after_a_restart(tp_size: int, tmp_path: Path) -> None:
    prompts = [SYSTEM + question for question in QUESTIONS]
    with Server(tmp_path / "a", *EXACT, "--disable-radix-cache", tp_size=tp_size) as server:
        wanted = ids([server.generate(prompt) for prompt in prompts])
        assert ids(server.generate_all(prompts)) == wanted, "the batch changes the text: nothing below can be trusted"
    assert len({tuple(tokens) for tokens in wanted}) > 1, "all texts are alike: the test could not tell them apart"

    store = tmp_path / "store"
    with Server(tmp_path / "b", *hierarchical(store), tp_size=tp_size) as server:
        assert ids([server.generate(prompt) for prompt in prompts]) == wanted, "cold"
        again = server.generate(prompts[-1])
        assert again["output_ids"] == wanted[-1] and cached(again)["device"], "device hit"
        for filler in ("one", "two", "three"):
            server.generate(f"{filler} " * 300, max_new_tokens=1)
        host = server.generate(prompts[0])
        assert host["output_ids"] == wanted[0] and cached(host)["host"], cached(host)
        server.quiesce()
        server.flush()
        stored = server.generate_all(prompts)
        assert ids(stored) == wanted and any(cached(reply)["storage"] for reply in stored), "storage hit"
    with Server(tmp_path / "c", *hierarchical(store), tp_size=tp_size) as server:
        first = server.generate(prompts[0])
        assert first["output_ids"] == wanted[0] and cached(first)["storage"] > 100, "after a restart"
        assert ids([server.generate(prompt) for prompt in prompts]) == wanted
