"""Small random models on disk, and a driver that feeds a worker the way a scheduler would."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from sglang_hicache.config import ModelConfig
from sglang_hicache.workers.batch import ForwardBatch, ForwardRow, RowSampling
from sglang_hicache.workers.model_worker import ModelWorker

VOCAB_SIZE = 256
_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def config_of(name: str) -> PretrainedConfig:
    """A small configuration of each supported architecture, each with what sets it apart."""
    if name == "llama":
        return LlamaConfig(**_SHAPE, tie_word_embeddings=True)
    if name == "llama3":
        return LlamaConfig(**_SHAPE, rope_parameters=_ROPE, attention_bias=True)
    if name == "qwen2":
        return Qwen2Config(**_SHAPE, tie_word_embeddings=True)
    if name == "qwen3":
        return Qwen3Config(**_SHAPE, head_dim=32)
    if name == "mistral":
        return MistralConfig(**_SHAPE, sliding_window=24)
    raise KeyError(name)


def save_model(folder: Path, config: PretrainedConfig) -> PreTrainedModel:
    """Write a random model in fp32 and return it, for transformers to run by itself."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The usual initialisation is so flat that greedy choices hang on rounding.
            if parameter.ndim > 1:
                parameter.mul_(6.0)
            else:
                parameter.normal_(0.0 if "bias" in name else 1.0, 0.2)
    model.save_pretrained(folder)
    return model


def generate(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """transformers' own greedy continuation."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


def model_config(folder: Path, dtype: str = "float32", *, deterministic: bool = False, **fields: Any) -> ModelConfig:
    return ModelConfig(
        path=str(folder),
        tokenizer_path=str(folder),
        served_name="random",
        dtype=dtype,
        context_length=2048,
        deterministic=deterministic,
        **fields,
    )


def open_worker(
    config: ModelConfig, page_size: int, *, device_tokens: int = 4096, rank: int = 0, tp_size: int = 1, meet: str = ""
) -> ModelWorker:
    """A worker that is ready for forwards."""
    worker = ModelWorker(config, rank, tp_size, meet)
    worker.load_blocking(page_size)
    worker.allocate(device_tokens // page_size + 1, None)
    return worker


def prompts(lengths: Iterable[int], seed: int = 0) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(2, VOCAB_SIZE) for _ in range(length)] for length in lengths]


class ShuffledPages:
    """Hands out page numbers in no order, never the dummy page."""

    def __init__(self, worker: ModelWorker, seed: int = 0) -> None:
        self._free = list(range(1, worker.runner.pool.pages))
        random.Random(seed).shuffle(self._free)
        self._page_size = worker.layout.page_size

    def for_tokens(self, count: int) -> list[int]:
        needed = -(-count // self._page_size)
        taken, self._free = self._free[:needed], self._free[needed:]
        assert len(taken) == needed
        return taken


def greedy_batch(worker: ModelWorker, wanted: list[list[int]], count: int, chunk: int = 40) -> list[list[int]]:
    """Continue all prompts together: staggered arrival, chunked prompts, mixed with those that decode already."""
    pages = ShuffledPages(worker)
    tables = [pages.for_tokens(len(prompt) + count) for prompt in wanted]
    sequences = [list(prompt) for prompt in wanted]
    done = [0] * len(wanted)
    step = 0
    while any(len(sequence) < len(prompt) + count for sequence, prompt in zip(sequences, wanted)):
        rows, members = [], []
        for index, sequence in enumerate(sequences):
            if step < 2 * index or len(sequence) == len(wanted[index]) + count:
                continue
            end = min(done[index] + chunk, len(sequence))
            # A sampling position of its own, so that a worker that mixed rows up would be found.
            sampling = RowSampling(position=end) if end == len(sequence) else None
            rows.append(ForwardRow(sequence[done[index] : end], done[index], tables[index], sampling))
            members.append(index)
            done[index] = end
        step += 1
        ids = iter(worker.forward_blocking(ForwardBatch(rows)) if rows else [])
        for row, index in zip(rows, members):
            if row.sampling is not None:
                sequences[index].append(next(ids))
    return [sequence[len(prompt) :] for sequence, prompt in zip(sequences, wanted)]


def page_contents(worker: ModelWorker, pages: list[int], tokens: int) -> Tensor:
    """Keys and values of the first `tokens` tokens of these pages."""
    return worker.runner.pool.kv[:, :, pages].flatten(2, 3)[:, :, :tokens].clone()
