"""The model path on CUDA devices: equal tokens, copies on a stream of their own, ranks over nccl."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging

from sglang_hicache.cache.pools import HostPool
from sglang_hicache.errors import UserError
from sglang_hicache.workers.batch import ForwardBatch, ForwardRow, RowSampling
from sglang_hicache.workers.model_worker import ModelWorker
from tests.unit.model.ranks import run_ranks
from tests.unit.model.scenarios import differences
from tests.unit.model.support import config_of, generate, greedy_batch, model_config, open_worker, prompts, save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.leaks("the CUDA driver opens threads and descriptors once per process"),
]

_PAGES = 32
#: Cycles that keep a stream busy for a good part of a second.
_LONG_CYCLES = 1_000_000_000


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    logging.disable_progress_bar()


@pytest.fixture
def worker(tmp_path) -> Iterator[ModelWorker]:
    """One rank in fp32 with a pinned host pool."""
    save_model(tmp_path, config_of("llama"))
    worker = ModelWorker(model_config(tmp_path, device="cuda"), 0, 1, "")
    worker.load_blocking(16)
    host = HostPool(_PAGES, worker.layout.page_bytes)
    worker.allocate(_PAGES, host)
    yield worker
    worker.close()
    host.close()


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2", "qwen3", "mistral"])
def test_continuous_batch_equals_generate(name, tmp_path):
    model = save_model(tmp_path, config_of(name))
    wanted = prompts((5, 33, 100, 170, 64, 1))
    expected = [generate(model, prompt, 12) for prompt in wanted]
    for page_size in (1, 16, 64):
        worker = open_worker(model_config(tmp_path, device="cuda"), page_size)
        assert greedy_batch(worker, wanted, 12) == expected
        worker.close()


def _logits(worker: ModelWorker, tokens: list[int], prefix: int, pages: list[int]) -> torch.Tensor:
    return worker.runner.forward(ForwardBatch([ForwardRow(tokens[prefix:], prefix, pages, RowSampling())]))


def test_roundtrip_keeps_every_bit(worker):
    kv = worker.runner.pool.kv
    kv.normal_()
    before = kv.clone()
    worker.copy_out(1, [3, 4, 5, 9], [0, 1, 7, 2])
    worker.copy_in(2, [20, 21, 8, 7], [0, 1, 7, 2])
    torch.cuda.synchronize()
    assert worker.finished_copies() == [1, 2]
    assert torch.equal(kv[:, :, [20, 21, 8, 7]], before[:, :, [3, 4, 5, 9]])


def test_fm36_a_forward_waits_for_a_slow_load(worker):
    """The copy stream is held up; the forward is issued meanwhile and must still read the loaded pages."""
    tokens = prompts([40])[0]
    _logits(worker, tokens, 0, [1, 2, 3])
    expected = _logits(worker, tokens, 32, [1, 2, 3])
    worker.copy_out(1, [1, 2], [0, 1])
    torch.cuda.synchronize()
    assert worker.finished_copies() == [1]
    worker.runner.pool.kv.fill_(7.0)
    with torch.cuda.stream(worker.copies.stream):
        torch.cuda._sleep(_LONG_CYCLES)
    worker.copy_in(2, [11, 12], [0, 1])
    assert worker.finished_copies() == [], "reported before it was done"
    worker.copies.fence()
    torch.testing.assert_close(_logits(worker, tokens, 32, [11, 12, 13]), expected, rtol=1e-5, atol=1e-5)
    torch.cuda.synchronize()
    assert worker.finished_copies() == [2]


def test_fm37_a_page_is_refilled_behind_the_slow_copy_that_saves_it(worker):
    kv = worker.runner.pool.kv
    kv.normal_()
    before = kv.clone()
    with torch.cuda.stream(worker.copies.stream):
        torch.cuda._sleep(_LONG_CYCLES)
    worker.copy_out(1, [10, 11], [3, 2])
    worker.copy_in(2, [11], [3])
    worker.forward_blocking(ForwardBatch([ForwardRow([4, 5], 0, [10], RowSampling())]))
    worker.copy_in(3, [30, 31], [3, 2])
    torch.cuda.synchronize()
    assert torch.equal(kv[:, :, [30, 31]], before[:, :, [10, 11]])
    assert torch.equal(kv[:, :, 11], before[:, :, 10])
    assert not torch.equal(kv[:, :, 10], before[:, :, 10])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_is_kept_or_refused_at_start(dtype, tmp_path):
    """cuBLAS promises nothing about rows either: what the self-check lets through must hold."""
    save_model(tmp_path, config_of("llama"))
    config = model_config(tmp_path, dtype, deterministic=True, device="cuda")
    try:
        worker = open_worker(config, 16)
    except UserError as refusal:
        assert "cannot be kept on this machine" in str(refusal)
        return
    assert worker.layout.numerics_class.startswith("exact:1:cuda:")
    assert differences(worker) == []
    worker.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_two_ranks_over_nccl_answer_like_transformers(tmp_path):
    model = save_model(tmp_path / "model", config_of("llama"))
    lengths = (5, 33, 100, 64, 1)
    job = {
        "kind": "greedy",
        "folder": str(tmp_path / "model"),
        "dtype": "float32",
        "device": "cuda",
        "page_size": 16,
        "lengths": lengths,
        "count": 10,
    }
    expected = [generate(model, prompt, 10) for prompt in prompts(lengths)]
    assert [rank[0]["tokens"] for rank in run_ranks(2, [job], tmp_path)] == [expected, expected]


def test_a_rank_without_a_device_is_refused(tmp_path):
    with pytest.raises(UserError, match="needs CUDA device"):
        ModelWorker(model_config(tmp_path, device="cuda"), torch.cuda.device_count(), 1, "")
