"""The OpenAI routes: answers, streams, usage, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from sglang_hicache import wire
from tests.contract.fake_server import FakeServer

HELLO = {"messages": [{"role": "user", "content": "hi"}]}


def complete(server: FakeServer, **body: Any) -> Any:
    return server.call("POST", "/v1/completions", json=body)


def chat(server: FakeServer, **body: Any) -> Any:
    return server.call("POST", "/v1/chat/completions", json=HELLO | body)


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def says(text: str, cached: int = 0) -> Callable[[FakeServer], None]:
    """Makes every request answer with a text."""

    def script(server: FakeServer) -> None:
        ids = server.ids(text)
        server.generate = lambda request: [
            wire.RequestOutput(
                rid=request.rid,
                token_ids=(token_id,),
                finish=wire.FinishReason(type="stop") if place == len(ids) - 1 else None,
                cached=wire.CachedTokens(device=cached),
            )
            for place, token_id in enumerate(ids)
        ]

    return script


def test_completion(server: FakeServer) -> None:
    answer = complete(server, prompt="abc", model="org/tiny", rid="r1", user="x", temperature=None).json()
    assert answer.pop("created") > 0
    assert answer == {
        "id": "r1",
        "object": "text_completion",
        "model": "org/tiny",
        "choices": [{"index": 0, "text": "abc", "logprobs": None, "finish_reason": "stop", "matched_stop": None}],
        "usage": {"prompt_tokens": 3, "total_tokens": 6, "completion_tokens": 3, "reasoning_tokens": 0},
    }


def test_completion_defaults(server: FakeServer) -> None:
    complete(server, prompt="abc")
    sampling = server.commands(wire.NewRequest)[0].sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p) == (16, 1.0, -1, 1.0)


@pytest.mark.parametrize("prompt", [["ab", "c"], [[65, 66], [67]]])
def test_completion_of_several_prompts(server: FakeServer, prompt: list[Any]) -> None:
    answer = complete(server, prompt=prompt, rid="r").json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["prompt_tokens"] == 3
    assert len(server.commands(wire.NewRequest)) == 2


def test_completion_stream(server: FakeServer) -> None:
    reply = complete(server, prompt=["ab", "c"], stream=True, stream_options={"include_usage": True})
    chunks = events(reply.text)
    usage = chunks.pop()
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 3
    texts = ["", ""]
    for chunk in chunks:
        assert chunk["object"] == "text_completion" and chunk["usage"] is None
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == ["ab", "c"]
    assert {chunk["id"] for chunk in chunks} == {usage["id"]}


def test_chat_prompt_is_the_template_s(server: FakeServer) -> None:
    says("hello")(server)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    answer = chat(server, messages=messages, max_tokens=9).json()
    [request] = server.commands(wire.NewRequest)
    expected = "<|system|>be brief<|end|><|user|>a\nb<|end|><|assistant|>"
    assert tuple(request.token_ids) == server.ids(expected)
    assert request.sampling.max_new_tokens == 9
    assert answer["object"] == "chat.completion"
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hello"}
    assert choice["finish_reason"] == "stop"


def test_chat_without_a_limit_may_fill_the_context(server: FakeServer) -> None:
    says("x")(server)
    chat(server)
    chat(server, max_completion_tokens=7, max_tokens=9)
    first, second = server.commands(wire.NewRequest)
    assert first.sampling.max_new_tokens == 512 - len(first.token_ids)
    assert second.sampling.max_new_tokens == 7


def test_chat_stream(server: FakeServer) -> None:
    says("héllo")(server)
    chunks = events(chat(server, stream=True).text)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "héllo"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize("stream", [False, True])
def test_cached_tokens_in_usage_only_with_cache_report(serve: Callable[..., FakeServer], stream: bool) -> None:
    for report in (False, True):
        server = serve(cache_report=report)
        says("x", cached=64)(server)
        reply = chat(server, stream=stream, stream_options={"include_usage": True})
        usage = events(reply.text)[-1]["usage"] if stream else reply.json()["usage"]
        assert usage.get("prompt_tokens_details") == ({"cached_tokens": 64} if report else None)


def test_cached_tokens_details_on_request(server: FakeServer) -> None:
    says("x", cached=64)(server)
    assert "sglext" not in chat(server).json()
    details = chat(server, return_cached_tokens_details=True).json()["sglext"]["cached_tokens_details"]
    assert details == {"device": 64, "host": 0}
    fetch = wire.FetchDecision(verdict="fetch", reason="known to be quick", tokens=512)
    end = wire.FinishReason(type="length")
    server.generate = lambda request: [wire.RequestOutput(rid=request.rid, token_ids=(65,), finish=end, fetch=fetch)]
    details = chat(server, return_cached_tokens_details=True).json()["sglext"]["cached_tokens_details"]
    assert details["storage_decision"]["verdict"] == "fetch" and details["storage_decision"]["tokens"] == 512


def test_cache_namespace_and_priority_reach_the_wire(server: FakeServer) -> None:
    complete(server, prompt="a", extra_key="k", cache_salt="s", priority=3, seed=5)
    [request] = server.commands(wire.NewRequest)
    assert (request.extra_key, request.cache_salt, request.priority, request.sampling.seed) == ("k", "s", 3, 5)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("content_type", ["text/plain", "", "application/jsonx"])
def test_content_type_must_be_json(server: FakeServer, path: str, content_type: str) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    reply = server.call("POST", path, content=b"{}", headers=headers)
    assert reply.status_code == 400
    assert reply.json()["object"] == "error"
    assert "application/json" in reply.json()["message"]


def test_content_type_may_name_a_charset(server: FakeServer) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert server.call("POST", "/v1/completions", content=b'{"prompt": "a"}', headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "empty"),
        ({"prompt": "a", "n": 2}, "n "),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "suffix": "x"}, "suffix"),
        ({"prompt": "a", "logprobs": 1}, "logprobs"),
        ({"prompt": "a", "logprobs": 0}, "logprobs"),
        ({"prompt": "a", "frequency_penalty": 1}, "frequency_penalty"),
        ({"prompt": "a", "min_tokens": 1}, "min_tokens"),
        ({"prompt": "a", "logit_bias": {"1": 1.5}}, "logit_bias"),
        ({"prompt": "a", "response_format": {"type": "json_object"}}, "response_format"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "stream": 3}, "$.stream"),
    ],
)
def test_completion_refusals(server: FakeServer, body: dict[str, Any], word: str) -> None:
    reply = complete(server, **body)
    assert reply.status_code == 400, reply.text
    error = reply.json()
    assert word in error.pop("message")
    assert error == {"object": "error", "type": "BadRequestError", "param": None, "code": 400}
    assert server.sent == []


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"messages": []}, "empty"),
        ({"messages": "hi"}, "$.messages"),
        ({"messages": [{"content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "image_url"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"logprobs": True}, "logprobs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"max_completion_tokens": 10_000}, "10000"),
    ],
)
def test_chat_refusals(server: FakeServer, body: dict[str, Any], word: str) -> None:
    reply = chat(server, **body)
    assert reply.status_code == 400, reply.text
    assert word in reply.json()["message"]
    assert server.sent == []


def test_refused_by_the_scheduler_in_a_stream(server: FakeServer) -> None:
    finish = wire.FinishReason(type="abort", message="the queue is full", status_code=503)
    server.generate = lambda request: [wire.RequestOutput(rid=request.rid, finish=finish)]
    assert complete(server, prompt="a").status_code == 503
    [error] = events(complete(server, prompt="a", stream=True).text)
    assert error["error"]["code"] == 503 and error["error"]["message"] == "the queue is full"


def test_models(server: FakeServer) -> None:
    models = server.call("GET", "/v1/models").json()
    [card] = models["data"]
    assert models["object"] == "list"
    assert card.pop("created") > 0
    assert card == {
        "id": "org/tiny",
        "object": "model",
        "owned_by": "sglang",
        "root": "org/tiny",
        "parent": None,
        "max_model_len": 512,
    }
    assert server.call("GET", "/v1/models/org/tiny").json()["id"] == "org/tiny"


def test_unknown_model(server: FakeServer) -> None:
    reply = server.call("GET", "/v1/models/other")
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert "'other'" in error.pop("message")
    assert error == {"type": "invalid_request_error", "param": "model", "code": "model_not_found"}
