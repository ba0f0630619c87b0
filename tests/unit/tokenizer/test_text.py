"""Incremental decoding, stop strings, and the detokenizer that trims with both."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from sglang_hicache.errors import UserError
from sglang_hicache.scheduler.core import SchedulerCore
from sglang_hicache.scheduler.stop_text import StopWatch
from sglang_hicache.text import LONGEST_PROMPT_TAIL, IncrementalDecoder, StopMatch, StopMatcher, shared_tokenizer
from sglang_hicache.tokenizer.detokenize import Detokenizer
from sglang_hicache.tokenizer.manager import RequestManager, Submission
from sglang_hicache.wire import FinishReason, NewRequest, RequestOutput, SamplingParams, TickPlan
from tests.contract.fake_server import make_model
from tests.ranks.world import server_config

END = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def codec(model: str):
    return shared_tokenizer(model)


@pytest.mark.parametrize("text", ["plain", "héllo wörld", "漢字かな", "😀 and 👩‍👩‍👧", "é", "\ufffd?", ""])
def test_pieces_join_to_the_whole(model: str, codec, text: str) -> None:
    decoder = IncrementalDecoder(model)
    pieces = [decoder.push([token_id]) for token_id in codec.encode(text).ids]
    assert "".join(pieces) + decoder.finish() == text


def test_half_a_character_is_not_given_out(model: str, codec) -> None:
    decoder = IncrementalDecoder(model)
    first, second, third = codec.encode("漢").ids
    assert [decoder.push([first]), decoder.push([second]), decoder.push([third])] == ["", "", "漢"]


def test_half_a_character_at_the_end_is_given_out_by_finish(model: str, codec) -> None:
    decoder = IncrementalDecoder(model)
    ids = codec.encode("a漢").ids
    assert decoder.push(ids[:-1]) == "a"
    assert decoder.finish() == "\ufffd"
    assert decoder.finish() == ""


def test_rubbish_does_not_hold_the_text_back(model: str, codec) -> None:
    """A model with random weights writes bytes that never become a character."""
    stray = codec.encode("漢").ids[1]
    decoder = IncrementalDecoder(model)
    given_out = [decoder.push([stray]) for _ in range(20)]
    assert len("".join(given_out)) >= 20 - 4


def test_special_tokens(model: str) -> None:
    assert IncrementalDecoder(model, skip_special_tokens=True).push([END]) == ""
    assert IncrementalDecoder(model, skip_special_tokens=False).push([END]) == "<|end|>"


@given(data=st.data())
def test_any_text_in_any_pieces(model: str, codec, data: st.DataObject) -> None:
    text = data.draw(st.text(max_size=40))
    ids = codec.encode(text).ids
    decoder, pieces = IncrementalDecoder(model), []
    while ids:
        size = data.draw(st.integers(1, len(ids)))
        pieces.append(decoder.push(ids[:size]))
        ids = ids[size:]
    assert "".join(pieces) + decoder.finish() == text


@given(ids=st.lists(st.integers(0, 256), max_size=60))
def test_any_ids_one_by_one(model: str, codec, ids: list[int]) -> None:
    """Invalid bytes too: what is given out piece by piece is what decoding at once gives."""
    decoder = IncrementalDecoder(model)
    pieces = [decoder.push([token_id]) for token_id in ids]
    assert "".join(pieces) + decoder.finish() == codec.decode(ids)


@pytest.fixture(scope="module")
def word_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer as SentencePiece models have it: words begin with a space, which the first word of a text loses."""
    words = ["<unk>", "<|end|>", "\u2581the", "\u2581", "\u2581cat", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    folder = tmp_path_factory.mktemp("words")
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


#: End of text, "the", " ", " cat", "s" and "é" in bytes.  Stray bytes are left out: this decoder turns a whole run of
#: byte tokens into rubbish for one of them, so that no incremental decoding could agree with it.
WORDS = [[1], [2], [3], [4], [5], [6 + 0xC3, 6 + 0xA9]]


@given(pieces=st.lists(st.lists(st.sampled_from(WORDS), max_size=4), max_size=20), split=st.booleans())
def test_spaces_survive_special_tokens_and_empty_pieces(word_model: str, pieces: list[Any], split: bool) -> None:
    decoder = IncrementalDecoder(word_model)
    whole: list[int] = []
    given_out = ""
    for piece in pieces:
        token_ids = [token_id for word in piece for token_id in word]
        whole += token_ids
        given_out += "".join(decoder.push([token_id]) for token_id in token_ids) if split else decoder.push(token_ids)
    assert given_out + decoder.finish() == shared_tokenizer(word_model).decode(whole)


@pytest.fixture(scope="module", params=["metaspace", "replace and strip"])
def spaced_model(request: pytest.FixtureRequest, word_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The two ways in which tokenizers of SentencePiece models lose the first space of a text."""
    if request.param == "replace and strip":
        return word_model
    tokenizer = Tokenizer.from_file(f"{word_model}/tokenizer.json")
    metaspace = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace, decoders.Fuse()])
    folder = tmp_path_factory.mktemp("metaspace")
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


#: As WORDS, by name.
SPECIAL, THE, SPACE, CAT, S, E_ACUTE = WORDS


def test_first_word_keeps_its_space_behind_a_prompt(spaced_model: str) -> None:
    assert IncrementalDecoder(spaced_model, prompt_ids=THE).push([*CAT, *S]) == " cats"
    assert IncrementalDecoder(spaced_model).push([*CAT, *S]) == "cats"


@pytest.mark.parametrize("tail", [SPECIAL, SPECIAL * 5, E_ACUTE, SPACE, [*E_ACUTE, *SPECIAL], THE * 40])
@pytest.mark.parametrize("skip", [True, False])
def test_whatever_a_prompt_ends_with_is_context(spaced_model: str, tail: list[int], skip: bool) -> None:
    prompt_ids = [*THE, *tail]
    decoder = IncrementalDecoder(spaced_model, skip, prompt_ids)
    assert [decoder.push(CAT), decoder.push(THE), decoder.finish()] == [" cat", " the", ""]


def test_prompt_of_special_tokens_is_the_beginning_of_a_text(spaced_model: str) -> None:
    assert IncrementalDecoder(spaced_model, prompt_ids=SPECIAL * 3).push(CAT) == "cat"
    assert IncrementalDecoder(spaced_model, prompt_ids=SPECIAL * 100).push([*CAT, *S]) == "cats"


def test_prompt_that_breaks_off_in_a_character_is_no_context(model: str, codec) -> None:
    first, *rest = codec.encode("\u6f22").ids
    decoder = IncrementalDecoder(model, prompt_ids=[*codec.encode("a").ids, first])
    alone = IncrementalDecoder(model)
    assert decoder.push(rest) + decoder.finish() == alone.push(rest) + alone.finish()


@given(
    prompt=st.lists(st.sampled_from(WORDS), max_size=30),
    output=st.lists(st.sampled_from(WORDS), max_size=10),
    split=st.booleans(),
)
def test_prompt_and_output_join_to_the_whole(
    word_model: str, prompt: list[list[int]], output: list[list[int]], split: bool
) -> None:
    """Wherever the prompt ends, its text and the output's are the text of both."""
    prompt_ids, output_ids = (sum(words, []) for words in (prompt, output))
    decoder = IncrementalDecoder(word_model, prompt_ids=prompt_ids)
    pieces = [decoder.push([token_id]) for token_id in output_ids] if split else [decoder.push(output_ids)]
    decode = shared_tokenizer(word_model).decode
    tail = prompt_ids[-LONGEST_PROMPT_TAIL:]
    if not any(decode(tail[start:]) for start in range(len(tail))):
        return  # nothing to see in the tail: as if the text began here
    assert decode(prompt_ids) + "".join(pieces) + decoder.finish() == decode(prompt_ids + output_ids)


def test_endless_special_tokens_stay_cheap(model: str) -> None:
    """`ignore_eos` on a model that has nothing more to say."""
    decoder = IncrementalDecoder(model)
    assert [decoder.push([END]) for _ in range(1000)] == [""] * 1000
    assert decoder._given - decoder._context < 100


def test_a_folder_without_tokenizer_is_the_operator_s_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokenizer.json does not exist"):
        IncrementalDecoder(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        IncrementalDecoder(str(tmp_path))


# ---------------------------------------------------------------------------------------------- stop strings


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_stop_is_found_where_it_begins_first(text: str, stops: list[str]) -> None:
    """Letter by letter, the match is the stop whose end comes first; nothing before it is lost."""
    matcher = StopMatcher(stops)
    for size, letter in enumerate(text, 1):
        found = matcher.push(letter)
        expected = [(size - len(stop), order) for order, stop in enumerate(stops) if text[:size].endswith(stop)]
        if expected:
            start, order = min(expected)
            assert found == StopMatch(stops[order], start)
            return
        assert found is None


@given(text=st.text("ab", max_size=20), stop=st.text("ab", min_size=1, max_size=4))
def test_held_is_the_longest_possible_beginning(text: str, stop: str) -> None:
    if stop in text:
        return
    matcher = StopMatcher([stop])
    matcher.push(text)
    expected = max((size for size in range(len(stop)) if text.endswith(stop[:size])), default=0)
    assert matcher.held == expected


def test_no_stop_holds_nothing() -> None:
    matcher = StopMatcher(["", ""])
    assert matcher.push("anything") is None
    assert matcher.held == 0


# ---------------------------------------------------------------------------------------------- detokenizer


def test_beginning_of_a_stop_is_held_and_given_when_it_was_none(model: str, codec) -> None:
    detokenizer = Detokenizer(model, SamplingParams(stop=("stop",)), ())
    assert detokenizer.push(codec.encode("a st").ids, None) == "a "
    assert detokenizer.push(codec.encode("ay").ids, None) == "stay"
    assert detokenizer.push(codec.encode("s sto").ids, FinishReason(type="length")) == "s sto"


def test_matched_stop_is_cut(model: str, codec) -> None:
    detokenizer = Detokenizer(model, SamplingParams(stop=("never", "stop")), ())
    assert detokenizer.push(codec.encode("a st").ids, None) == "a "
    assert detokenizer.push(codec.encode("op x").ids, FinishReason(type="stop", matched="stop")) == ""


@pytest.mark.parametrize("skip", [True, False])
def test_matched_stop_token_is_cut(model: str, codec, skip: bool) -> None:
    detokenizer = Detokenizer(model, SamplingParams(skip_special_tokens=skip), ())
    ids = [*codec.encode("end").ids, END]
    assert detokenizer.push(ids, FinishReason(type="stop", matched=END)) == "end"


def test_an_ending_without_tokens(model: str, codec) -> None:
    detokenizer = Detokenizer(model, SamplingParams(), ())
    first, *_ = codec.encode("é").ids
    assert detokenizer.push([first], None) == ""
    assert detokenizer.push((), FinishReason(type="abort")) == "\ufffd"


@given(
    prompt=st.lists(st.sampled_from(WORDS), max_size=6),
    output=st.lists(st.sampled_from([THE, CAT, S]), min_size=1, max_size=12),
)
@example(prompt=[THE], output=[CAT, S])
@example(prompt=[], output=[CAT, S])
def test_scheduler_and_tokenizer_agree_on_a_stop_behind_any_prompt(
    word_model: str, prompt: list[list[int]], output: list[list[int]]
) -> None:
    """A stop string that begins with the space of the first word: found by one, it must be cut by the other."""
    prompt_ids, text = sum(prompt, []), ""
    sampling = SamplingParams(stop=(" cats",))
    watch = StopWatch.maker(word_model)(sampling, prompt_ids)
    detokenizer = Detokenizer(word_model, sampling, prompt_ids)
    decoder = IncrementalDecoder(word_model, prompt_ids=prompt_ids)
    for number, (token_id,) in enumerate(output, 1):
        found = watch.push(token_id)
        finish = FinishReason(type="stop", matched=found) if found else None
        if finish is None and number == len(output):
            finish = FinishReason(type="length")
        text += detokenizer.push([token_id], finish)
        if found:
            break
    plain = decoder.push([token_id for (token_id,) in output])
    assert text == plain.split(" cats")[0]
    assert (found is not None) == (" cats" in plain)


def test_both_sides_are_given_the_prompt(word_model: str) -> None:
    """The whole way: the manager's stream and the core's stop watch begin behind the prompt of the request."""
    prompt_ids, sampling = THE * 3, SamplingParams(stop=(" cats",))
    sent: list[NewRequest] = []
    manager = RequestManager(SimpleNamespace(send=lambda message: not sent.append(message)), word_model)
    (stream,) = manager.submit([Submission(token_ids=prompt_ids, sampling=sampling)]).streams
    stream.append(RequestOutput(rid=stream.rid, token_ids=(*CAT, *THE)))
    assert stream.text == " cat the"
    watches: list[StopWatch] = []

    def make(*given: Any) -> StopWatch:
        watches.append(StopWatch.maker(word_model)(*given))
        return watches[-1]

    SchedulerCore(server_config(1), 0, make).apply(TickPlan(number=1, now_us=1, requests=sent))
    assert [watches[0].push(token_id) for token_id in (*CAT, *S)] == [None, " cats"]
