"""What a rank will not run is refused at start, by name, with what it would run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, PretrainedConfig

from sglang_hicache.errors import UserError
from sglang_hicache.workers import models
from sglang_hicache.workers.batch import DTYPE_SIZES_BYTES, KVLayout, Worker
from sglang_hicache.workers.model_worker import ModelWorker
from tests.unit.model.support import config_of, model_config, open_worker, save_model


def _named(config: PretrainedConfig, name: str) -> PretrainedConfig:
    config.architectures = [name]
    return config


def test_an_unsupported_model_is_refused_by_name(tmp_path):
    _named(Gemma2Config(), "Gemma2ForCausalLM").save_pretrained(tmp_path)
    with pytest.raises(UserError) as refusal:
        open_worker(model_config(tmp_path), 16)
    assert "Gemma2ForCausalLM" in str(refusal.value)
    assert all(name in str(refusal.value) for name in models.SUPPORTED_ARCHITECTURES)


def test_a_model_that_transformers_does_not_know_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(UserError, match="LlamaForCausalLM"):
        open_worker(model_config(tmp_path), 16)


def test_a_directory_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: its config.json cannot be read"):
        open_worker(model_config(tmp_path), 16)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_batch_is_refused(rope_type):
    config = _named(config_of("llama"), "LlamaForCausalLM")
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UserError, match=f"rope type {rope_type} is not supported; supported are default"):
        models.check_supported(config)


def test_quantized_weights_are_refused():
    config = _named(config_of("llama"), "LlamaForCausalLM")
    config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(UserError, match="quantized weights are not supported"):
        models.check_supported(config)


def test_uneven_division_is_refused():
    config = config_of("llama")
    for tp_size in (1, 2, 4):
        models.check_tensor_parallel(config, tp_size)
    with pytest.raises(UserError, match="4 attention heads cannot be divided by 3 ranks"):
        models.check_tensor_parallel(config, 3)
    config.num_attention_heads, config.num_key_value_heads = 12, 3
    with pytest.raises(UserError, match="3 KV heads can neither be divided by 2 ranks nor repeated"):
        models.check_tensor_parallel(config, 2)
    config.num_key_value_heads, config.intermediate_size = 4, 98
    with pytest.raises(UserError, match="98 intermediate channels cannot be divided by 4 ranks"):
        models.check_tensor_parallel(config, 4)


def test_device_and_dtype_are_refused_with_what_is_allowed(tmp_path):
    with pytest.raises(UserError, match="dtype float16 is not supported on cpu; supported are float32, bfloat16"):
        ModelWorker(model_config(tmp_path, "float16"), 0, 1, "")
    with pytest.raises(UserError, match="device tpu is not supported; supported are cpu, cuda"):
        ModelWorker(model_config(tmp_path, device="tpu"), 0, 1, "")


def test_a_checkpoint_that_does_not_fit_its_configuration_is_refused(tmp_path):
    save_model(tmp_path, config_of("llama"))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: torch.zeros(8, 8)}, file)
    with pytest.raises(UserError, match=rf"tensor {name} of shape \[8, 8\] does not fit"):
        open_worker(model_config(tmp_path), 16)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"has no tensor {name}"):
        open_worker(model_config(tmp_path), 16)


def test_architecture_names_what_shapes_keys_and_values():
    """Equal for equal meaning; every change that moves a key or value shows; training leftovers do not."""
    base = models.canonical_architecture(config_of("llama"))
    leftover = config_of("llama")
    leftover.initializer_range, leftover.use_cache, leftover.eos_token_id = 0.5, False, 9
    assert models.canonical_architecture(leftover) == base
    for field, value in (
        ("rms_norm_eps", 1e-3),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        ("num_key_value_heads", 1),
        ("hidden_act", "gelu"),
    ):
        other = config_of("llama")
        setattr(other, field, value)
        assert models.canonical_architecture(other) != base, field
    windowed = config_of("mistral")
    windowed.sliding_window = 7
    assert models.canonical_architecture(windowed) != models.canonical_architecture(config_of("mistral"))


def test_layout_of_one_rank(tmp_path):
    save_model(tmp_path, config_of("qwen3"))
    worker: Worker = open_worker(model_config(tmp_path, "bfloat16"), 64)
    layout = worker.layout
    assert layout == KVLayout(2, 64, 2, 32, "bfloat16", 0, 2, 2, True, layout.architecture, "fast")
    assert layout.page_bytes == 2 * 2 * 64 * 2 * 32 * 2
    assert worker.runner.pool.kv[:, :, 0].numel() * DTYPE_SIZES_BYTES["bfloat16"] == layout.page_bytes
    worker.close()


def test_one_tensor_file_or_several_make_the_same_model(tmp_path):
    """A sharded checkpoint: the index says which file holds which tensor, and other files there are not weights."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    model = save_model(whole, config_of("qwen2"))
    model.save_pretrained(parts, max_shard_size="100KB")
    assert len(list(parts.glob("*.safetensors"))) > 1
    (parts / "consolidated.safetensors").write_bytes(b"not weights")
    loaded = [open_worker(model_config(Path(folder)), 16) for folder in (whole, parts)]
    first, second = (worker.runner.model.state_dict() for worker in loaded)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for worker in loaded:
        worker.close()
