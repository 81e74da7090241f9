"""Tool calls, thoughts and structured output through the chat route, with the official client."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fakes.fake_engine import FakeEngine

Serve = Callable[..., Any]
MESSAGES: Any = [{"role": "user", "content": "Weather in Köln?"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def thinking_and_calling(_: str) -> str:
    return f"<think>\nI need the weather.\n</think>\n\nOne moment.\n{CALL}\n{CALL}"


async def test_a_call_is_told_apart_from_thoughts_and_text(serve: Serve) -> None:
    server = await serve(FakeEngine(reply=thinking_and_calling), tool_call_parser="hermes", reasoning_parser="think")

    answer = await server.openai.chat.completions.create(model="fake-model", messages=MESSAGES, tools=TOOLS)

    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "One moment.\n"
    assert choice.message.reasoning_content == "I need the weather."
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather", "get_weather"]
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Köln"}
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert answer.usage.completion_tokens_details.reasoning_tokens > 10


async def test_the_stream_shows_the_same(serve: Serve) -> None:
    server = await serve(FakeEngine(reply=thinking_and_calling), tool_call_parser="hermes", reasoning_parser="think")

    stream = await server.openai.chat.completions.create(
        model="fake-model", messages=MESSAGES, tools=TOOLS, stream=True
    )
    content, reasoning, calls, finish = "", "", {}, None
    async for chunk in stream:
        delta = chunk.choices[0].delta
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning", None) or ""
        for call in delta.tool_calls or []:
            entry = calls.setdefault(call.index, ["", ""])
            entry[0] += call.function.name or ""
            entry[1] += call.function.arguments or ""
        finish = chunk.choices[0].finish_reason or finish

    assert (content, reasoning, finish) == ("One moment.\n", "I need the weather.", "tool_calls")
    assert [name for name, _ in calls.values()] == ["get_weather", "get_weather"]
    assert all(json.loads(arguments) == {"city": "Köln"} for _, arguments in calls.values())


async def test_one_call_without_parallel_calls_and_none_without_tools(serve: Serve) -> None:
    server = await serve(FakeEngine(reply=lambda _: CALL + CALL), tool_call_parser="hermes")

    one = await server.openai.chat.completions.create(
        model="fake-model", messages=MESSAGES, tools=TOOLS, parallel_tool_calls=False
    )
    none = await server.openai.chat.completions.create(
        model="fake-model", messages=MESSAGES, tools=TOOLS, tool_choice="none"
    )

    assert len(one.choices[0].message.tool_calls) == 1
    assert one.choices[0].message.content is None
    assert none.choices[0].message.tool_calls is None
    assert none.choices[0].message.content == CALL + CALL
    assert none.choices[0].finish_reason == "stop"


async def test_thoughts_can_be_left_out(serve: Serve) -> None:
    server = await serve(FakeEngine(reply=lambda _: "<think>hm</think>yes"), reasoning_parser="think")

    answer = await server.openai.chat.completions.create(
        model="fake-model", messages=MESSAGES, extra_body={"include_reasoning": False}
    )

    assert answer.choices[0].message.content == "yes"
    assert "reasoning" not in answer.choices[0].message.model_dump(exclude_none=True)


async def test_constraints_reach_the_engine_from_every_field(serve: Serve) -> None:
    server = await serve()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"response_format": {"type": "json_object"}}, "json_object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}, "json_schema"),
        ({"structured_outputs": {"json": schema}}, "json_schema"),
        ({"structured_outputs": {"regex": "[0-9]+"}}, "regex"),
        ({"guided_choice": ["yes", "no"]}, "choice"),
        ({"guided_grammar": 'start: "x"'}, "grammar"),
    ]
    for fields, name in cases:
        await server.post("/v1/chat/completions", {"messages": MESSAGES, **fields})
        structured = list(server.engine.received.values())[-1].sampling.structured
        assert getattr(structured, name), fields


async def test_a_required_call_becomes_a_grammar(serve: Serve) -> None:
    server = await serve(FakeEngine(reply=lambda _: CALL), tool_call_parser="hermes")

    for choice in ("required", {"type": "function", "function": {"name": "get_time"}}):
        status, body, _ = await server.post(
            "/v1/chat/completions", {"messages": MESSAGES, "tools": TOOLS, "tool_choice": choice}
        )
        assert status == 200, body
    required, named = (received.sampling.structured.grammar for received in server.engine.received.values())
    assert '"get_weather"' in required
    assert '"get_time"' in required
    assert '"get_weather"' not in named

    status, body, _ = await server.post(
        "/v1/chat/completions",
        {"messages": MESSAGES, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
    )
    assert (status, body["error"]["param"]) == (400, "tool_choice")


async def test_earlier_calls_and_their_results_reach_the_template(serve: Serve) -> None:
    server = await serve(FakeEngine(reply=lambda prompt: prompt), tool_call_parser="hermes")
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'}}

    status, body, _ = await server.post(
        "/v1/chat/completions",
        {
            "messages": [
                *MESSAGES,
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "Rain"}]},
            ],
            "tools": TOOLS,
        },
    )

    assert status == 200
    assert body["choices"][0]["message"]["content"].endswith("<tool>Rain<assistant>")


ANALYSIS = "<|channel|>analysis<|message|>I need the weather.<|end|><|start|>assistant"
HARMONY_CALL = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Köln"}'


async def test_channels_become_thoughts_answers_and_calls(serve: Serve) -> None:
    final = f"{ANALYSIS}<|channel|>final<|message|>It rains."
    server = await serve(
        FakeEngine(reply=lambda prompt: final if "tools" not in prompt else ANALYSIS + HARMONY_CALL),
        reasoning_parser="harmony",
        tool_call_parser="harmony",
    )

    plain = await server.openai.chat.completions.create(model="fake-model", messages=MESSAGES)
    called = await server.openai.chat.completions.create(model="fake-model", messages=MESSAGES, tools=TOOLS)

    assert plain.choices[0].message.content == "It rains."
    assert plain.choices[0].message.reasoning_content == "I need the weather."
    assert plain.usage.completion_tokens_details.reasoning_tokens >= len("I need the weather.")
    (choice,) = called.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Köln"}
    assert not any(received.sampling.skip_special_tokens for received in server.engine.received.values())


async def test_gemma_is_asked_in_text(serve: Serve) -> None:
    fenced = "```tool_code\nget_weather(city='Köln')\n```"
    prompts: list[str] = []
    server = await serve(FakeEngine(reply=lambda prompt: prompts.append(prompt) or fenced), tool_call_parser="gemma")

    answer = await server.openai.chat.completions.create(model="fake-model", messages=MESSAGES, tools=TOOLS)

    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Köln"}
    assert '"name": "get_weather"' in prompts[-1].partition("<user>")[0]
