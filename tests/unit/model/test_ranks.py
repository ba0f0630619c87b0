"""Several ranks of one model, as processes that meet through a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.model.ranks import run_ranks
from tests.unit.model.support import config_of, generate, prompts, save_model

_LENGTHS, _COUNT = (5, 33, 100, 64, 1), 10


def _greedy(folder: Path, page_size: int) -> dict[str, Any]:
    return {
        "kind": "greedy",
        "folder": str(folder),
        "dtype": "float32",
        "page_size": page_size,
        "lengths": _LENGTHS,
        "count": _COUNT,
    }


def _exact(folder: Path, dtype: str, page_size: int, **fields: Any) -> dict[str, Any]:
    return {"kind": "exact", "folder": str(folder), "dtype": dtype, "page_size": page_size, **fields}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[list[int]]]]:
    """Folder and transformers' own greedy answers of each model."""
    found = {}
    for name in ("llama", "llama3", "qwen2", "qwen3", "mistral"):
        folder = tmp_path_factory.mktemp(name)
        model = save_model(folder, config_of(name))
        found[name] = folder, [generate(model, prompt, _COUNT) for prompt in prompts(_LENGTHS)]
    return found


def test_two_ranks_answer_like_transformers_and_are_exact(expected, tmp_path):
    names = list(expected)
    jobs = [_greedy(expected[name][0], page_size) for name, page_size in zip(names, (16, 1, 64, 16, 16))]
    jobs += [_exact(expected["qwen3"][0], "float32", 16), _exact(expected["llama"][0], "bfloat16", 64)]
    results = run_ranks(2, jobs, tmp_path)
    for rank in results:
        for name, result in zip(names, rank):
            assert result["tokens"] == expected[name][1], name
        assert [result["differences"] for result in rank[-2:]] == [[], []]
    assert results[0][-1]["numerics_class"] == results[1][-1]["numerics_class"]
    assert results[0][-1]["numerics_class"].startswith("exact:2:cpu:")
    assert [rank[0]["heads"] for rank in results] == [[0, 1], [1, 2]]
    assert [rank[0]["writes"] for rank in results] == [True, True]


def test_four_ranks_repeat_kv_heads_and_are_exact(expected, tmp_path):
    """Two KV heads on four ranks: pairs of ranks hold the same pages, and the lower one of a pair stores them."""
    folder, tokens = expected["llama"]
    jobs = [_greedy(folder, 16), _exact(folder, "float32", 16), _exact(expected["mistral"][0], "bfloat16", 1)]
    results = run_ranks(4, jobs, tmp_path)
    for rank in results:
        assert rank[0]["tokens"] == tokens
        assert [result["differences"] for result in rank[1:]] == [[], []]
        assert rank[1]["numerics_class"] == results[0][1]["numerics_class"]
    assert [rank[0]["heads"] for rank in results] == [[0, 1], [0, 1], [1, 2], [1, 2]]
    assert [rank[0]["writes"] for rank in results] == [True, False, True, False]


def test_threads_change_no_bit(tmp_path):
    """A width at which MKL, left to itself, cuts sums differently with two threads than with one."""
    config = config_of("llama")
    config.hidden_size, config.head_dim, config.num_hidden_layers = 896, 64, 1
    folder = tmp_path / "wide"
    save_model(folder, config)
    jobs = [_exact(folder, dtype, 16, threads=threads) for dtype in ("float32", "bfloat16") for threads in (1, 2)]
    (results,) = run_ranks(1, jobs, tmp_path)
    assert [result["differences"] for result in results] == [[], [], [], []]
    classes = [result["numerics_class"] for result in results]
    assert classes[0] == classes[1] and classes[2] == classes[3] and classes[0] != classes[2]
