"""Reasoning and tool calls: the same result for any chunking, and no text lost."""

from __future__ import annotations

import itertools
import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_server.parsers.answer import AnswerParser
from octavo_server.parsers.choose import (
    TOOL_PARSERS,
    prompt_opens_thoughts,
    speaks_harmony,
    thinks,
    tool_parser_for,
)
from octavo_server.parsers.events import Call, Content, Event, Reasoning
from octavo_server.parsers.gemma import GemmaParser
from octavo_server.parsers.harmony import HarmonyParser
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


ANALYSIS = "<|channel|>analysis<|message|>The user wants 2 < 3.<|end|><|start|>assistant"
HARMONY_CALL = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Köln"}<|call|>'


def harmony(text: str, opened: str = "") -> tuple[str, str, list[Call]]:
    return parsed(AnswerParser(HarmonyParser(NAMES, opened)), [text])


def test_harmony_channels_are_thoughts_and_answer() -> None:
    answer = harmony(f"{ANALYSIS}<|channel|>final<|message|>Yes.\nIt is.<|return|>")

    assert answer == ("The user wants 2 < 3.", "Yes.\nIt is.", [])


@pytest.mark.parametrize(
    "call",
    [
        HARMONY_CALL,
        HARMONY_CALL.removesuffix("<|call|>"),
        '<|channel|>commentary to=functions.get_weather<|message|>{"city": "Köln"}<|call|>',
        ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Köln"}<|call|>',
        ' to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>{"city": "Köln"}<|call|>',
    ],
)
def test_harmony_calls_name_their_function_before_or_behind_the_channel(call: str) -> None:
    remark = "<|channel|>commentary<|message|>One moment.<|end|><|start|>assistant"

    thoughts, content, calls = harmony(ANALYSIS + remark + call)

    assert (thoughts, content) == ("The user wants 2 < 3.", "One moment.")
    assert calls == [Call("get_weather", '{"city": "Köln"}')]


def test_harmony_goes_on_from_what_the_prompt_holds() -> None:
    opened = "<|channel|>commentary to=functions.add <|constrain|>json<|message|>"

    assert harmony("{}<|call|>", opened) == ("", "", [Call("add", "{}")])
    assert harmony('{"a": 1}', "<|channel|>final<|message|>") == ("", '{"a": 1}', [])
    assert harmony(" world", "<|channel|>final<|message|>Hello") == ("", " world", [])


@pytest.mark.parametrize(
    "text",
    [
        "plain text without channels",
        "to=functions.add is how\nit is written",
        "<|channel|>fin",
        '<|channel|>commentary to=functions.other<|message|>{"a": 1}',
        '<|channel|>commentary to=functions.add<|message|>{"a": 1',
        "<|channel|>commentary to=browser.search<|message|>{}",
        "to=" + 300 * "x" + "<|message|>",
    ],
)
def test_what_is_no_message_of_harmony_stays_text(text: str) -> None:
    assert harmony(text) == ("", text, [])


def test_harmony_thoughts_are_counted_while_they_last() -> None:
    parser = HarmonyParser(NAMES)
    seen = []
    for chunk in (
        "<|channel|>analysis",
        "<|message|>",
        "hm",
        "<|end|>",
        "<|start|>assistant<|channel|>final<|message|>",
    ):
        parser.push(chunk, finished=False)
        seen.append(parser.thinking)

    assert seen == [False, True, True, False, False]


def test_harmony_messages_of_one_kind_are_lines() -> None:
    text = f"{ANALYSIS}<|channel|>analysis<|message|>So yes.<|end|><|start|>assistant<|channel|>final<|message|>Yes"

    assert harmony(text) == ("The user wants 2 < 3.\nSo yes.", "Yes", [])


GEMMA_JSON = '{"name": "get_weather", "parameters": {"city": "Köln", "days": [1, 2]}}'
GEMMA_PYTHON = "get_weather(city='Köln', days=[1, 2])"


@pytest.mark.parametrize(
    "text",
    [
        GEMMA_JSON,
        f"\n{GEMMA_JSON}\n",
        f"[{GEMMA_JSON}]",
        f"```json\n{GEMMA_JSON}\n```",
        f"```tool_call\n{GEMMA_JSON}\n```\n",
        f"```tool_code\n{GEMMA_PYTHON}\n```",
        f"```tool_code\nprint({GEMMA_PYTHON})\n```",
        f"```tool_code \nresult = {GEMMA_PYTHON}",
        f"[{GEMMA_PYTHON}]",
    ],
)
def test_gemma_calls_in_each_of_its_forms(text: str) -> None:
    _, content, calls = parsed(AnswerParser(None, GemmaParser(NAMES)), [text])

    assert content == ""
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        ("get_weather", {"city": "Köln", "days": [1, 2]})
    ]


