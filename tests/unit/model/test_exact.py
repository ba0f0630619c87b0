"""Exact numerics: bit-identical logits and pages however a token came to be computed, and the proof at start."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from sglang_hicache.errors import UserError
from sglang_hicache.workers.invariant import InvariantSiLU
from sglang_hicache.workers.selfcheck import self_check
from tests.unit.model.scenarios import differences
from tests.unit.model.support import config_of, model_config, open_worker, save_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "page_size"), [("llama", 64), ("qwen3", 16), ("mistral", 1)])
def test_bits_do_not_depend_on_the_way(name, page_size, dtype, tmp_path):
    save_model(tmp_path, config_of(name))
    worker = open_worker(model_config(tmp_path, dtype, deterministic=True), page_size)
    assert differences(worker) == []
    worker.close()


def test_numerics_class_names_what_the_bits_depend_on(tmp_path):
    """Two page sizes share a class (the bits are the same), two dtypes do not, fast is its own."""
    save_model(tmp_path, config_of("llama"))

    def numerics_class(dtype: str, page_size: int, deterministic: bool) -> str:
        worker = open_worker(model_config(tmp_path, dtype, deterministic=deterministic), page_size, device_tokens=64)
        found = worker.layout.numerics_class
        worker.close()
        return found

    exact = numerics_class("float32", 16, True)
    isa = torch.backends.cpu.get_cpu_capability()
    assert exact.startswith(f"exact:1:cpu:{torch.__version__}:{isa}-")
    assert numerics_class("float32", 1, True) == exact
    assert numerics_class("bfloat16", 16, True) != exact
    assert numerics_class("float32", 16, False) == "fast"


class _RowCounting(nn.Module):
    """A layer whose last bit depends on how many rows it is given, like a library that picks kernels by size."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = self.inner(hidden)
        return torch.nextafter(out, out + 1) if hidden.shape[-2] > 100 else out


@pytest.mark.parametrize("place", ["q_proj", "v_proj", "o_proj"])
def test_self_check_refuses_a_machine_that_is_not_invariant(place, tmp_path, monkeypatch):
    """Were it to pass, pages written by a prefill would be mixed with pages written by decode, one bit apart."""
    save_model(tmp_path, config_of("llama"))
    worker = open_worker(model_config(tmp_path, deterministic=True), 16, device_tokens=64)
    model, layout = worker.runner.model, worker.layout
    self_check(model, layout, torch.device("cpu"))
    attention = model.model.layers[0].self_attn
    attention.register_module(place, _RowCounting(attention.get_submodule(place)))
    with pytest.raises(UserError, match="enable-deterministic-inference cannot be kept .* after a cached prefix"):
        self_check(model, layout, torch.device("cpu"))
    worker.close()


def test_invariant_silu_is_silu_and_does_not_look_at_its_neighbours():
    values = torch.linspace(-100, 100, 4099)
    torch.testing.assert_close(InvariantSiLU()(values), silu(values), rtol=1e-6, atol=1e-30)
    whole = InvariantSiLU()(values)
    for length in (1, 5, 31, 33, 63, 100, 1027):
        assert torch.equal(InvariantSiLU()(values[:length].clone()), whole[:length])


def test_an_activation_without_exact_form_is_refused(tmp_path):
    config = config_of("llama")
    config.hidden_act = "gelu"
    save_model(tmp_path, config)
    with pytest.raises(UserError, match="activation gelu has no exact form; supported are silu"):
        open_worker(model_config(tmp_path, deterministic=True), 16)
