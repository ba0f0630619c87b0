"""/generate: answers, streams, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec import structs

from sglang_hicache import wire
from sglang_hicache.config import PoolConfig
from tests.contract.fake_server import FakeServer, make_config


def post(server: FakeServer, **body: Any) -> Any:
    return server.call("POST", "/generate", json=body)


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_answer_has_text_ids_and_meta(server: FakeServer, method: str) -> None:
    reply = server.call(method, "/generate", json={"text": "héllo", "rid": "r1", "extra_key": "k", "unknown": 1})
    assert reply.status_code == 200
    answer = reply.json()
    meta = answer["meta_info"]
    assert answer["text"] == "héllo"
    assert len(answer["output_ids"]) == len("héllo".encode())
    assert meta.pop("e2e_latency") >= 0
    assert meta == {
        "id": "r1",
        "finish_reason": {"type": "stop", "matched": None},
        "prompt_tokens": 6,
        "completion_tokens": 6,
        "cached_tokens": 0,
        "cached_tokens_details": None,
        "weight_version": "default",
        "num_retractions": 0,
    }
    [sent] = server.commands(wire.NewRequest)
    assert sent.extra_key == "k" and sent.cache_salt is None


def test_only_the_leader_gets_requests(server: FakeServer) -> None:
    post(server, text="x")
    assert [rank for rank, message in server.sent if isinstance(message, wire.NewRequest)] == [0]


def test_length_and_ids_as_prompt(server: FakeServer) -> None:
    answer = post(server, input_ids=[65, 66, 67], sampling_params={"max_new_tokens": 2}).json()
    assert answer["output_ids"] == [65, 66]
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 2}


def test_sampling_reaches_the_wire(server: FakeServer) -> None:
    params = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 1 << 30,
        "min_p": 0.1,
        "sampling_seed": 7,
        "stop": "x",
        "stop_token_ids": [5],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "max_new_tokens": None,
        "n": 1,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0,
    }
    assert post(server, text="abc", sampling_params=params).status_code == 200
    [sent] = server.commands(wire.NewRequest)
    assert sent.sampling == wire.SamplingParams(
        max_new_tokens=512 - 3,
        temperature=0.0,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        seed=7,
        stop=("x",),
        stop_token_ids=(5,),
        ignore_eos=True,
        skip_special_tokens=False,
    )


def test_default_output_is_128_or_what_fits(server: FakeServer) -> None:
    post(server, text="a")
    post(server, input_ids=[1] * 500)
    assert [request.sampling.max_new_tokens for request in server.commands(wire.NewRequest)] == [128, 12]


def test_the_log_tells_of_each_request_with_its_id(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    cached = wire.CachedTokens(device=64, storage=128)
    finish = wire.FinishReason(type="length")
    server.generate = lambda request: [
        wire.RequestOutput(rid=request.rid, token_ids=(65,), finish=finish, cached=cached)
    ]
    with caplog.at_level("INFO", logger="sglang_hicache.tokenizer.manager"):
        post(server, text="abc", rid="my request")
    (record,) = [record for record in caplog.records if record.name == "sglang_hicache.tokenizer.manager"]
    assert vars(record)["rid"] == "my request", "as the client chose it"
    told = record.getMessage()
    assert told.startswith("request ended (length): 3 prompt tokens (device 64, host 0, storage 128), 1 new, ")


def test_cached_tokens_are_split_by_tier(server: FakeServer) -> None:
    cached = wire.CachedTokens(device=64, host=128, storage=256, storage_backend="FileBackend")
    finish = wire.FinishReason(type="stop", matched=9)
    server.generate = lambda request: [
        wire.RequestOutput(rid=request.rid, token_ids=(65, 9), finish=finish, cached=cached, num_retractions=2)
    ]
    answer = post(server, text="a").json()
    assert answer["output_ids"] == [65, 9]
    assert len(answer["text"]) == 1, "the stop token is no part of the text"
    meta = answer["meta_info"]
    assert meta["cached_tokens"] == 448
    assert meta["cached_tokens_details"] == {
        "device": 64,
        "host": 128,
        "storage": 256,
        "storage_backend": "FileBackend",
    }
    assert meta["num_retractions"] == 2
    assert meta["finish_reason"] == {"type": "stop", "matched": 9}


def test_details_without_storage_have_two_tiers(server: FakeServer) -> None:
    server.generate = lambda request: [
        wire.RequestOutput(
            rid=request.rid,
            token_ids=(65,),
            finish=wire.FinishReason(type="length"),
            cached=wire.CachedTokens(device=64),
        )
    ]
    assert post(server, text="a").json()["meta_info"]["cached_tokens_details"] == {"device": 64, "host": 0}


FETCH = wire.FetchDecision(verdict="probe", reason="slow", tokens=512, fetch_s=0.5, recompute_s=0.25, waited_s=0.0)


def decided(request: wire.NewRequest) -> list[wire.RequestOutput]:
    """The decision comes with the first token only."""
    end = wire.RequestOutput(rid=request.rid, token_ids=(65,), finish=wire.FinishReason(type="length"))
    return [wire.RequestOutput(rid=request.rid, token_ids=(65,), fetch=FETCH), end]


@pytest.mark.parametrize("stream", [False, True])
def test_the_decision_about_storage_on_request(server: FakeServer, stream: bool) -> None:
    server.generate = decided
    told = []
    for asks in (False, True):
        reply = post(server, text="a", stream=stream, return_cached_tokens_details=asks)
        answer = events(reply.text)[-1] if stream else reply.json()
        told.append(answer["meta_info"]["cached_tokens_details"])
    decision = {
        "verdict": "probe", "reason": "slow", "tokens": 512, "fetch_s": 0.5, "recompute_s": 0.25, "waited_s": 0.0,
    }  # fmt: skip
    assert told == [None, {"device": 0, "host": 0, "storage_decision": decision}]


def test_stop_string_is_cut_off(server: FakeServer) -> None:
    first, second = server.ids("one tw"), server.ids("o three")
    finish = wire.FinishReason(type="stop", matched=" two")
    server.generate = lambda request: [
        wire.RequestOutput(rid=request.rid, token_ids=first),
        wire.RequestOutput(rid=request.rid, token_ids=second, finish=finish),
    ]
    answer = post(server, text="a", sampling_params={"stop": [" two"]}).json()
    assert answer["text"] == "one"
    assert answer["output_ids"] == [*first, *second]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": " two"}


@pytest.mark.parametrize("prompts", [{"text": ["ab", "c"]}, {"input_ids": [[65, 66], [67]]}])
def test_a_list_of_prompts_gives_a_list_of_answers(server: FakeServer, prompts: dict[str, Any]) -> None:
    params = [{"max_new_tokens": 1}, {"max_new_tokens": 9}]
    answers = post(server, **prompts, rid="r", sampling_params=params).json()
    assert [answer["meta_info"]["id"] for answer in answers] == ["r_0", "r_1"]
    assert [len(answer["output_ids"]) for answer in answers] == [1, 1]
    assert [answer["meta_info"]["finish_reason"]["type"] for answer in answers] == ["length", "stop"]


def test_stream_grows_and_ends_with_done(server: FakeServer) -> None:
    reply = post(server, text="héy", stream=True)
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    chunks = events(reply.text)
    texts = [chunk["text"] for chunk in chunks]
    assert texts[-1] == "héy"
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    assert chunks[-1]["meta_info"]["finish_reason"]["type"] == "stop"
    assert len(chunks[-1]["output_ids"]) == 4


def test_stream_of_several_prompts_carries_the_index(server: FakeServer) -> None:
    chunks = events(post(server, text=["ab", "c"], stream=True).text)
    last = {chunk["index"]: chunk["text"] for chunk in chunks}
    assert last == {0: "ab", 1: "c"}


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"text": "a", "sampling_params": {"max_tokens": 3}}, ["max_tokens", "max_new_tokens", "temperature"]),
        ({"text": 3}, ["$.text", "int"]),
        ({"text": "a", "sampling_params": {"temperature": "hot"}}, ["$.sampling_params.temperature"]),
        ({"text": "a", "stream": "yes"}, ["$.stream"]),
    ],
)
def test_malformed_body_is_a_plain_error(server: FakeServer, body: dict[str, Any], words: list[str]) -> None:
    reply = post(server, **body)
    assert reply.status_code == 400
    assert all(word in reply.json()["error"] for word in words)


def test_body_that_is_no_json(server: FakeServer) -> None:
    reply = server.call("POST", "/generate", content=b"{nope")
    assert reply.status_code == 400
    assert "malformed" in reply.json()["error"]


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["exactly one"]),
    ({"text": "a", "input_ids": [1]}, ["exactly one"]),
    ({"text": ""}, ["empty"]),
    ({"text": []}, ["empty"]),
    ({"input_ids": []}, ["empty"]),
    ({"input_ids": [[]]}, ["empty"]),
    ({"input_ids": [1, [2]]}, ["only"]),
    ({"input_ids": [257]}, ["257", "0 to 256"]),
    ({"input_ids": [-1]}, ["-1", "0 to 256"]),
    ({"input_ids": [1] * 512}, ["512", "511"]),
    ({"input_ids": [1] * 500, "sampling_params": {"max_new_tokens": 13}}, ["500", "13", "513", "512", "12"]),
    ({"text": "a", "sampling_params": {"max_new_tokens": 0}}, ["max_new_tokens", "0"]),
    ({"text": "a", "sampling_params": {"temperature": -1}}, ["temperature", "-1"]),
    ({"text": "a", "sampling_params": {"top_p": 0}}, ["top_p"]),
    ({"text": "a", "sampling_params": {"top_p": 1.5}}, ["top_p", "1.5"]),
    ({"text": "a", "sampling_params": {"top_k": -2}}, ["top_k", "-2"]),
    ({"text": "a", "sampling_params": {"min_p": 2}}, ["min_p", "2"]),
    ({"text": "a", "sampling_params": {"sampling_seed": 1 << 64}}, ["seed", "64"]),
    ({"text": "a", "sampling_params": {"stop_token_ids": [999]}}, ["stop_token_ids", "999"]),
    ({"text": "a", "sampling_params": {"stop": ["x"] * 65}}, ["stop", "65", "64"]),
    ({"text": ["a", "b"], "rid": ["x"]}, ["rid", "1", "2"]),
    ({"text": "a", "rid": "HEALTH_CHECK_x"}, ["HEALTH_CHECK_"]),
    ({"text": "a", "rid": ["x", "x"]}, ["rid"]),
    ({"text": "a", "sampling_params": {"n": 2}}, ["sampling_params.n"]),
    ({"text": "a", "sampling_params": {"frequency_penalty": 0.5}}, ["sampling_params.frequency_penalty"]),
    ({"text": "a", "sampling_params": {"presence_penalty": 0.5}}, ["sampling_params.presence_penalty"]),
    ({"text": "a", "sampling_params": {"repetition_penalty": 1.1}}, ["sampling_params.repetition_penalty"]),
    ({"text": "a", "sampling_params": {"min_new_tokens": 1}}, ["sampling_params.min_new_tokens"]),
    ({"text": "a", "sampling_params": {"json_schema": "{}"}}, ["sampling_params.json_schema"]),
    ({"text": "a", "sampling_params": {"regex": "a"}}, ["sampling_params.regex"]),
    ({"text": "a", "sampling_params": {"ebnf": "a"}}, ["sampling_params.ebnf"]),
    ({"text": "a", "sampling_params": {"logit_bias": {"1": 2}}}, ["sampling_params.logit_bias"]),
    ({"text": "a", "return_logprob": True}, ["return_logprob"]),
    ({"text": "a", "lora_path": "x"}, ["lora_path"]),
    ({"text": "a", "session_params": {"id": "x"}}, ["session_params"]),
    ({"text": "a", "image_data": ["x"]}, ["image_data"]),
    ({"text": "a", "routed_dp_rank": 1}, ["routed_dp_rank"]),
]


@pytest.mark.parametrize(("body", "words"), REFUSED)
def test_refusal_names_what_is_wrong(server: FakeServer, body: dict[str, Any], words: list[str]) -> None:
    reply = post(server, **body)
    assert reply.status_code == 400, reply.text
    message = reply.json()["error"]["message"]
    assert all(word in message for word in words), message
    assert not server.commands(wire.NewRequest) or server.requests.in_flight == 0


def test_refusal_inside_a_stream_is_an_event(server: FakeServer) -> None:
    reply = post(server, input_ids=[999], stream=True)
    [event] = events(reply.text)
    error = event["error"]
    assert (error["type"], error["code"], error["retryable"]) == ("invalid_request_error", 400, False)
    assert "999" in error["message"]


def test_a_prompt_longer_than_the_device_pool_is_refused(model: Any) -> None:
    config = make_config(model)
    small = FakeServer(structs.replace(config, pool=PoolConfig(device_tokens=64)))
    try:
        reply = post(small, input_ids=[1] * 64)
    finally:
        small.close()
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    assert "64" in message and "512" in message and "pool" in message


@pytest.mark.parametrize("stream", [False, True])
def test_full_queue_reaches_the_client_as_503(server: FakeServer, stream: bool) -> None:
    finish = wire.FinishReason(type="abort", message="the queue is full", status_code=503)
    server.generate = lambda request: [wire.RequestOutput(rid=request.rid, finish=finish)]
    reply = post(server, text="a", stream=stream)
    if stream:
        [event] = events(reply.text)
        assert event["error"]["code"] == 503 and event["error"]["retryable"] is True
    else:
        assert reply.status_code == 503
        assert "queue is full" in reply.json()["error"]["message"]


def test_full_socket_is_503_and_leaves_nothing_behind(server: FakeServer) -> None:
    server.ports[0].is_full = True
    assert post(server, text=["a", "b"]).status_code == 503
    assert server.requests.in_flight == 0
