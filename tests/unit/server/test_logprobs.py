"""Log-probabilities in OpenAI's shapes."""

from __future__ import annotations

import math

from fakes.byte_tokenizer import ByteTokenizer
from octavo_engine.messages import TokenLogprobs
from octavo_server.openai.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs

ENTRY = TokenLogprobs(token_id=72, logprob=-math.inf, rank=3, top=[(65, -0.5), (66, -1.5)])


def test_infinity_becomes_a_number_json_can_carry() -> None:
    assert chat_logprobs([ENTRY], ByteTokenizer(), 2).content[0].logprob == -9999.0


def test_a_token_that_is_part_of_a_character_shows_its_bytes() -> None:
    entry = TokenLogprobs(token_id=0xE6, logprob=-1.0, rank=1)

    content = chat_logprobs([entry], ByteTokenizer(), 0).content[0]

    assert content.bytes == [0xE6]
    assert content.token == "bytes:\\xe6"


def test_the_chosen_token_is_always_among_the_alternatives() -> None:
    logprobs = completion_logprobs([ENTRY], [72], ByteTokenizer(), 2)

    assert logprobs.top_logprobs == [{"A": -0.5, "B": -1.5, "H": -9999.0}]


def test_tokens_can_be_shown_as_ids() -> None:
    assert completion_logprobs([ENTRY], [72], ByteTokenizer(), 0, as_ids=True).tokens == ["token_id:72"]


def test_prompt_logprobs_carry_rank_and_text() -> None:
    first, second = prompt_logprobs([None, ENTRY], ByteTokenizer(), 1)

    assert first is None
    assert second == {
        "65": {"logprob": -0.5, "rank": 1, "decoded_token": "A"},
        "72": {"logprob": -9999.0, "rank": 3, "decoded_token": "H"},
    }
