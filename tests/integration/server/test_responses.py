"""`/v1/responses` over a real socket, with the official client."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from fakes.fake_engine import FakeEngine

Serve = Callable[..., Any]
TOOLS: Any = [{"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}]
ANSWER = '<think>hm</think>Sure.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


async def test_a_text_is_answered_with_a_message(serve: Serve) -> None:
    server = await serve(FakeEngine(reply=lambda prompt: prompt))

    response = await server.openai.responses.create(model="fake-model", input="Hi", instructions="Be brief")

    assert response.output_text == "<system>Be brief<user>Hi<assistant>"
    assert response.status == "completed"
    assert response.id.startswith("resp-")
    assert response.usage.input_tokens == len("<system>Be brief<user>Hi<assistant>")
    assert response.usage.input_tokens_details.cached_tokens == 32


async def test_thoughts_text_and_calls_are_items_of_their_own(serve: Serve) -> None:
    server = await serve(FakeEngine(reply=lambda _: ANSWER), tool_call_parser="hermes", reasoning_parser="think")

    response = await server.openai.responses.create(model="fake-model", input="1+1?", tools=TOOLS)

    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    assert response.output[0].content[0].text == "hm"
    assert json.loads(response.output[2].arguments) == {"a": 1}


async def test_the_stream_builds_the_same_items(serve: Serve) -> None:
    server = await serve(FakeEngine(reply=lambda _: ANSWER), tool_call_parser="hermes", reasoning_parser="think")

    text, arguments, kinds, numbers, final = "", "", [], [], None
    async with server.openai.responses.stream(model="fake-model", input="1+1?", tools=TOOLS) as stream:
        async for event in stream:
            kinds.append(event.type)
            numbers.append(event.sequence_number)
            if event.type == "response.output_text.delta":
                text += event.delta
            elif event.type == "response.function_call_arguments.done":
                arguments = event.arguments
        final = await stream.get_final_response()

    assert text == "Sure."
    assert json.loads(arguments) == {"a": 1}
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3
    assert numbers == list(range(len(numbers)))
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]


async def test_an_answer_cut_short_is_incomplete(serve: Serve) -> None:
    server = await serve()

    response = await server.openai.responses.create(model="fake-model", input="Hi", max_output_tokens=5)

    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == "Hello"


async def test_a_conversation_with_calls_reaches_the_template(serve: Serve) -> None:
    server = await serve(FakeEngine(reply=lambda prompt: prompt), tool_call_parser="hermes")

    response = await server.openai.responses.create(
        model="fake-model",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "1+1?"}]},
            {"type": "reasoning", "id": "r", "summary": []},
            {"type": "function_call", "call_id": "c", "name": "add", "arguments": '{"a": 1}'},
            {"type": "function_call_output", "call_id": "c", "output": "2"},
        ],
        tools=TOOLS,
    )

    assert response.output_text.endswith("<user>1+1?<assistant><tool>2<assistant>")


async def test_formats_reach_the_engine(serve: Serve) -> None:
    server = await serve()

    await server.openai.responses.create(
        model="fake-model",
        input="Hi",
        text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
    )

    assert next(iter(server.engine.received.values())).sampling.structured.json_schema == '{"type":"object"}'


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": [{"type": "image"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"background": True}, "background"),
    ],
)
async def test_what_is_not_offered_is_refused_by_name(serve: Serve, fields: dict[str, Any], param: str) -> None:
    server = await serve()

    with pytest.raises(openai.BadRequestError) as caught:
        await server.openai.responses.create(**{"model": "fake-model", "input": "Hi", **fields})

    assert caught.value.param == param


async def test_a_failure_under_way_is_an_event(serve: Serve) -> None:
    server = await serve(FakeEngine(fail_after=3))

    stream = await server.openai.responses.create(model="fake-model", input="Hi", stream=True)
    events = [event async for event in stream]

    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"
