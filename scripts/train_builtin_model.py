"""Trains the small model that ships with the server, from text that every Python installation carries.

The text is Python's own help topics, the docstrings of its standard library and its licence.  The model is
a Llama of 0.8 million parameters with a byte-level BPE of 1,024 tokens: large enough to answer in recognisable
English, small enough to load in a moment and to be compared bit by bit in tests.  One seed and a fixed number
of steps make a run repeatable on one machine with one Python; the files in the repository are one such run.

    python scripts/train_builtin_model.py [--output FOLDER] [--scale 0.1]
"""

from __future__ import annotations

import argparse
import ast
import math
import os
import platform
import re
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 0
VOCABULARY = 1024
#: Token 0 ends a text.  The other two are for chat templates that mark turns; ours does not (see CHAT_TEMPLATE).
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MAX_POSITIONS = 32768
#: Far above the longest training sequence, so that the slow rotary components stay in the range they were trained in.
ROPE_THETA = 500_000.0
LEARNING_RATE = 3e-3
#: The model has never seen a conversation: marked turns would only push it off the text it knows.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
PROMPTS = ("The module provides", "Return a list of", "If the file is", "This function raises an error when")
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "turtledemo", "ensurepip", "__pycache__"}

DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "sglang_hicache" / "builtin_model"

NOTICE = """\
The weights and the vocabulary in this folder were made by scripts/train_builtin_model.py from the help topics,
the standard library docstrings and the licence text of Python {version}, which are
Copyright (c) 2001 Python Software Foundation; All Rights Reserved,
and are used under the PSF License Agreement (https://docs.python.org/3/license.html).
No other text went into them.
"""


class Phase(NamedTuple):
    """Some training steps on batches of one shape."""

    steps: int
    rows: int
    tokens: int


#: Short sequences teach the language cheaply; the long ones at the end teach it to stay calm at large distances.
PHASES = (Phase(950, 16, 256), Phase(200, 4, 1024), Phase(100, 1, 4096))


def stdlib_docstrings() -> Iterator[str]:
    """Docstrings of every module of the standard library, its tests left out."""
    library = Path(os.__file__).parent
    for path in sorted(library.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a few library files are templates, or deliberately broken
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""


def licence_text() -> str:
    """The PSF licence, where this installation carries it."""
    here = Path(os.__file__).parent
    found = [path for path in (here / "LICENSE.txt", here.parent.parent / "LICENSE.txt") if path.exists()]
    return found[0].read_text(encoding="utf-8") if found else ""


def paragraphs() -> list[str]:
    """Plain English paragraphs, each once, in an order that depends on the text alone."""
    texts = [topics[name] for name in sorted(topics)] + [licence_text()] + list(stdlib_docstrings())
    found: dict[str, None] = {}
    for text in texts:
        for raw in re.split(r"\n\s*\n", textwrap.dedent(text)):
            paragraph = " ".join(raw.split())
            plain = sum(char.isalpha() or char.isspace() for char in paragraph)
            if len(paragraph) >= 80 and ">>>" not in raw and paragraph.isascii() and plain >= 0.8 * len(paragraph):
                found[paragraph] = None
    return list(found)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE: every byte is a token of its own, so no input is ever unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str], generator: torch.Generator) -> torch.Tensor:
    """All paragraphs in shuffled order as one stream, an end token behind each."""
    order = torch.randperm(len(texts), generator=generator).tolist()
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([texts[index] for index in order]):
        ids += [*encoding.ids, 0]
    return torch.tensor(ids)


def model_config() -> LlamaConfig:
    """Two KV heads: two ranks split them, four ranks replicate them, and both paths are worth testing."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        attn_implementation="sdpa",
    )


def optimizer_of(model: LlamaForCausalLM) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of every next token in rows [n, tokens + 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def train(model: LlamaForCausalLM, stream: torch.Tensor, phases: list[Phase], generator: torch.Generator) -> None:
    """Runs the phases under one cosine schedule of the learning rate."""
    optimizer = optimizer_of(model)
    total, step, average, started = sum(phase.steps for phase in phases), 0, None, time.monotonic()
    for phase in phases:
        for _ in range(phase.steps):
            warm_up = min(1.0, (step + 1) / 50)
            rate = LEARNING_RATE * warm_up * (0.05 + 0.475 * (1 + math.cos(math.pi * step / total)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            starts = torch.randint(len(stream) - phase.tokens - 1, (phase.rows,), generator=generator).tolist()
            loss = loss_of(model, torch.stack([stream[start : start + phase.tokens + 1] for start in starts]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            if step % 50 == 0:
                print(f"{time.monotonic() - started:5.0f} s  step {step}/{total}  loss {average:.3f}", flush=True)


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, stream: torch.Tensor, tokens: int) -> float:
    """Loss on held-back text in rows of `tokens`."""
    count = min(len(stream) // (tokens + 1), 20)
    rows = stream[: count * (tokens + 1)].view(count, tokens + 1)
    return sum(loss_of(model, row[None]).item() for row in rows) / count


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, output: Path) -> None:
    """Writes a folder that transformers, and this server, load like any other model."""
    output.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)  # written as 0600, which a system-wide install could not read
    GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0, do_sample=False).save_pretrained(output)
    end, *others = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        bos_token=end,
        pad_token=end,
        additional_special_tokens=others,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        # In tokenizer_config.json, where readers that do not use transformers look for it.
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(output, save_jinja_files=False)
    (output / "NOTICE").write_text(NOTICE.format(version=platform.python_version()), encoding="utf-8")


@torch.no_grad()
def print_samples(output: Path) -> None:
    """Reads the files back as a user would, and shows what they say."""
    model = LlamaForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output)
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        for sampled in (False, True):
            options = {"do_sample": True, "temperature": 0.7, "top_k": 40} if sampled else {"do_sample": False}
            ids = model.generate(**inputs, max_new_tokens=60, **options)[0]
            print("sampled" if sampled else "greedy ", repr(tokenizer.decode(ids, skip_special_tokens=True)))


def main() -> None:
    """Builds the text, the tokenizer and the model, and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the training steps, for a trial run")
    arguments = parser.parse_args()

    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    texts = paragraphs()
    tokenizer = train_tokenizer(texts)
    stream = token_stream(tokenizer, texts, generator)
    held_back, stream = stream[: len(stream) // 25], stream[len(stream) // 25 :]
    model = LlamaForCausalLM(model_config())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(texts)} paragraphs, {len(stream)} tokens, {parameters / 1e6:.2f} M parameters", flush=True)

    phases = [phase._replace(steps=max(1, round(phase.steps * arguments.scale))) for phase in PHASES]
    train(model, stream, phases, generator)
    model.eval()
    print(f"held-back loss {validation_loss(model, held_back, 256):.3f} at 256 tokens,", end=" ")
    print(f"{validation_loss(model, held_back, 4096):.3f} at 4096")
    save(model, tokenizer, arguments.output)
    print_samples(arguments.output)


if __name__ == "__main__":
    main()
