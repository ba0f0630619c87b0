"""Bodies of the OpenAI routes, as msgspec structs.  Same rules as `api`: unknown keys are ignored, features that do not
exist yet are declared, accepted with the value that means "not used", and refused otherwise.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sglang_hicache.tokenizer.api import RequestBody


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream carries besides text."""

    #: A last chunk with the token counts.
    include_usage: bool = False


class OpenAIBody(RequestBody, frozen=True, kw_only=True):
    """What completions and chat completions have in common."""

    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    user: str | None = None

    # Beyond OpenAI.
    top_k: int | None = None
    min_p: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    rid: str | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    priority: int | None = None
    session_id: str | None = None
    #: Adds `sglext.cached_tokens_details` to the answer, with what was decided about storage, and why.
    return_cached_tokens_details: bool | None = None

    # Not supported yet: see UNSUPPORTED_OPENAI.
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: Any = None
    top_logprobs: int | None = None
    response_format: Any = None
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    lora_path: Any = None
    session_params: Any = None
    no_stop_trim: bool | None = None
    return_hidden_states: bool | None = None


class CompletionBody(OpenAIBody, frozen=True, kw_only=True):
    """POST /v1/completions."""

    #: A text, several texts, one list of ids or several of them.
    prompt: str | list[str | int | list[int]]

    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One turn.  Content is a text or a list of text parts."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatBody(OpenAIBody, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    #: More variables for the model's chat template.
    chat_template_kwargs: dict[str, Any] | None = None

    tools: list[Any] | None = None
    tool_choice: Any = None
    continue_final_message: bool | None = None
    modalities: list[str] | None = None


#: Fields without an implementation, and the values that ask for nothing.
UNSUPPORTED_OPENAI: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_tokens": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "response_format": (None, {"type": "text"}),
    "json_schema": (None,),
    "regex": (None,),
    "ebnf": (None,),
    "lora_path": (None,),
    "session_params": (None, {}),
    "no_stop_trim": (None, False),
    "return_hidden_states": (None, False),
}
UNSUPPORTED_COMPLETION = UNSUPPORTED_OPENAI | {
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    # 0 asks for the log-probability of the chosen token, so unlike in chat it is not "none".
    "logprobs": (None,),
}
UNSUPPORTED_CHAT = UNSUPPORTED_OPENAI | {
    "tools": (None, []),
    "tool_choice": (None, "auto", "none"),
    "continue_final_message": (None, False),
    "modalities": (None, ["text"]),
}
