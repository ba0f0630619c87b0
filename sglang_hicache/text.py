"""Token ids to text, a piece at a time, and the search for stop strings in it.

The scheduler decides with these two classes when a request has produced a stop string, and the detokenizer trims
with the same two what the client sees: one implementation, so the two can never disagree about where a text ends.
Called on whichever thread owns the request; an object belongs to one request.  Imports only `tokenizers`, never
transformers (three seconds of start-up) and never torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from sglang_hicache.errors import UserError

#: What a decoder prints for bytes that are not a character (yet).
REPLACEMENT = "\ufffd"

#: Tokens that an unfinished character can be spread over: UTF-8 needs at most four bytes, a token holds at least one.
#: With more than this pending, the first of them are no character's beginning but rubbish, and are shown as such.
LONGEST_CHARACTER = 4

#: Tokens of context that are enough even when none of them has text; more would make endless special tokens quadratic.
LONGEST_CONTEXT = 64

#: Tokens of the prompt's end that are looked at for one with text: a few special ones may close it.
LONGEST_PROMPT_TAIL = 16


@functools.lru_cache(maxsize=4)
def shared_tokenizer(tokenizer_path: str) -> Tokenizer:
    """The tokenizer of a model folder, read once per process (a vocabulary of 128 k takes half a second to read)."""
    file = Path(tokenizer_path) / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{file} does not exist; --tokenizer-path must name a folder that holds a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # process edge: the tokenizers library raises bare Exception for a malformed file
        raise UserError(f"{file} is not a tokenizer that the tokenizers library can read: {error}") from error
    # A file saved in training often carries these two; prompts must be neither cut nor filled up silently.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class IncrementalDecoder:
    """The text of a growing list of token ids, such that what was given out once never changes.

    Decoding token by token is wrong (a character may span tokens, and some tokenizers join words with spaces), and
    decoding everything each time is quadratic.  So two marks move over the ids:

        ids:   .......... context ......... | ..... pending ..... |
                          ^ _context          ^ _given              end

    New text = decode(context + pending) less decode(context).  While it ends in an unfinished character nothing is
    given out.  The first context is the end of the prompt: without it the decoders of SentencePiece models take the
    first word of an output for the beginning of a text and strip its space.
    """

    def __init__(
        self, tokenizer_path: str, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = shared_tokenizer(tokenizer_path)
        self._skip_special = skip_special_tokens
        self._ids: list[int] = []
        self._context = 0
        self._given = 0
        self._follow(prompt_ids[-LONGEST_PROMPT_TAIL:])

    def push(self, token_ids: Iterable[int]) -> str:
        """Append ids; the text that is certain now and was not before (often "")."""
        self._ids.extend(token_ids)
        known = self._decode(self._given)
        text = self._decode(len(self._ids))
        if not text.endswith(REPLACEMENT):
            return self._give(len(self._ids), known, text)
        # The end is unfinished.  Give out what stands before it, so that a long piece that arrives at once (or
        # bytes that never become a character) does not hold everything back.
        for end in range(len(self._ids) - 1, self._given, -1):
            text = self._decode(end)
            if not text.endswith(REPLACEMENT) or len(self._ids) - end >= LONGEST_CHARACTER:
                return self._give(end, known, text)
        return ""

    def finish(self) -> str:
        """What is still pending, unfinished characters included: nothing more will come."""
        return self._give(len(self._ids), self._decode(self._given), self._decode(len(self._ids)))

    def _follow(self, prompt_tail: Sequence[int]) -> None:
        """Begin behind these ids.  The shortest end with whole text will do; a prompt that breaks off in the middle of
        a character has none, and then the output stands for itself."""
        for start in range(len(prompt_tail) - 1, -1, -1):
            self._ids = list(prompt_tail[start:])
            self._given = len(self._ids)
            text = self._decode(self._given)
            if text and not text.endswith(REPLACEMENT):
                return
        self._ids, self._given = [], 0

    def _give(self, end: int, known: str, text: str) -> str:
        fresh = text[len(known) :]
        # Ids without text (special tokens that are skipped) are no context: a decoder that strips the first space of
        # a text would take the next word for its beginning.
        if fresh or self._given - self._context > LONGEST_CONTEXT:
            self._context = self._given
        self._given = end
        return fresh

    def _decode(self, end: int) -> str:
        return self._tokenizer.decode(self._ids[self._context : end], skip_special_tokens=self._skip_special)


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string and where it begins, in characters of everything pushed."""

    stop: str
    start: int


class StopMatcher:
    """Finds the first of several stop strings in a text that arrives in pieces."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._keep = max((len(stop) for stop in self._stops), default=1) - 1
        self._tail = ""
        self._seen = 0

    def push(self, text: str) -> StopMatch | None:
        """Append text; the stop string that begins first in it (of several at one place, the first given)."""
        window = self._tail + text
        origin = self._seen - len(self._tail)
        self._seen += len(text)
        self._tail = window[max(0, len(window) - self._keep) :]
        found = [(at, order) for order, stop in enumerate(self._stops) if (at := window.find(stop)) >= 0]
        if not found:
            return None
        at, order = min(found)
        return StopMatch(self._stops[order], origin + at)

    @property
    def held(self) -> int:
        """Characters at the end that may be the beginning of a stop string: not to be shown yet."""
        for size in range(len(self._tail), 0, -1):
            if any(stop.startswith(self._tail[-size:]) for stop in self._stops):
                return size
        return 0
