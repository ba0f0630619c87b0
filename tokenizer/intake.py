"""From what a client asked to what the leader gets: token ids that fit the model, sampling parameters in their ranges.

Shared by the native and the OpenAI routes; called on the event loop.  Refuses with a `UserError` that names the
value and the bound.  It never cuts a prompt short and never corrects a parameter: a silent correction is a
wrong answer.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

from sglang_hicache.config import ServerConfig
from sglang_hicache.errors import UserError
from sglang_hicache.tokenizer.text import TextCodec
from sglang_hicache.wire import SamplingParams

#: SGLang's way to say "no limit"; any vocabulary is smaller.
TOP_K_UNLIMITED = 1 << 30

#: The random number generator of the sampler takes 64 bits.
SEED_LIMIT = 1 << 63

#: Stop strings per request, and characters of all of them.  Each is searched for in every token's text, on every rank,
#: and so is each of its beginnings.
MOST_STOPS = 64
MOST_STOP_CHARACTERS = 4096

#: Prompts of one request: as many as may wait by default.
MOST_PROMPTS = 4096

#: Characters of a request id, an extra key or a cache salt: every rank keeps them, and the log repeats the first.
LONGEST_NAME = 1024

#: What the msgpack of the wire, and any order of priorities, can hold.
PRIORITY_LIMIT = 1 << 63


class SamplingFields(Protocol):
    """The sampling fields that the bodies of all generating routes have in common."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    stop: str | list[str] | None
    stop_token_ids: list[int] | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None


class Intake:
    """The limits of this server, applied to requests."""

    def __init__(self, config: ServerConfig, codec: TextCodec) -> None:
        self._codec = codec
        self._context_length = config.model.context_length
        #: A sequence needs all of its pages on the device at once.
        self._longest = min(self._context_length, config.pool.device_tokens)

    @property
    def max_request_tokens(self) -> int:
        """Longest prompt plus output, in tokens, that one request may have."""
        return self._longest

    def check_prompt(self, token_ids: list[int]) -> list[int]:
        """The ids themselves, if a forward can run over them."""
        if not token_ids:
            raise UserError("the prompt is empty: it has no tokens; send at least one")
        if len(token_ids) >= self._longest:
            raise UserError(
                f"the prompt has {len(token_ids)} tokens and leaves no room for output; {self._bound()}; "
                f"send at most {self._longest - 1} tokens"
            )
        lowest, highest = min(token_ids), max(token_ids)
        if lowest < 0 or highest >= self._codec.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise UserError(
                f"token id {wrong} is outside the vocabulary: ids go from 0 to {self._codec.vocab_size - 1}"
            )
        return token_ids

    def output_budget(self, prompt_tokens: int, asked: int | None, default: int | None) -> int:
        """Tokens that may be generated: what was asked, else the default as far as it fits (None: all that fits)."""
        room = self._longest - prompt_tokens
        if asked is None:
            return room if default is None else min(room, default)
        if asked < 1:
            raise UserError(f"max_new_tokens (max_tokens) is {asked}; it must be at least 1")
        if asked > room:
            raise UserError(
                f"{prompt_tokens} prompt tokens and {asked} output tokens are {prompt_tokens + asked} together; "
                f"{self._bound()}; ask for at most {room} output tokens"
            )
        return asked

    def sampling(self, fields: SamplingFields, *, seed: int | None, max_new_tokens: int) -> SamplingParams:
        """Wire form of the sampling fields of any body."""
        temperature = _ranged("temperature", fields.temperature, 1.0, 0.0, math.inf)
        top_p = _ranged("top_p", fields.top_p, 1.0, 0.0, 1.0)
        if top_p == 0.0:
            raise UserError("top_p is 0, which allows no token at all; it must be above 0 and at most 1")
        stops = _stops(fields.stop)
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=_top_k(fields.top_k),
            min_p=_ranged("min_p", fields.min_p, 0.0, 0.0, 1.0),
            seed=_seed(seed),
            stop=stops,
            stop_token_ids=self._stop_token_ids(fields.stop_token_ids),
            ignore_eos=bool(fields.ignore_eos),
            skip_special_tokens=fields.skip_special_tokens is not False,
        )

    def _stop_token_ids(self, token_ids: list[int] | None) -> tuple[int, ...]:
        for token_id in token_ids or ():
            if not 0 <= token_id < self._codec.vocab_size:
                raise UserError(
                    f"stop_token_ids holds {token_id}; ids of this model go from 0 to {self._codec.vocab_size - 1}"
                )
        return tuple(dict.fromkeys(token_ids or ()))

    @staticmethod
    def check_names(rid: str | None, extra_key: str | None, cache_salt: str | None, priority: int | None) -> None:
        """What travels with a request, and stays with its pages, beside the prompt."""
        for name, value in (("rid", rid), ("extra_key", extra_key), ("cache_salt", cache_salt)):
            if value is not None and len(value) > LONGEST_NAME:
                raise UserError(f"{name} has {len(value)} characters; at most {LONGEST_NAME} are allowed")
        if priority is not None and not -PRIORITY_LIMIT <= priority < PRIORITY_LIMIT:
            raise UserError(f"the priority {priority} does not fit 64 bits")

    def _bound(self) -> str:
        if self._longest == self._context_length:
            return f"the context of this model is {self._context_length} tokens"
        return (
            f"the device pool of this server holds {self._longest} tokens "
            f"(less than the model's context of {self._context_length})"
        )


def _ranged(name: str, value: float | None, default: float, lowest: float, highest: float) -> float:
    if value is None:
        return default
    if not (math.isfinite(value) and lowest <= value <= highest):
        bound = f"between {lowest:g} and {highest:g}" if math.isfinite(highest) else f"at least {lowest:g}"
        raise UserError(f"{name} is {value}; it must be {bound}")
    return value


def _top_k(top_k: int | None) -> int:
    if top_k is None or top_k in (-1, 0) or top_k >= TOP_K_UNLIMITED:
        return -1
    if top_k < -1:
        raise UserError(f"top_k is {top_k}; it must be at least 1, or -1 for no limit")
    return top_k


def _seed(seed: int | None) -> int | None:
    if seed is not None and not -SEED_LIMIT <= seed < SEED_LIMIT:
        raise UserError(f"the seed {seed} does not fit 64 bits")
    return seed


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MOST_STOPS:
        raise UserError(f"stop holds {len(stops)} strings; at most {MOST_STOPS} are allowed")
    if (characters := sum(map(len, stops))) > MOST_STOP_CHARACTERS:
        raise UserError(
            f"the stop strings have {characters} characters together; at most {MOST_STOP_CHARACTERS} are allowed"
        )
    return tuple(text for text in stops if text)


def prompts_of(value: str | list[Any]) -> tuple[list[str | list[int]], bool]:
    """One prompt or several (a text, texts, ids, lists of ids) as a list, and whether it was several."""
    if isinstance(value, str):
        return [value], False
    if not value:
        raise UserError("the prompt is empty: an empty list holds no prompt")
    kinds = {type(item) for item in value}
    if kinds == {int}:
        return [value], False
    if len(value) > MOST_PROMPTS:
        raise UserError(f"the request holds {len(value)} prompts; at most {MOST_PROMPTS} are allowed")
    if kinds in ({str}, {list}):
        return value, True
    raise UserError("a list of prompts must hold only texts, or only token ids, or only lists of token ids")
