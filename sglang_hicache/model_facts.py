"""What the launcher must know of a model, read from its config.json without torch or transformers.

Used once, at start, to size the pools and to settle dtype and context length.  Whether the model can be run is decided
by the ranks, which know the supported architectures; this file only says what the directory claims.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sglang_hicache.connectors.manifest import MANIFEST_NAME
from sglang_hicache.errors import UserError

#: More than a config.json has.
LARGEST_JSON_BYTES = 4 << 20

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The shape of a model, as far as pools and defaults depend on it."""

    dtype: str
    positions: int
    layers: int
    kv_heads: int
    head_dim: int
    weights_bytes: int
    vocab_size: int
    #: Tokens that end a text; a model without any stops at the length limit only.
    eos_token_ids: tuple[int, ...]

    def token_bytes(self, dtype: str, tp_size: int) -> int:
        """Keys and values of one token on one rank; a rank holds at least one head."""
        heads = max(1, -(-self.kv_heads // tp_size))
        return 2 * self.layers * heads * self.head_dim * DTYPE_BYTES[dtype]


def model_directory(path_or_id: str, flag: str) -> str:
    """The directory itself, or the snapshot of a hub id (fetched if need be)."""
    if Path(path_or_id).is_dir():
        directory = str(Path(path_or_id).resolve())
        if Path(directory, MANIFEST_NAME).is_file():
            url = f"file://{quote(directory, errors='surrogateescape')}"
            raise UserError(f"{flag} {path_or_id!r} holds a model as save_model stores it; its URL is {url}")
        return directory
    if "://" in path_or_id:
        raise UserError(f"{flag} takes no URL, only a directory or a hub id; --model-path of a server takes one")
    if path_or_id.count("/") != 1 or path_or_id.startswith((".", "/", "~")):
        raise UserError(f"{flag} {path_or_id!r} is neither a directory nor a hub id like 'owner/name'")
    from huggingface_hub import snapshot_download  # lazy door: a local model needs no hub client
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(path_or_id, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{flag} {path_or_id!r} is no directory here, and the hub did not give it: {error}; "
            "give a local directory if the hub cannot be reached"
        ) from error


def read_model_facts(directory: str, weights_bytes: int = 0) -> ModelFacts:
    """Facts of the model in `directory`; `weights_bytes`: of weights that are somewhere else."""
    path = Path(directory, "config.json")
    config = read_object(path)
    generation_path = Path(directory, "generation_config.json")
    generation = read_object(generation_path) if generation_path.exists() else {}
    weights_bytes = weights_bytes or sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
    if not weights_bytes:
        raise UserError(f"{directory} holds no *.safetensors file; other weight formats are not supported")
    heads = _whole(path, config, "num_attention_heads")
    return ModelFacts(
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        positions=_whole(path, config, "max_position_embeddings"),
        layers=_whole(path, config, "num_hidden_layers"),
        kv_heads=_whole(path, config, "num_key_value_heads", heads),
        head_dim=_whole(path, config, "head_dim", _whole(path, config, "hidden_size") // heads),
        weights_bytes=weights_bytes,
        vocab_size=_whole(path, config, "vocab_size"),
        eos_token_ids=_token_ids(path, generation.get("eos_token_id", config.get("eos_token_id"))),
    )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model.  The folder may be named over HTTP, and may come from anywhere."""
    try:
        value = json.loads(_text_of(path))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; --model-path must be a Hugging Face model directory") from error
    except RecursionError:
        raise UserError(f"cannot read {path}: it is nested too deep") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; --model-path must be a Hugging Face model directory")
    return value


def _text_of(path: Path) -> str:
    """The text of a plain file of bounded size: a pipe would hold the caller, and a device fill the memory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with open(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST_JSON_BYTES:
            raise OSError(f"it is no plain file of at most {LARGEST_JSON_BYTES} bytes")
        return stream.read(LARGEST_JSON_BYTES).decode()


def _token_ids(path: Path, value: Any) -> tuple[int, ...]:
    """`eos_token_id` is a number, a list of numbers, or missing."""
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(token_id, int) for token_id in ids):
        raise UserError(f"{path}: eos_token_id is {str(value):.80}, not a number or a list of numbers")
    return ids


def _whole(path: Path, config: dict[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{path}: {name} is {value!r:.80}, not a whole number above 0; this model is not supported")
    return value
