"""Pages between device pool and host pool: every bit, in the documented layout, in the order of the calls."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sglang_hicache.cache.pools import HostPool
from sglang_hicache.errors import IntegrityError
from sglang_hicache.workers.batch import ForwardBatch, ForwardRow, RowSampling
from sglang_hicache.workers.model_worker import ModelWorker
from sglang_hicache.workers.transfer import page_runs
from tests.unit.model.support import config_of, model_config, prompts, save_model

_DEVICE_PAGES, _HOST_PAGES = 40, 24


@pytest.fixture(params=[("float32", 16), ("bfloat16", 1)], ids=["fp32-16", "bf16-1"])
def worker(request, tmp_path) -> Iterator[ModelWorker]:
    dtype, page_size = request.param
    save_model(tmp_path, config_of("llama"))
    worker = ModelWorker(model_config(tmp_path, dtype, deterministic=True), 0, 1, "")
    worker.load_blocking(page_size)
    host = HostPool(_HOST_PAGES, worker.layout.page_bytes)
    worker.allocate(_DEVICE_PAGES, host)
    worker.host = host
    yield worker
    worker.close()
    host.close()


def _fill(worker: ModelWorker) -> torch.Tensor:
    kv = worker.runner.pool.kv
    kv.copy_(torch.randn(kv.shape, generator=torch.Generator().manual_seed(1)))
    return kv.clone()


def test_roundtrip_keeps_every_bit_and_touches_nothing_else(worker):
    before = _fill(worker)
    pages, hosts = [3, 4, 5, 17, 9, 30], [0, 1, 2, 7, 23, 11]
    worker.copy_out(1, pages, hosts)
    targets = [20, 21, 8, 7, 39, 1]
    worker.copy_in(2, targets, hosts)
    kv = worker.runner.pool.kv
    assert torch.equal(kv[:, :, targets], before[:, :, pages])
    others = [page for page in range(_DEVICE_PAGES) if page not in targets]
    assert torch.equal(kv[:, :, others], before[:, :, others])
    assert worker.finished_copies() == [1, 2]
    assert worker.finished_copies() == []


def test_a_host_page_is_keys_then_values_layer_by_layer(worker):
    """The layout that storage writes and other servers read: [2, layers, page_size, heads, channels]."""
    before = _fill(worker)
    worker.copy_out(1, [6], [5])
    layout = worker.layout
    shape = (2, layout.layers, layout.page_size, layout.kv_heads_local, layout.head_dim)
    view = worker.host.page(5)
    assert len(view) == layout.page_bytes
    page = torch.frombuffer(bytearray(view), dtype=before.dtype).view(shape)
    view.release()
    assert torch.equal(page, before[:, :, 6])


def _logits(worker: ModelWorker, tokens: list[int], prefix: int, pages: list[int]) -> torch.Tensor:
    row = ForwardRow(tokens[prefix:], prefix, pages, RowSampling())
    return worker.runner.forward(ForwardBatch([row]))


def _table(worker: ModelWorker, first: int, tokens: int) -> list[int]:
    return list(range(first, first - -tokens // worker.layout.page_size + 1))[: -(-tokens // worker.layout.page_size)]


def test_fm36_a_forward_after_a_copy_in_reads_the_loaded_pages(worker):
    """Load-back and forward in one tick: equal to the cold run, bit by bit."""
    tokens = prompts([17])[0]
    home, other = _table(worker, 1, 17), _table(worker, 21, 17)
    cold = _logits(worker, tokens, 0, home)
    prefix = 16
    held = prefix // worker.layout.page_size
    hosts = list(range(held))
    worker.copy_out(1, home[:held], hosts)
    worker.runner.pool.kv.fill_(7.0)
    worker.copy_in(2, other[:held], hosts)
    assert torch.equal(_logits(worker, tokens, prefix, other), cold)


def test_fm37_a_page_is_refilled_behind_the_copy_that_saves_it(worker):
    """A victim's page is freed, loaded with another's and computed on within one tick; the victim's copy is whole."""
    before = _fill(worker)
    worker.copy_out(1, [10], [3])
    worker.copy_out(2, [11], [2])
    worker.copy_in(3, [11], [3])
    worker.forward_blocking(ForwardBatch([ForwardRow([4, 5], 0, [10, 12], RowSampling())]))
    worker.copy_in(4, [30, 31], [3, 2])
    kv = worker.runner.pool.kv
    assert torch.equal(kv[:, :, 30], before[:, :, 10]) and torch.equal(kv[:, :, 31], before[:, :, 11])
    assert torch.equal(kv[:, :, 11], before[:, :, 10])
    assert not torch.equal(kv[:, :, 10], before[:, :, 10])


def test_page_runs_join_what_ascends_on_both_sides():
    assert list(page_runs([5, 6, 7, 9, 10, 2], [0, 1, 2, 3, 4, 5])) == [(5, 0, 3), (9, 3, 2), (2, 5, 1)]
    assert list(page_runs([1, 2], [4, 3])) == [(1, 4, 1), (2, 3, 1)]
    assert list(page_runs([], [])) == []
    with pytest.raises(IntegrityError, match="2 device pages against 1 host pages"):
        list(page_runs([1, 2], [1]))


def test_a_host_pool_of_another_shape_is_a_defect(worker):
    host = HostPool(2, worker.layout.page_bytes * 2)
    with pytest.raises(IntegrityError, match=f"host pages have {host.page_bytes} bytes"):
        worker.allocate(_DEVICE_PAGES, host)
    host.close()
