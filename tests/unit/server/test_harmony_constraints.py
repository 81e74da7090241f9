"""A call that a request demands of gpt-oss is one its parser reads, tags and all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fakes.byte_tokenizer import EOS, ByteTokenizer
from octavo_engine.structured.grammar import GrammarCompiler
from octavo_server.openai.constraints import tool_choice_constraint
from octavo_server.parsers.events import Call
from octavo_server.parsers.harmony import CALL_END, CONSTRAIN, MESSAGE, HarmonyParser

TAGS = (CONSTRAIN, MESSAGE, CALL_END)
FIRST_TAG = ByteTokenizer.vocab_size
ADD = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOLS: list[dict[str, Any]] = [{"function": {"name": "add", "parameters": ADD}}, {"function": {"name": "now"}}]


class TaggedTokenizer(ByteTokenizer):
    """Bytes, and the tags as special tokens."""

    vocab_size = FIRST_TAG + len(TAGS)
    special_token_ids = frozenset(range(256, vocab_size))

    def token_bytes(self, token_id: int) -> bytes:
        return TAGS[token_id - FIRST_TAG].encode() if token_id >= FIRST_TAG else super().token_bytes(token_id)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text with tags."""
        ids = list(text.encode())
        for position, tag in enumerate(TAGS):
            needle = list(tag.encode())
            while (at := _find(ids, needle)) >= 0:
                ids[at : at + len(needle)] = [FIRST_TAG + position]
        return ids


def _find(ids: list[int], needle: list[int]) -> int:
    return next((at for at in range(len(ids)) if ids[at : at + len(needle)] == needle), -1)


@pytest.mark.parametrize(
    ("choice", "opening", "written"),
    [
        ("required", "<|channel|>commentary to=functions.", 'add <|constrain|>json<|message|>{"a": 1}<|call|>'),
        (
            {"type": "function", "function": {"name": "add"}},
            "<|channel|>commentary to=functions.add <|constrain|>json<|message|>",
            '{"a": 1}<|call|>',
        ),
    ],
)
def test_the_demanded_call_is_allowed_and_read(choice: Any, opening: str, written: str) -> None:
    constraint = tool_choice_constraint(choice, TOOLS, HarmonyParser)
    assert constraint is not None
    tokenizer = TaggedTokenizer()
    grammar = GrammarCompiler(tokenizer, tokenizer.vocab_size, frozenset({EOS, tokenizer.vocab_size - 1})).compile(
        constraint.structured
    )

    for token in tokenizer.ids(written):
        row = torch.zeros(tokenizer.vocab_size)
        grammar.mask(row)
        assert row[token] == 0
        assert row[ord("~")] < 0  # something is refused everywhere
        grammar.accept(token)

    assert grammar.is_complete
    assert constraint.harmony_opening == opening
    assert HarmonyParser(("add", "now"), opening).push(written, finished=True) == [Call("add", '{"a": 1}')]
