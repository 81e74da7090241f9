"""`/v1/completions` over a real socket."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from typing import Any

from fakes.byte_tokenizer import BOS
from fakes.fake_engine import FakeEngine

Serve = Callable[..., Any]


async def test_continues_one_prompt_with_sixteen_tokens_by_default(serve: Serve) -> None:
    server = await serve()

    answer = await server.openai.completions.create(model="fake-model", prompt="Once")

    assert answer.choices[0].text == "Hello from the f"
    assert answer.choices[0].finish_reason == "length"
    assert answer.id.startswith("cmpl-")


async def test_several_prompts_times_n_come_back_in_order(serve: Serve) -> None:
    server = await serve(FakeEngine(reply=lambda prompt: prompt.upper()))

    answer = await server.openai.completions.create(model="fake-model", prompt=["ab", "cd"], n=2)

    assert [(c.index, c.text) for c in answer.choices] == [(0, "AB"), (1, "AB"), (2, "CD"), (3, "CD")]
    assert answer.usage.prompt_tokens == 6  # each prompt once, with its beginning token


async def test_token_ids_are_prompts_too(serve: Serve) -> None:
    server = await serve(FakeEngine(reply=lambda prompt: prompt))

    one = await server.openai.completions.create(model="fake-model", prompt=[BOS, 104, 105])
    two = await server.openai.completions.create(model="fake-model", prompt=[[104], [105]])

    assert one.choices[0].text == "hi"
    assert [choice.text for choice in two.choices] == ["h", "i"]


async def test_echo_repeats_the_prompt_whole_and_streamed(serve: Serve) -> None:
    server = await serve()

    whole = await server.openai.completions.create(model="fake-model", prompt="Say: ", echo=True, max_tokens=5)
    stream = await server.openai.completions.create(
        model="fake-model", prompt="Say: ", echo=True, max_tokens=5, stream=True
    )
    streamed = "".join([chunk.choices[0].text async for chunk in stream])

    assert whole.choices[0].text == streamed == "Say: Hello"


async def test_echo_with_logprobs_scores_the_prompt_alone(serve: Serve) -> None:
    server = await serve()

    answer = await server.openai.completions.create(
        model="fake-model", prompt=[72, 105], echo=True, max_tokens=0, logprobs=1
    )

    choice = answer.choices[0]
    assert choice.text == "Hi"
    assert choice.logprobs.tokens == ["H", "i"]
    assert choice.logprobs.token_logprobs == [None, -0.25]
    assert choice.logprobs.text_offset == [0, 1]


async def test_logprobs_are_parallel_lists(serve: Serve) -> None:
    server = await serve()

    answer = await server.openai.completions.create(model="fake-model", prompt="x", logprobs=2, max_tokens=4)

    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == list("Hell")
    assert logprobs.token_logprobs == [-0.25] * 4
    assert logprobs.text_offset == [0, 1, 2, 3]
    assert logprobs.top_logprobs[0] == {"H": -0.25, "A": -67.0}


async def test_best_of_returns_the_n_best(serve: Serve) -> None:
    server = await serve()

    answer = await server.openai.completions.create(model="fake-model", prompt="x", n=1, best_of=3)

    assert len(answer.choices) == 1
    assert len(server.engine.received) == 3


async def test_streams_of_several_prompts_carry_their_index(serve: Serve) -> None:
    server = await serve(FakeEngine(reply=lambda prompt: prompt * 3))

    stream = await server.openai.completions.create(
        model="fake-model", prompt=["a", "b"], stream=True, stream_options={"include_usage": True}
    )
    texts = {0: "", 1: ""}
    usage = None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text

    assert texts == {0: "aaa", 1: "bbb"}
    assert usage.completion_tokens == 8


async def test_token_ids_are_returned_when_asked_for(serve: Serve) -> None:
    server = await serve()

    _, body, _ = await server.post(
        "/v1/completions", {"prompt": "x", "max_tokens": 2, "return_token_ids": True, "add_special_tokens": False}
    )

    assert body["choices"][0]["token_ids"] == [72, 101]
    assert body["choices"][0]["prompt_token_ids"] == [120]


async def test_a_long_prompt_is_truncated_from_the_left_when_asked_for(serve: Serve) -> None:
    server = await serve(FakeEngine(reply=lambda prompt: prompt))

    answer = await server.openai.completions.create(
        model="fake-model", prompt="abcdef", extra_body={"truncate_prompt_tokens": 2}
    )

    assert answer.choices[0].text == "ef"


async def test_beam_search_gives_the_best_beams_whole(serve: Serve) -> None:
    server = await serve(FakeEngine(reply=lambda prompt: "Upon a time"[len(prompt) - len("Once") :]))

    answer = await server.openai.completions.create(
        model="fake-model", prompt="Once", n=2, max_tokens=20, extra_body={"use_beam_search": True}
    )

    assert answer.choices[0].text == "Upon a time"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[1].text != answer.choices[0].text


async def test_a_routers_names_for_a_prompt_reach_the_engine_with_its_one_prompt(serve: Serve) -> None:
    server = await serve(FakeEngine(reply=lambda prompt: prompt))
    named = {"x-octavo-prefix": "40/16;" + base64.b64encode(struct.pack("<2Q", 7, 8)).decode()}

    await server.post("/v1/completions", {"prompt": [BOS, *range(65, 84)], "n": 2}, headers=named)
    await server.post("/v1/completions", {"prompt": ["ab", "cd"]}, headers=named)
    status, refusal, _ = await server.post("/v1/completions", {"prompt": "a"}, headers={"x-octavo-prefix": "x"})

    told = [list(received.prefix_labels) for received in server.engine.received.values()]
    assert told == [[(8, 7), (16, 8)], [], [], []]
    assert status == 400
    assert "x-octavo-prefix" in refusal["error"]["message"]