def test_gemma_several_calls_and_text_around_a_fence() -> None:
    fenced = f"Let me see.\n```tool_code\n{GEMMA_PYTHON}\nadd(a=-1)\n```\nDone."
    lines = f"{GEMMA_JSON}\n{ADD}"

    _, content, calls = parsed(AnswerParser(None, GemmaParser(NAMES)), [fenced])
    assert (content, [call.name for call in calls]) == ("Let me see.\nDone.", ["get_weather", "add"])
    assert [call.name for call in parsed(AnswerParser(None, GemmaParser(NAMES)), [lines])[2]] == ["get_weather", "add"]


@pytest.mark.parametrize(
    "text",
    [
        "Hello there, add(a=1)",
        "```python\nadd(a=1)\n```",
        "```tool_code\nadd(1)\n```",
        "```tool_code\nadd(a=b)\n```",
        "```tool_code\nother(a=1)\n```",
        "```tool_code\nadd(a=1)\nimport os\n```",
        "```tool_code\nadd(**{'a': 1})\n```",
        f"```tool_code\n{'print(' * 200}{')' * 200}\n```",
        f"```tool_code\nadd(a={'[' * 5_000}{']' * 5_000})\n```",
        '```json\n{"a": 1}\n```',
        "[1, 2]",
        "[add(a=1), 2]",
        "``",
        "```tool_cod",
    ],
)
def test_what_is_no_call_of_gemma_stays_text(text: str) -> None:
    assert parsed(AnswerParser(None, GemmaParser(NAMES)), [text]) == ("", text, [])


def test_only_one_call_when_parallel_calls_are_off() -> None:
    text = f"<tool_call>{ADD}</tool_call><tool_call>{ADD}</tool_call>"

    assert len(parsed(AnswerParser(None, HermesParser(NAMES), max_calls=1), [text])[2]) == 1


PIECES = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "\n", " ", "text", "{", "}", '"', "\\", "<", WEATHER, ADD,
    ";", "<|python_tag|>", "ü", "[", "]", ",", "[TOOL_CALLS]", "<|tool_call|>", "<|/tool_call|>",
    "<|start|>assistant", "<|channel|>analysis", "<|channel|>commentary to=functions.add ", "<|channel|>final",
    "<|constrain|>json", "<|message|>", "<|end|>", "<|call|>", "<|return|>", " to=functions.get_weather", "{}",
    "```", "```tool_code\n", "```json\n", "`", "add(a=1)", "[get_weather(city='x')]", "print(add(a=1))",
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    st.lists(st.integers(0, 400), max_size=12),
    st.sampled_from(sorted(TOOL_PARSERS)),
    st.booleans(),
)
def test_streamed_equals_whole_for_any_chunking(text: str, cuts: list[int], tools: str, starts: bool) -> None:
    assert_streamed_equals_whole(text, cuts, tools, starts)


@pytest.mark.parametrize("count", [20, pytest.param(1_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_each_of_many_outputs_is_the_same_in_fifty_chunkings(count: int) -> None:
    rng = Random(count)
    for number in range(count):
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 12)))
        for tools in sorted(TOOL_PARSERS):
            for _ in range(50):
                cuts = [rng.randint(0, len(text)) for _ in range(rng.randint(0, len(text)))]
                assert_streamed_equals_whole(text, cuts, tools, number % 2 == 0)


def assert_streamed_equals_whole(text: str, cuts: list[int], tools: str, starts: bool) -> None:
    def parser() -> AnswerParser:
        if tools == "harmony":
            return AnswerParser(HarmonyParser(NAMES, "<|channel|>final<|message|>" if starts else ""))
        return AnswerParser(ThinkParser(starts_thinking=starts), TOOL_PARSERS[tools](NAMES))

    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = [text[a:b] for a, b in itertools.pairwise(bounds)]

    assert parsed(parser(), chunks) == parsed(parser(), [text])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
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
    gemma = "<start_of_turn>{{ role }}"
    assert tool_parser_for("auto", gemma) is GemmaParser
    assert tool_parser_for("auto", gemma + "System role not supported") is None
    gpt_oss = "{% if tools %}<|start|>assistant<|channel|>final<|message|>"
    assert tool_parser_for("auto", gpt_oss) is HarmonyParser
    assert speaks_harmony("auto", "auto", gpt_oss)
    assert speaks_harmony("none", "harmony", None)
    assert not speaks_harmony("none", "none", gpt_oss)
    assert not speaks_harmony("auto", "auto", qwen)
    assert tool_parser_for("none", qwen) is None
    assert thinks("auto", qwen)
    assert not thinks("auto", llama)
    assert not thinks("none", qwen)
