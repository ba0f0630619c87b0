"""Which models a rank can run, and what their configuration has to look like.

The definitions are transformers' own, unmodified; this room only says which of them were proved equal to
transformers' `generate` here (tests/unit/model), and refuses every other by name: a model that half works
answers wrong text, which is worse than none.  Called by the model worker while it loads.
"""

from __future__ import annotations

import json

from transformers import AutoConfig, PretrainedConfig

from sglang_hicache.errors import UserError

#: Architectures by the name in config.json: decoders whose attention is full or windowed, with rotary positions.
SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

#: Rotary scalings with fixed frequencies.  `dynamic` and `longrope` pick theirs by the longest sequence of the
#: batch, so a cached key would depend on who else was in the batch when it was computed.
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

#: Activations that can be made exact (`invariant.py`); the supported models use no other.
EXACT_ACTIVATIONS = ("silu",)

#: Every field of the supported configurations that a key or value depends on.  A field missing here would let
#: two different models share pages.
_SHAPING_FIELDS = (
    "architectures",
    "attention_bias",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "use_sliding_window",
    "vocab_size",
)


def read_config(path: str) -> PretrainedConfig:
    """The configuration in a model directory, checked: what comes back can be run."""
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: its config.json cannot be read as a model configuration ({error}); "
            f"supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
        ) from error
    check_supported(config)
    return config


def check_supported(config: PretrainedConfig) -> None:
    """Refuse by name what this server would not compute right."""
    names = config.architectures or ["(none named)"]
    if names[0] not in SUPPORTED_ARCHITECTURES:
        raise UserError(f"architecture {names[0]} is not supported; supported are {', '.join(SUPPORTED_ARCHITECTURES)}")
    fields = config.to_dict()
    if fields.get("quantization_config"):
        raise UserError("quantized weights are not supported; take the float16, bfloat16 or float32 checkpoint")
    rope_type = (fields.get("rope_parameters") or {}).get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise UserError(f"rope type {rope_type} is not supported; supported are {', '.join(SUPPORTED_ROPE_TYPES)}")


def check_exact(config: PretrainedConfig) -> None:
    """Refuse what has no batch-invariant form."""
    if config.hidden_act not in EXACT_ACTIVATIONS:
        raise UserError(
            f"activation {config.hidden_act} has no exact form; supported are {', '.join(EXACT_ACTIVATIONS)}; "
            "serve this model without --enable-deterministic-inference"
        )


def check_tensor_parallel(config: PretrainedConfig, tp_size: int) -> None:
    """Refuse a division that leaves ranks with unequal shares."""
    for name, count in (
        ("attention heads", config.num_attention_heads),
        ("intermediate channels", config.intermediate_size),
    ):
        if count % tp_size:
            raise UserError(
                f"{count} {name} cannot be divided by {tp_size} ranks; choose a --tp-size that divides them"
            )
    heads = config.num_key_value_heads
    if heads % tp_size and tp_size % heads:
        raise UserError(
            f"{heads} KV heads can neither be divided by {tp_size} ranks nor repeated over them evenly; "
            f"choose a --tp-size that divides {heads} or is a multiple of it"
        )


def canonical_architecture(config: PretrainedConfig) -> str:
    """What shapes keys and values, as JSON that is equal whenever it means the same."""
    fields = config.to_dict()
    shaping = {name: fields[name] for name in _SHAPING_FIELDS if name in fields}
    return json.dumps(shaping, sort_keys=True, separators=(",", ":"))
