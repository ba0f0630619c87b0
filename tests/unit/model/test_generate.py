"""Our forwards against transformers' own `generate`, greedy, in fp32: equal tokens."""

from __future__ import annotations

import pytest
import torch

from sglang_hicache.workers.batch import ForwardBatch, ForwardRow, RowSampling
from tests.unit.model.support import (
    VOCAB_SIZE,
    config_of,
    generate,
    greedy_batch,
    model_config,
    open_worker,
    prompts,
    save_model,
)

_LENGTHS, _COUNT = (5, 33, 100, 170, 64, 1), 16


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2", "qwen3", "mistral"])
def test_continuous_batch_equals_generate(name, tmp_path):
    """Staggered arrival, chunked prompts mixed with decode, pages in no order, whatever the page size."""
    model = save_model(tmp_path, config_of(name))
    wanted = prompts(_LENGTHS)
    expected = [generate(model, prompt, _COUNT) for prompt in wanted]
    assert len({token for answer in expected for token in answer}) > 5, "the random model is too dull to test with"
    for page_size in (1, 16, 64):
        worker = open_worker(model_config(tmp_path, deterministic=page_size == 16), page_size)
        assert greedy_batch(worker, wanted, _COUNT) == expected
        worker.close()


def test_the_window_matters(tmp_path):
    """Negative control: what the mistral test compares does depend on the window."""
    config = config_of("mistral")
    windowed = generate(save_model(tmp_path, config), prompts([170])[0], _COUNT)
    config.sliding_window = None
    save_model(tmp_path, config)
    worker = open_worker(model_config(tmp_path), 16)
    assert greedy_batch(worker, prompts([170]), _COUNT) != [windowed]
    worker.close()


def test_a_batch_without_wanted_tokens_fills_pages(llama_worker):
    tokens = prompts([20])[0]
    assert llama_worker.forward_blocking(ForwardBatch([ForwardRow(tokens, 0, [3, 4], None)])) == []
    kv = llama_worker.runner.pool.kv
    assert kv[:, :, 3].any(dim=-1).all(), "a slot of the first page was not written"
    assert kv[:, :, 4, :4].any(dim=-1).all() and not kv[:, :, 4, 4:].any()


def test_dummy_tokens_write_nowhere(tmp_path):
    """Exact numerics pad the batch; no page, not even the dummy page, shows it."""
    save_model(tmp_path, config_of("llama"))
    worker = open_worker(model_config(tmp_path, deterministic=True), 1)
    pool = worker.runner.pool
    assert not pool.kv.any()
    worker.forward_blocking(ForwardBatch([ForwardRow([5, 6, 7], 0, [9, 4, 2], RowSampling())]))
    written = [page for page in range(pool.pages) if pool.kv[:, :, page].any()]
    assert written == [2, 4, 9]
    worker.close()


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_nan_stays_in_its_sequence(tmp_path, deterministic):
    """What an earlier owner left in the unused end of a page must not reach the next one through the mask."""
    save_model(tmp_path, config_of("llama"))
    worker = open_worker(model_config(tmp_path, deterministic=deterministic), 16)
    long, short = prompts([30, 9])
    rows = [ForwardRow(long, 0, [1, 2], RowSampling()), ForwardRow(short, 0, [3], RowSampling())]
    first, second = worker.forward_blocking(ForwardBatch(rows))
    decode = [ForwardRow([first], 30, [1, 2], RowSampling()), ForwardRow([second], 9, [3], RowSampling())]
    clean = worker.runner.forward(ForwardBatch(decode))
    worker.runner.pool.kv[:, :, 3, 10:] = torch.nan
    worker.runner.pool.kv[:, :, 0] = torch.nan
    assert torch.equal(worker.runner.forward(ForwardBatch(decode)), clean)
    worker.close()


def test_token_ids_outside_the_vocabulary_harm_nobody(llama_worker):
    good = prompts([9])[0]
    bad = [VOCAB_SIZE, -7, 10**12, 3]
    alone = llama_worker.forward_blocking(ForwardBatch([ForwardRow(good, 0, [1], RowSampling())]))
    rows = [ForwardRow(bad, 0, [2], RowSampling()), ForwardRow(good, 0, [3], RowSampling())]
    assert llama_worker.forward_blocking(ForwardBatch(rows))[1:] == alone
    assert llama_worker.vocab_size == VOCAB_SIZE


def test_sampled_tokens_repeat_after_a_retraction(llama_worker):
    """The same request, computed again from its prompt in another batch, draws the same tokens."""
    prompt = prompts([12])[0]

    def answer(neighbour: list[int], pages: list[int]) -> list[int]:
        tokens = list(prompt)
        done = 0
        for _ in range(8):
            sampling = RowSampling(temperature=1.5, seed=41, position=len(tokens))
            rows = [ForwardRow(neighbour, 0, [8, 9], RowSampling(temperature=2.0, seed=3))]
            rows.append(ForwardRow(tokens[done:], done, pages, sampling))
            done = len(tokens)
            tokens.append(llama_worker.forward_blocking(ForwardBatch(rows))[1])
        return tokens[len(prompt) :]

    assert answer([4, 5, 6], [1, 2]) == answer([7] * 20, [5, 3])
