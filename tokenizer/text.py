"""Text to token ids, for the prompts of all routes.

One `TextCodec` per tokenizer process, made before the server listens and read-only afterwards.  Called on the
event loop; a long prompt is encoded on a helper thread, because a millisecond per thousand tokens would stall
every stream of the server. Ids to text is the detokenizer's.  Imports `tokenizers` and jinja2, never
transformers.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from sglang_hicache.config import ModelConfig
from sglang_hicache.errors import UserError
from sglang_hicache.text import shared_tokenizer
from sglang_hicache.tokenizer.chat_template import load_chat_template

#: Prompts longer than this many characters (about 5 ms of encoding) leave the event loop.
LONG_PROMPT_CHARACTERS = 20_000

#: By how much the normalizer of a tokenizer may shorten a text, generously.
NORMALIZER_MARGIN = 4

#: A text of this length (a second of encoding) is encoded anyway, so that the answer can say how many tokens it has.
SHORT_ENOUGH_CHARACTERS = 1_000_000


class TextCodec:
    """Tokenizer, chat template and vocabulary size of the served model."""

    def __init__(self, model: ModelConfig) -> None:
        self.tokenizer_path = model.tokenizer_path
        self._tokenizer = shared_tokenizer(model.tokenizer_path)
        self._template = load_chat_template(model.tokenizer_path)
        #: config.json of the model, for the info routes.
        self.model_config: dict[str, Any] = _model_config(model.path)
        #: Ids at or above this have no embedding row: a forward over them would read outside the table.
        self.vocab_size: int = self.model_config.get("vocab_size") or self._tokenizer.get_vocab_size()

        longest_token = max(map(len, self._tokenizer.get_vocab()), default=1)
        #: A longer text cannot be few enough tokens.
        fitting = model.context_length * longest_token * NORMALIZER_MARGIN
        self._most_characters = max(fitting, SHORT_ENOUGH_CHARACTERS)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a prompt, with the tokenizer's own frame (begin-of-text …) unless told otherwise."""
        if len(text) > self._most_characters:
            # Finding out how many tokens it has would take minutes of a core.
            raise UserError(
                f"the prompt has {len(text)} characters; at most {self._most_characters} can fit the model's context"
            )
        if len(text) > LONG_PROMPT_CHARACTERS:
            return await asyncio.to_thread(self._encode_blocking, text, add_special_tokens)
        return self._encode_blocking(text, add_special_tokens)

    async def encode_chat(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> list[int]:
        """Ids of a conversation.  The template prints the frame tokens itself, so none are added."""
        if self._template is None:
            raise UserError(
                "the model has no chat template (neither chat_template.jinja nor an entry in tokenizer_config.json); "
                "use /v1/completions or /generate"
            )
        return await self.encode(self._template.render(messages, variables), add_special_tokens=False)

    def _encode_blocking(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def _model_config(path: str) -> dict[str, Any]:
    file = Path(path) / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the model's {file}: {error}") from error
