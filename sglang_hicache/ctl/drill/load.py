"""The load of a drill: streams of conversations, each answer compared with the reference run and measured.

Every prompt is known beforehand: what the model "said" earlier in a conversation is taken from the reference run, so
that one answer that differs is one difference and not a whole conversation of them.

`Load` has one thread per stream.  They share the counter of conversations, the gate that holds them, the list of
records and `Known`, all under one lock; nothing blocks inside it.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sglang_hicache.ctl.drill.scenario import LoadTable
from sglang_hicache.ctl.drill.stream import AnswerFailed, StreamClient
from sglang_hicache.ctl.exits import Unreachable

#: Token ids of prompts: every model has these as ordinary words or parts of words.
_LOWEST_TOKEN, _HIGHEST_TOKEN = 256, 1000

#: Pages are at least as long; what the server knows is counted in pieces of this size.
_PIECE_TOKENS = 16

#: An answer that pauses for longer has failed.
_ANSWER_TIMEOUT_S = 120.0
#: After a failure a stream waits at least so long: a server that is gone must not be asked ten thousand times a second.
_LEAST_PAUSE_S = 0.05

#: Conversation and turn.
Question = tuple[int, int]
Answers = Mapping[Question, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One request, as the client saw it."""

    question: Question
    #: Seconds since the load began.
    start_s: float
    #: Seconds to the first token and to the last.
    ttft_s: float = 0.0
    total_s: float = 0.0
    prompt_tokens: int = 0
    #: Prompt tokens by the tier that they came from; the rest was computed.
    cached: Mapping[str, int] = field(default_factory=dict)
    #: Prompt tokens that were computed although the server had computed them before.
    reprefilled_tokens: int = 0
    answer: tuple[int, ...] = ()
    #: "": it was answered.
    error: str = ""

    @property
    def end_s(self) -> float:
        """Seconds since the load began."""
        return self.start_s + self.total_s


class Prompts:
    """What is asked: made of the table alone, so that the same table asks the same."""

    def __init__(self, table: LoadTable) -> None:
        chance = random.Random(table.seed)

        def tokens(count: int) -> list[int]:
            return [chance.randrange(_LOWEST_TOKEN, _HIGHEST_TOKEN) for _ in range(count)]

        self.turns = table.turns
        self.conversations = table.conversations
        self._prefixes = [tokens(table.shared_tokens) for _ in range(table.prefixes)]
        self._questions = [
            [tokens(table.unique_tokens) for _ in range(table.turns)] for _ in range(table.conversations)
        ]

    def prompt(self, question: Question, answers: Answers) -> list[int]:
        """The whole prompt of a turn: what was asked and answered before it comes first."""
        conversation, turn = question
        parts = [self._prefixes[conversation % len(self._prefixes)]]
        for earlier in range(turn):
            parts += [self._questions[conversation][earlier], list(answers[conversation, earlier])]
        return [*itertools.chain(*parts), *self._questions[conversation][turn]]


