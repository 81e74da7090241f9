"""What OpenAI's own library renders as an answer, our parser reads as it does."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from octavo_server.parsers.answer import AnswerParser
from octavo_server.parsers.events import Call, Content, Event, Reasoning
from octavo_server.parsers.harmony import HarmonyParser

FOLDER = "TIKTOKEN_ENCODINGS_BASE"  # where the library looks for the vocabulary that it would fetch otherwise
NAMES = ("get_weather", "add")
TEXTS = ("Hello", "2 < 3?", "ü\n\n- a\n- b", "<|not a tag", "to=functions.add", " ")
BODIES = ("{}", '{"city": "Köln", "note": "}{"}', '{"a": [1, 2.5, null]}')


@pytest.fixture(scope="module")
def encoding() -> object:
    harmony = pytest.importorskip("openai_harmony", reason="the package openai-harmony is not installed")
    if not (Path(os.environ.get(FOLDER, "/nowhere")) / "o200k_base.tiktoken").is_file():
        pytest.skip(f"{FOLDER} names no folder with o200k_base.tiktoken")
    return harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


@pytest.mark.parametrize("seed", range(40))
def test_answers_of_the_reference_are_read_as_it_reads_them(encoding, seed: int) -> None:
    import openai_harmony as harmony

    chance = random.Random(seed)
    messages = []
    for _ in range(chance.randint(1, 4)):
        message = harmony.Message.from_role_and_content(harmony.Role.ASSISTANT, chance.choice(TEXTS))
        messages.append(message.with_channel(chance.choice(("analysis", "commentary", "final"))))
    if chance.random() < 0.5:
        call = harmony.Message.from_role_and_content(harmony.Role.ASSISTANT, chance.choice(BODIES))
        call = call.with_channel("commentary").with_recipient(f"functions.{chance.choice(NAMES)}")
        messages.append(call.with_content_type("<|constrain|>json"))
    tokens = encoding.render_conversation(harmony.Conversation.from_messages(messages))
    prompt = encoding.encode("<|start|>assistant", allowed_special="all")
    assert tokens[: len(prompt)] == prompt
    text = encoding.decode_utf8(tokens[len(prompt) :])

    read = encoding.parse_messages_from_completion_tokens(tokens[len(prompt) :], harmony.Role.ASSISTANT)

    events = AnswerParser(HarmonyParser(NAMES)).push(text, finished=True)
    assert told(events) == expected(read)


def told(events: list[Event]) -> tuple[str, str, list[tuple[str, object]]]:
    thoughts = "".join(event.text for event in events if isinstance(event, Reasoning))
    content = "".join(event.text for event in events if isinstance(event, Content))
    calls = [(event.name, json.loads(event.arguments)) for event in events if isinstance(event, Call)]
    return thoughts.replace("\n", ""), content.replace("\n", ""), calls


def expected(messages: list) -> tuple[str, str, list[tuple[str, object]]]:
    thoughts, content, calls = "", "", []
    for message in messages:
        text = "".join(part.text for part in message.content)
        if message.recipient:
            calls.append((message.recipient.removeprefix("functions."), json.loads(text)))
        elif message.channel == "analysis":
            thoughts += text
        else:
            content += text
    return thoughts.replace("\n", ""), content.replace("\n", ""), calls
