"""Chat messages to one prompt text, by the model's own Jinja template.

The template language is the one that templates on model hubs are written in: Jinja with `trim_blocks`, loop
controls, `raise_exception`, `strftime_now`, an unescaped `tojson` and the `generation` block.  A template comes
with a model from strangers, so it runs in Jinja's immutable sandbox.  Owned by `TextCodec`; called on the event
loop; keeps no state between calls.  transformers has the same renderer but costs three seconds of start-up, so
it is only the judge in the tests.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from sglang_hicache.errors import UserError

#: Entries of tokenizer_config.json that a template may name.
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant wrote; only training cares, so the body is printed as it is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, and the model has never seen that.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class ChatTemplate:
    """One compiled template and the special tokens that it may print."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template of the model is malformed: {error}") from error
        self._special_tokens = special_tokens

    def render(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """The prompt that asks the assistant to answer.  `variables`: what the request adds, e.g. enable_thinking."""
        names = {"add_generation_prompt": True, "tools": None, "documents": None}
        try:
            return self._template.render(self._special_tokens | names | variables | {"messages": messages})
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            # A template raises whatever its expressions raise when the messages are not the ones it expects.
            raise UserError(f"the chat template refuses these messages: {error}") from error


def load_chat_template(tokenizer_path: str) -> ChatTemplate | None:
    """The template of a model folder: chat_template.jinja, else the entry of tokenizer_config.json, else none."""
    folder = Path(tokenizer_path)
    config = _read_json(folder / "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else _default_template(config.get("chat_template"))
    return ChatTemplate(source, _special_tokens(folder, config)) if source else None


def _default_template(entry: str | list[dict[str, str]] | None) -> str:
    # Several named templates in a list is an older form; "default" is the one for plain chat.
    if isinstance(entry, list):
        return next((item["template"] for item in entry if item.get("name") == "default"), "")
    return entry or ""


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    entries = _read_json(folder / "special_tokens_map.json") | config
    tokens = {}
    for name in SPECIAL_TOKENS:
        entry = entries.get(name)
        if isinstance(entry, dict):
            entry = entry.get("content")
        if entry is not None:
            tokens[name] = entry
    return tokens


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a JSON object, not {type(content).__name__}")
    return content
