"""Reasoning and tool calls: the same result for any chunking, and no text lost."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_server.parsers.answer import AnswerParser
from octavo_server.parsers.choose import TOOL_PARSERS, prompt_opens_thoughts, thinks, tool_parser_for
from octavo_server.parsers.events import Call, Content, Event, Reasoning
from octavo_server.parsers.json_list import JsonListParser
from octavo_server.parsers.reasoning import ThinkParser
from octavo_server.parsers.tool_calls import HermesParser, Llama3JsonParser

NAMES = {"get_weather", "add"}
WEATHER = '{"name": "get_weather", "arguments": {"city": "Köln", "note": "}{ </tool_call> \\" ["}}'
ADD = '{"name": "add", "parameters": {"a": 1, "b": [2, {"c": 3}]}}'


def parsed(parser: AnswerParser, chunks: list[str]) -> tuple[str, str, list[Call]]:
    """(reasoning, content, calls)."""
    events: list[Event] = []
    for position, chunk in enumerate(chunks):
        events += parser.push(chunk, position == len(chunks) - 1)
    return (
        "".join(e.text for e in events if isinstance(e, Reasoning)),
        "".join(e.text for e in events if isinstance(e, Content)),
        [e for e in events if isinstance(e, Call)],
    )


def test_thoughts_are_split_from_the_answer() -> None:
    text = "<think>\nFirst, 2 < 3.\n</think>\n\nIt is 3."

    assert parsed(AnswerParser(ThinkParser(starts_thinking=False)), [text]) == ("First, 2 < 3.", "It is 3.", [])


def test_thoughts_may_begin_in_the_prompt() -> None:
    assert prompt_opens_thoughts("<|im_start|>assistant\n<think>\n")

    answer = parsed(AnswerParser(ThinkParser(starts_thinking=True)), ["hm", "m</thi", "nk>yes"])

    assert answer == ("hmm", "yes", [])


def test_an_answer_without_thoughts_is_left_alone() -> None:
    text = "  <thinking> is a word, <think> later is text"

    assert parsed(AnswerParser(ThinkParser(starts_thinking=False)), [text]) == ("", text, [])


def test_thoughts_cut_off_are_thoughts() -> None:
    assert parsed(AnswerParser(ThinkParser(starts_thinking=True)), ["still th", "inking </th"]) == (
        "still thinking </th",
        "",
        [],
    )


def test_hermes_calls_with_text_around_them() -> None:
    text = f"Let me look.\n<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>{ADD}</tool_call>"

    _, content, calls = parsed(AnswerParser(None, HermesParser(NAMES)), [text])

    assert content == "Let me look.\n"
    assert [call.name for call in calls] == ["get_weather", "add"]
    assert json.loads(calls[0].arguments) == {"city": "Köln", "note": '}{ </tool_call> " ['}
    assert json.loads(calls[1].arguments) == {"a": 1, "b": [2, {"c": 3}]}


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nnot json</tool_call>",
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": 1',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        "<tool_call",
        "a < b and <tool_",
        "<tool_call>{test1,test2</tool_call>",
        "<tool_call><tool_call>",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert parsed(AnswerParser(None, HermesParser(NAMES)), [text]) == ("", text, [])


def test_a_call_after_a_broken_one_is_found() -> None:
    text = f"<tool_call><tool_call>{ADD}</tool_call>"

    _, content, calls = parsed(AnswerParser(None, HermesParser(NAMES)), [text])

    assert (content, len(calls)) == ("<tool_call>", 1)


def test_llama_calls_are_the_whole_answer() -> None:
    for prefix in ("", "<|python_tag|>", "\n"):
        _, content, calls = parsed(AnswerParser(None, Llama3JsonParser(NAMES)), [f"{prefix}{ADD}; {WEATHER}"])
        assert content == ""
        assert [call.name for call in calls] == ["add", "get_weather"]


@pytest.mark.parametrize("text", ["Hello { there }", '{"a": 1}', '{"name": "other", "parameters": {}}', "<|py", "{"])
def test_llama_text_stays_text(text: str) -> None:
    assert parsed(AnswerParser(None, Llama3JsonParser(NAMES)), [text]) == ("", text, [])


LISTED = '{"name": "add", "arguments": {"a": 1}}'


@pytest.mark.parametrize(
    "text",
    [
        f"[{WEATHER}, {LISTED}]",
        f" [TOOL_CALLS] [{WEATHER},{LISTED}]\n",
        f"<|tool_call|>[{WEATHER}, {LISTED}]<|/tool_call|>",
    ],
)
def test_lists_of_calls_are_the_whole_answer(text: str) -> None:
    _, content, calls = parsed(AnswerParser(None, JsonListParser(NAMES)), [text])

    assert content == ""
    assert [call.name for call in calls] == ["get_weather", "add"]
    assert json.loads(calls[0].arguments)["city"] == "Köln"


@pytest.mark.parametrize(
    "text",
    ["[1, 2, 3]", "[", "[TOOL", "[TOOL_CALLS]", "[TOOL_CALLS] none", "Hello [there]", '[{"name": "other"}]', "  ", "[]",
     '[{"name": "add", "arguments": {"a"'],
)  # fmt: skip
def test_what_is_no_list_of_calls_stays_text(text: str) -> None:
    assert parsed(AnswerParser(None, JsonListParser(NAMES)), [text]) == ("", text, [])


def test_what_follows_a_list_or_breaks_it_is_text() -> None:
    after = parsed(AnswerParser(None, JsonListParser(NAMES)), [f"[{LISTED}] And so on."])
    broken = parsed(AnswerParser(None, JsonListParser(NAMES)), [f'[{LISTED}, {{"name": "evil"}}]'])

    assert (after[1], len(after[2])) == ("And so on.", 1)
    assert (broken[1], len(broken[2])) == (', {"name": "evil"}]', 1)


def test_only_one_call_when_parallel_calls_are_off() -> None:
    text = f"<tool_call>{ADD}</tool_call><tool_call>{ADD}</tool_call>"

    assert len(parsed(AnswerParser(None, HermesParser(NAMES), max_calls=1), [text])[2]) == 1


PIECES = st.sampled_from([
    "<think>", "</think>", "<tool_call>", "</tool_call>", "\n", " ", "text", "{", "}", '"', "\\", "<", WEATHER, ADD,
    ";", "<|python_tag|>", "ü", "[", "]", ",", "[TOOL_CALLS]", "<|tool_call|>", "<|/tool_call|>",
])  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.lists(PIECES, max_size=8).map("".join),
    st.lists(st.integers(0, 400), max_size=12),
    st.sampled_from(sorted(TOOL_PARSERS)),
    st.booleans(),
)
def test_streamed_equals_whole_for_any_chunking(text: str, cuts: list[int], tools: str, starts: bool) -> None:
    def parser() -> AnswerParser:
        return AnswerParser(ThinkParser(starts_thinking=starts), TOOL_PARSERS[tools](NAMES))

    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = [text[a:b] for a, b in itertools.pairwise(bounds)]

    assert parsed(parser(), chunks) == parsed(parser(), [text])


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES, max_size=8).map("".join))
def test_every_call_is_a_known_tool_with_an_object_as_arguments(text: str) -> None:
    for factory in TOOL_PARSERS.values():
        for call in parsed(AnswerParser(None, factory(NAMES)), [text])[2]:
            assert call.name in NAMES
            assert isinstance(json.loads(call.arguments), dict)


def test_parsers_are_read_off_the_template() -> None:
    qwen = "{% if tools %}<tool_call>{% endif %}<think>"
    llama = 'Environment: ipython {% if tools %}{"name": .., "parameters": ..}{% endif %}'

    assert tool_parser_for("auto", qwen) is HermesParser
    assert tool_parser_for("auto", llama) is Llama3JsonParser
    assert tool_parser_for("auto", "{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]") is JsonListParser
    assert tool_parser_for("auto", "{{ tools }}<|tool_call|>") is JsonListParser
    assert tool_parser_for("auto", "no such thing") is None
    assert tool_parser_for("none", qwen) is None
    assert thinks("auto", qwen)
    assert not thinks("auto", llama)
    assert not thinks("none", qwen)
