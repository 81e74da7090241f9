"""Conversations with tools reach the templates of gpt-oss and Gemma 3 in the shape they take."""

from __future__ import annotations

import json
from typing import Any

from octavo_engine.tokenizer.chat_template import ChatTemplates
from octavo_server.openai.family_messages import described, for_gemma, for_harmony
from octavo_server.parsers.gemma import GemmaParser
from octavo_server.parsers.harmony import HarmonyParser

HARMONY = """{%- set last = namespace(name=none) -%}
{%- for m in messages -%}
{%- if m.tool_calls is defined -%}
{%- if m.content and m.thinking %}{{ raise_exception("content and thinking beside calls") }}{% endif -%}
{%- if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif -%}
{%- set f = m.tool_calls[0].function -%}
<|start|>assistant to=functions.{{ f.name }}<|channel|>commentary json<|message|>{{ f.arguments | tojson }}<|call|>
{%- set last.name = f.name -%}
{%- elif m.role == "tool" -%}
{%- if last.name is none %}{{ raise_exception("a result without a call") }}{% endif -%}
<|start|>functions.{{ last.name }} to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>
{%- else -%}
<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- for tool in tools or [] %}{{ "// " + tool.function.description }}{% endfor -%}
<|start|>assistant"""


def call(call_id: str, name: str, **arguments: object) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def rendered(template: str, messages: list[dict[str, Any]], tools: Any = None) -> str:
    return ChatTemplates({"default": template}).render(
        messages,
        tools=tools,
        chat_template=None,
        add_generation_prompt=True,
        continue_final_message=False,
        variables={},
    )


CALLS = [
    {"role": "user", "content": "Weather in Köln and Bonn?"},
    {
        "role": "assistant",
        "content": "One moment.",
        "reasoning_content": "Two calls.",
        "tool_calls": [call("1", "weather", city="Köln"), call("2", "climate", city="Bonn")],
    },
    {"role": "tool", "content": "sun", "tool_call_id": "1"},
    {"role": "tool", "content": "rain", "tool_call_id": "2"},
]


def test_each_result_follows_its_call_in_the_template_of_gpt_oss() -> None:
    text = rendered(HARMONY, for_harmony(CALLS))

    assert text == (
        "<|start|>user<|message|>Weather in Köln and Bonn?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Two calls.\nOne moment.<|end|>"
        '<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"city": "Köln"}<|call|>'
        '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"sun"<|end|>'
        '<|start|>assistant to=functions.climate<|channel|>commentary json<|message|>{"city": "Bonn"}<|call|>'
        '<|start|>functions.climate to=assistant<|channel|>commentary<|message|>"rain"<|end|>'
        "<|start|>assistant"
    )


def test_what_is_rendered_of_a_call_is_read_back() -> None:
    turn = rendered(HARMONY, for_harmony(CALLS[1:2])).removeprefix("<|start|>assistant")
    parser = HarmonyParser(("weather", "climate"))

    events = parser.push(turn.removesuffix("<|start|>assistant"), finished=True)

    assert [event.name for event in events if hasattr(event, "name")] == ["weather", "climate"]


def test_results_without_a_call_stay_where_they_are() -> None:
    stray = {"role": "tool", "content": "x", "tool_call_id": "9"}

    shaped = for_harmony([stray, *CALLS[:2], CALLS[3], stray | {"tool_call_id": "8"}])

    assert [message["content"] for message in shaped if message["role"] == "tool"] == ["x", "rain", "x"]
    assert [message["role"] for message in shaped] == ["tool", "user", "assistant", "assistant", "tool", "tool"]


def test_functions_without_a_description_are_rendered() -> None:
    tools = described([{"type": "function", "function": {"name": "now"}}])

    assert rendered(HARMONY, [], tools).startswith("// <|start|>")


def test_gemma_is_told_of_functions_in_text_and_roles_alternate() -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]

    shaped = for_gemma([{"role": "system", "content": "Be brief."}, *CALLS], tools)

    assert [message["role"] for message in shaped] == ["system", "user", "assistant", "user"]
    assert shaped[0]["content"].startswith("Be brief.")
    assert json.dumps(tools[0]["function"]) in shaped[0]["content"]
    assert shaped[3]["content"] == "```tool_output\nsun\n```\n\n```tool_output\nrain\n```"
    assert all(set(message) == {"role", "content"} for message in shaped)


def test_what_gemma_is_shown_of_its_calls_is_what_its_parser_reads() -> None:
    shaped = for_gemma([{**CALLS[1], "content": ""}], [])

    events = GemmaParser(("weather", "climate")).push(shaped[0]["content"], finished=True)

    assert [(event.name, json.loads(event.arguments)) for event in events] == [
        ("weather", {"city": "Köln"}),
        ("climate", {"city": "Bonn"}),
    ]


def test_gemma_without_tools_is_told_of_none() -> None:
    assert for_gemma(CALLS[:1], []) == CALLS[:1]
    assert for_gemma(CALLS[:1], [{"function": {"name": "f"}}])[0]["role"] == "system"