class Known:
    """Which beginnings of prompts the server has computed already."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def tokens(self, prompt: Sequence[int]) -> int:
        """How much of the beginning of a prompt; never all of it, for its last token is always computed."""
        known = 0
        for number, beginning in enumerate(_beginnings(prompt[:-1]), 1):
            if beginning not in self._seen:
                break
            known = number * _PIECE_TOKENS
        return known

    def learn(self, tokens: Sequence[int]) -> None:
        """The server has computed these."""
        self._seen.update(_beginnings(tokens))


def _beginnings(tokens: Sequence[int]) -> Iterator[int]:
    """A number for each beginning, piece by piece."""
    chain = 0
    for end in range(_PIECE_TOKENS, len(tokens) + 1, _PIECE_TOKENS):
        chain = hash((chain, *tokens[end - _PIECE_TOKENS : end]))
        yield chain


class Load:
    """Streams that ask one server until they are stopped."""

    def __init__(
        self, table: LoadTable, client: Callable[[], StreamClient], answers: Answers, *, key: str = ""
    ) -> None:
        self._table = table
        self._client = client
        self._key = key
        self._prompts = Prompts(table)
        self._answers = answers
        self._known = Known()
        self._gate = threading.Condition()
        self._holders = 0
        self._busy = 0
        self._is_stopped = threading.Event()
        self._next = itertools.count()
        self._threads: list[threading.Thread] = []
        self._started_s = 0.0
        #: In the order of their ends.
        self.records: list[Record] = []
        self.storage_tokens = 0

    def start(self) -> None:
        """Begin to ask; `now_s` counts from here."""
        self._started_s = time.monotonic()
        for number in range(self._table.streams):
            thread = threading.Thread(target=self._stream_blocking, name=f"stream {number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def now_s(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self._started_s

    def stop_blocking(self) -> None:
        """No new questions, and wait for the answers."""
        self._is_stopped.set()
        with self._gate:
            self._gate.notify_all()
        for thread in self._threads:
            thread.join()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nothing is asked meanwhile, and nothing is on its way."""
        with self._gate:
            self._holders += 1
            self._gate.wait_for(lambda: self._busy == 0)
        try:
            yield
        finally:
            with self._gate:
                self._holders -= 1
                self._gate.notify_all()

    def _stream_blocking(self) -> None:
        while not self._is_stopped.is_set():
            with self._gate:
                conversation = next(self._next) % self._prompts.conversations
            for turn in range(self._prompts.turns):
                self._ask_blocking((conversation, turn))

    def _ask_blocking(self, question: Question) -> None:
        with self._gate:
            self._gate.wait_for(lambda: self._holders == 0 or self._is_stopped.is_set())
            if self._is_stopped.is_set():
                return
            self._busy += 1
            prompt = self._prompts.prompt(question, self._answers)
            known = self._known.tokens(prompt)
        start_s = self.now_s()
        #: Unless it is known what came of it.
        record = Record(question=question, start_s=start_s, error="a defect of the drill ended the stream that asked")
        try:
            record = ask_blocking(
                self._client(), question, prompt, self._table.output_tokens,
                start_s=start_s, known=known, key=self._key,
            )  # fmt: skip
        finally:
            with self._gate:
                self._busy -= 1
                self.records.append(record)
                self.storage_tokens += record.cached.get("storage", 0)
                if not record.error:
                    self._known.learn([*prompt, *record.answer[:-1]])
                self._gate.notify_all()
        self._is_stopped.wait(max(self._table.pause_s, _LEAST_PAUSE_S if record.error else 0.0))


def ask_blocking(
    client: StreamClient, question: Question, prompt: list[int], output_tokens: int, *,
    start_s: float = 0.0, known: int = 0, key: str = "", salt: str = "",
) -> Record:  # fmt: skip
    """One greedy answer of exactly so many tokens.  `salt`: shares no cached page with requests of another salt."""
    sampling = {"temperature": 0, "max_new_tokens": output_tokens, "ignore_eos": True}
    body = {"input_ids": prompt, "stream": True, "sampling_params": sampling} | ({"cache_salt": salt} if salt else {})
    begin = time.monotonic()
    first: float | None = None
    event: dict = {}
    try:
        for event in client.events("/generate", body, key=key, timeout_s=_ANSWER_TIMEOUT_S):
            if first is None and event["output_ids"]:
                first = time.monotonic()
        if len(event.get("output_ids", ())) != output_tokens:
            raise AnswerFailed(f"the answer ended early: {event.get('meta_info', {}).get('finish_reason')}")
        end = time.monotonic()
        details = event["meta_info"].get("cached_tokens_details") or {}
        cached = {tier: details.get(tier, 0) for tier in ("device", "host", "storage")}
        return Record(
            question=question, start_s=start_s, ttft_s=(first or end) - begin, total_s=end - begin,
            prompt_tokens=len(prompt), cached=cached, answer=tuple(event["output_ids"]),
            reprefilled_tokens=max(0, known - sum(cached.values())),
        )  # fmt: skip
    except (AnswerFailed, Unreachable) as error:
        why = str(error) or "?"
    except (LookupError, TypeError, AttributeError) as error:
        why = f"the answer has not the form of one ({type(error).__name__}: {error})"
    return Record(question=question, start_s=start_s, total_s=time.monotonic() - begin, error=why)


def reference_answers(table: LoadTable, client: StreamClient, *, key: str = "") -> Answers:
    """Every question once, conversations side by side, and none of them with anything from a cache: what the answers
    must be."""
    prompts, answers = Prompts(table), {}
    failures: list[str] = []
    numbers = iter(range(table.conversations))
    lock = threading.Lock()

    def converse_blocking() -> None:
        while not failures:
            with lock:
                conversation = next(numbers, None)
            if conversation is None:
                return
            for turn in range(table.turns):
                question = conversation, turn
                prompt, salt = prompts.prompt(question, answers), f"reference {question}"
                record = ask_blocking(client, question, prompt, table.output_tokens, key=key, salt=salt)
                if record.error:
                    failures.append(record.error)
                    return
                answers[question] = record.answer

    threads = [threading.Thread(target=converse_blocking, daemon=True) for _ in range(table.streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures or len(answers) != table.conversations * table.turns:
        raise Unreachable(f"the reference run failed: {failures[0] if failures else 'a question was not asked'}")
    return answers
