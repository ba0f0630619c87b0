"""A model directory that is only facts, and the resolver on a machine of a given size."""

import json

import pytest

from sglang_hicache.pool_sizes import Memory
from sglang_hicache.resolve import Resolution, resolve
from sglang_hicache.server_args import parse

GIB = 1 << 30

#: 2 (key, value) * 4 layers * 2 heads * 32 * 2 bytes
TOKEN_BYTES = 1024


@pytest.fixture
def model_dir(tmp_path):
    folder = tmp_path / "tiny-model"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "max_position_embeddings": 4096, "vocab_size": 512,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_size": 128,
        "eos_token_id": 7,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def resolved(model_dir, tmp_path):
    """`resolved("--flag", ..., memory=...)`: flags to configuration, with 64 GiB of memory unless said."""

    def run(*argv: str, memory: Memory | None = None, environment: dict[str, str] | None = None) -> Resolution:
        args = parse(["--model-path", str(model_dir), *argv])
        return resolve(
            args,
            run_dir=str(tmp_path),
            weights_digest=lambda directory: "d" * 64,
            memory=memory or Memory(64 * GIB, "the machine's available memory"),
            environment=environment or {},
        )

    return run
