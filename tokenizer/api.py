"""Bodies of the native and admin routes, as msgspec structs: they decode the requests, and `/openapi.json` shows them.

Pure declarations and the few rules that hold for any body.  Unknown top-level keys are ignored, as existing
clients expect; unknown sampling parameters are refused, because ignoring one silently changes the text.  A
field of a feature that does not exist yet is declared all the same: it is accepted with the value that means
"not used" and refused otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from sglang_hicache.errors import UserError

Body = TypeVar("Body", bound="RequestBody")


class MalformedBody(UserError):
    """The body is not JSON, or a field has the wrong type.  Each family of routes has its own form for this error."""


class RequestBody(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all bodies: keys that it does not declare are ignored."""


class SamplingBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`sampling_params` of /generate.  null means the default."""

    #: Absent: 128, or what the context leaves; null: all that the context leaves.
    max_new_tokens: int | None | msgspec.UnsetType = msgspec.UNSET
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    sampling_seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    # Not supported yet: see UNSUPPORTED_SAMPLING.
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    min_new_tokens: int | None = None
    n: int | None = None
    no_stop_trim: bool | None = None
    spaces_between_special_tokens: bool | None = None
    stop_regex: Any = None
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    structural_tag: Any = None
    logit_bias: Any = None
    custom_params: Any = None


#: Sampling parameters without an implementation, and the values that ask for nothing.
UNSUPPORTED_SAMPLING: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_new_tokens": (None, 0),
    "n": (None, 1),
    "no_stop_trim": (None, False),
    "spaces_between_special_tokens": (None, True),
    "stop_regex": (None, "", []),
    "json_schema": (None,),
    "regex": (None,),
    "ebnf": (None,),
    "structural_tag": (None,),
    "logit_bias": (None, {}),
    "custom_params": (None, {}),
}


class GenerateBody(RequestBody, frozen=True, kw_only=True):
    """POST /generate.  Exactly one of text and input_ids; a list of prompts gives a list of answers."""

    rid: str | list[str] | None = None
    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    stream: bool = False
    sampling_params: SamplingBody | list[SamplingBody] | None = None
    #: Namespace of the cached pages: requests with different keys share nothing.
    extra_key: str | None = None
    #: Another one, chosen per tenant.
    cache_salt: str | None = None
    priority: int | None = None
    #: Adds what was decided about storage, and why, to `cached_tokens_details`.
    return_cached_tokens_details: bool | None = None

    # Hints that change no answer: accepted and not used.
    session_id: str | None = None
    routing_key: str | None = None
    kv_hints: Any = None
    custom_labels: Any = None
    logprob_start_len: Any = None
    top_logprobs_num: Any = None

    # Not supported yet: see UNSUPPORTED_GENERATE.
    input_embeds: Any = None
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None
    return_logprob: Any = None
    token_ids_logprob: Any = None
    return_hidden_states: Any = None
    return_prompt_token_ids: Any = None
    session_params: Any = None
    lora_path: Any = None
    custom_logit_processor: Any = None
    routed_dp_rank: int | None = None


#: Fields of /generate without an implementation, and the values that ask for nothing.
UNSUPPORTED_GENERATE: dict[str, tuple[Any, ...]] = {
    "input_embeds": (None,),
    "image_data": (None, []),
    "video_data": (None, []),
    "audio_data": (None, []),
    "return_logprob": (None, False),
    "token_ids_logprob": (None, []),
    "return_hidden_states": (None, False),
    "return_prompt_token_ids": (None, False),
    "session_params": (None, {}),
    "lora_path": (None,),
    "custom_logit_processor": (None,),
    "routed_dp_rank": (None, 0),
}


class AbortBody(RequestBody, frozen=True, kw_only=True):
    """POST /abort_request: one request, or all of them."""

    rid: str = ""
    abort_all: bool = False


class AttachBody(RequestBody, frozen=True, kw_only=True):
    """PUT /hicache/storage-backend."""

    #: Name of a registered backend.
    hicache_storage_backend: str
    #: A JSON object as text, or "@path" of a file below --hicache-config-dir.
    hicache_storage_backend_extra_config_json: str | None = None
    #: Another name of it, which also takes the object itself.
    hicache_storage_backend_extra_config: str | dict[str, Any] | None = None
    hicache_storage_prefetch_policy: str | None = None
    hicache_write_policy: str | None = None
    #: idle (default): refused unless nothing is under way; drain, force: what is under way goes on without storage.
    mode: str | None = None
    #: "mode": "force".
    force: bool = False
    #: With drain and force: seconds that the store which is replaced may take to end; of a dry run: its deadline.
    timeout_s: float | None = None
    #: Replace what is attached, be it the same backend, without a moment without storage.
    switch: bool = False
    #: Try the backend out on every rank, and attach nothing.
    dry_run: bool = False
    #: Answer 202 at once, with the id of the operation.
    is_async: bool = msgspec.field(name="async", default=False)


class DetachBody(RequestBody, frozen=True, kw_only=True):
    """DELETE /hicache/storage-backend; its query takes the same."""

    #: idle (default): refused unless nothing is under way; drain, force: what is under way goes on without storage.
    mode: str | None = None
    #: "mode": "force".
    force: bool = False
    #: With drain and force: seconds until what is under way is cut off.
    timeout_s: float | None = None
    #: Answer 202 at once, with the id of the operation.
    is_async: bool = msgspec.field(name="async", default=False)


class UpdateWeightsBody(RequestBody, frozen=True, kw_only=True):
    """POST /update_weights_from_disk."""

    #: A directory that all ranks see, or a hub id.
    model_path: str
    #: End all requests once the new weights have been read; else those that run finish first.
    abort_all_requests: bool = False
    #: What answers call the new weights from then on (`meta_info.weight_version`).
    weight_version: str | None = None
    #: false is refused: pages of the old weights would be served as if the new ones had computed them.
    flush_cache: bool = True

    # Hints that change no answer: accepted and not used.
    torch_empty_cache: bool = False
    token_step: int = 0

    # Not supported: see UNSUPPORTED_UPDATE.
    load_format: str | None = None
    is_async: bool = False
    keep_pause: bool = False
    recapture_cuda_graph: bool = False
    manifest: Any = None


#: Fields of /update_weights_from_disk without an implementation, and the values that ask for nothing.
UNSUPPORTED_UPDATE: dict[str, tuple[Any, ...]] = {
    "load_format": (None, "safetensors", "auto"),
    "is_async": (False,),
    "keep_pause": (False,),
    "recapture_cuda_graph": (False,),
    "manifest": (None,),
}


def decode_body(data: bytes, kind: type[Body]) -> Body:
    """The body as `kind`; `MalformedBody` says which field is wrong, and for sampling parameters what is allowed."""
    try:
        return msgspec.json.decode(data or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message = f"malformed request body: {error}"
        if "unknown field" in message:
            allowed = [name for name in SamplingBody.__struct_fields__ if name not in UNSUPPORTED_SAMPLING]
            message += f"; allowed sampling parameters: {', '.join(allowed)}"
        raise MalformedBody(message) from None


def refuse_unsupported(body: msgspec.Struct, table: Mapping[str, tuple[Any, ...]], where: str = "") -> None:
    """Refuse the first field that asks for a feature without an implementation: never half an answer, silently."""
    for name, unused in table.items():
        value = getattr(body, name)
        if value not in unused:
            raise UserError(
                f"{where}{name} is not supported by this server (got {_short(value)}); "
                f"leave it out or send {msgspec.json.encode(unused[-1]).decode()}"
            )


def _short(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else text[:77] + "..."
