"""Wrong requests: a 4xx in OpenAI's shape that names the field, and never a 5xx."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from fakes.asgi_client import asgi_call
from fakes.byte_tokenizer import ByteTokenizer
from fakes.fake_engine import FakeEngine
from octavo_server.app import build_app
from octavo_server.replica import Replica
from octavo_server.settings import ServeSettings

Serve = Callable[..., Any]
USER = {"role": "user", "content": "Hi"}

CASES: list[tuple[dict[str, Any], str]] = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [USER, {"role": "user"}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
    ({"messages": [USER], "temperature": 3}, "temperature"),
    ({"messages": [USER], "temperature": "hot"}, "temperature"),
    ({"messages": [USER], "top_p": 0}, "top_p"),
    ({"messages": [USER], "top_k": -2}, "top_k"),
    ({"messages": [USER], "n": 0}, "n"),
    ({"messages": [USER], "n": 10_000}, "n"),
    ({"messages": [USER], "n": 1.5}, "n"),
    ({"messages": [USER], "max_tokens": 0}, "max_tokens"),
    ({"messages": [USER], "max_tokens": 2**40}, "max_tokens"),
    ({"messages": [USER], "max_tokens": 5, "min_tokens": 6}, "min_tokens"),
    ({"messages": [USER], "seed": 2**63}, "seed"),
    ({"messages": [USER], "stop": ["a"] * 17}, "stop"),
    ({"messages": [USER], "stop": ""}, "stop"),
    ({"messages": [USER], "logit_bias": {"999": 1}}, "logit_bias"),
    ({"messages": [USER], "logit_bias": {"1": 101}}, "logit_bias"),
    ({"messages": [USER], "stop_token_ids": [258]}, "stop_token_ids"),
    ({"messages": [USER], "allowed_token_ids": []}, "allowed_token_ids"),
    ({"messages": [USER], "bad_words": [" "]}, "bad_words"),
    ({"messages": [USER], "top_logprobs": 2}, "top_logprobs"),
    ({"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": [USER], "repetition_penalty": 0}, "repetition_penalty"),
    ({"messages": [USER], "stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": [USER], "response_format": {"type": "yaml"}}, "response_format.type"),
    ({"messages": [USER], "guided_choice": []}, "guided_choice"),
    ({"messages": [USER], "guided_regex": "a", "guided_json": {}}, "guided_regex"),
    ({"messages": [USER], "structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
    ({"messages": [USER], "structured_outputs": {}}, "structured_outputs"),
    ({"messages": [USER], "response_format": {"type": "json_schema"}}, "response_format"),
    ({"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"messages": [USER], "tools": [{"type": "retrieval"}]}, "tools[0].type"),
    ({"messages": [USER], "tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"messages": [USER], "tool_choice": "auto"}, "tool_choice"),
    ({"messages": [USER], "use_beam_search": True, "stream": True}, "use_beam_search"),
    ({"messages": [USER], "use_beam_search": True, "temperature": 0.5}, "temperature"),
    ({"messages": [USER], "use_beam_search": True, "stop": ["a"]}, "stop"),
    ({"messages": [USER], "use_beam_search": True, "n": 11}, "n"),
    ({"messages": [USER], "length_penalty": 0.5}, "length_penalty"),
    ({"messages": [USER], "chat_template": "{{ x }}"}, "chat_template"),
    ({"messages": [USER], "continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"messages": [USER], "cache_salt": "x" * 129}, "cache_salt"),
    ({"messages": [USER], "priority": 2**40}, "priority"),
]


@pytest.mark.parametrize(("body", "param"), CASES, ids=lambda value: str(value)[:60])
async def test_chat_names_the_field(body: dict[str, Any], param: str) -> None:
    replica = Replica(ServeSettings(model="fake"), FakeEngine(), lambda path: ByteTokenizer())
    await replica.start()

    status, _, answer = await asgi_call(build_app(replica), "POST", "/v1/chat/completions", json.dumps(body).encode())

    error = json.loads(answer)["error"]
    assert status == 400
    assert error["param"] == param
    assert error["type"] == "BadRequestError"
    assert error["code"] == 400
    assert param.split("[")[0].split(".")[0] in error["message"]


async def test_completions_name_the_field(serve: Serve) -> None:
    server = await serve()
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt"),
        ({"prompt": ["a", [3]]}, "prompt"),
        ({"prompt": [258]}, "prompt"),
        ({"prompt": [[1], [999]]}, "prompt[1]"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": ["a"] * 5, "n": 64}, "n"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "best_of": 2, "n": 3}, "best_of"),
        ({"prompt": "a", "best_of": 3, "n": 1, "stream": True}, "best_of"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "prompt_embeds": "AAAA"}, "prompt_embeds"),
    ]

    for body, param in cases:
        status, answer, _ = await server.post("/v1/completions", body)
        assert (status, answer["error"]["param"]) == (400, param), body


async def test_bodies_that_are_no_json_objects(serve: Serve) -> None:
    server = await serve()

    for data in (b"", b"[]", b"{", b'{"messages": [}', b"\xff\xfe", b'"x"', b'{"messages": "\xff"}', b"{" * 100_000):
        async with server.http.post(f"{server.url}/v1/chat/completions", data=data) as response:
            assert response.status == 400, data[:20]
            assert (await response.json())["error"]["message"]


async def test_deep_nesting_is_refused(serve: Serve) -> None:
    server = await serve()
    body = b'{"messages": [{"role": "user", "content": "x"}], "metadata": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"

    async with server.http.post(f"{server.url}/v1/chat/completions", data=body) as response:
        assert response.status == 400
        assert "64" in (await response.json())["error"]["message"]


async def test_a_body_too_large_is_413_before_it_is_read(serve: Serve) -> None:
    server = await serve(max_body_bytes=2_048)

    status, answer, headers = await server.post(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 5_000}]}
    )
    assert (status, headers["connection"]) == (413, "close")
    assert answer["error"]["type"] == "RequestTooLargeError"

    async def chunked() -> Any:
        for _ in range(100):
            yield b" " * 1_000

    async with server.http.post(f"{server.url}/v1/chat/completions", data=chunked()) as response:
        assert response.status == 413


async def test_unknown_fields_are_ignored_and_counted(serve: Serve) -> None:
    server = await serve()

    status, _, _ = await server.post("/v1/chat/completions", {"messages": [USER], "something_new": 1, "user": "u"})
    async with server.http.get(f"{server.url}/metrics") as response:
        metrics = await response.text()

    assert status == 200
    assert "octavo_ignored_request_fields_total 1.0" in metrics


async def test_malformed_gateway_headers_are_named(serve: Serve) -> None:
    server = await serve()

    for header, value in (("x-octavo-priority", "high"), ("x-octavo-deadline-ms", "1e3"), ("x-request-id", "a b")):
        status, answer, _ = await server.post("/v1/chat/completions", {"messages": [USER]}, headers={header: value})
        assert status == 400
        assert answer["error"]["param"].lower() == header
