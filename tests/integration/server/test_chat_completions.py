"""`/v1/chat/completions` over a real socket, with the official client."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from fakes.fake_engine import MODEL_NAME, FakeEngine

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
Serve = Callable[..., Any]


async def test_answers_whole(serve: Serve) -> None:
    server = await serve(FakeEngine(reply=lambda prompt: f"You said {prompt}"))

    answer = await server.openai.chat.completions.create(model="fake-model", messages=MESSAGES)

    assert answer.choices[0].message.content == "You said <user>Hi<assistant>"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.usage.prompt_tokens == len("<user>Hi<assistant>")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 16


async def test_streamed_text_equals_whole_text(serve: Serve) -> None:
    text = "Grüße aus 東京 🎉 and back"
    server = await serve(FakeEngine(reply=lambda _: text))

    stream = await server.openai.chat.completions.create(
        model="fake-model", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]

    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(text.encode()) + 1
    assert len({chunk.id for chunk in chunks}) == 1


async def test_continuous_usage_rides_on_every_chunk(serve: Serve) -> None:
    server = await serve()

    stream = await server.openai.chat.completions.create(
        model="fake-model",
        messages=MESSAGES,
        stream=True,
        extra_body={"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    )
    counts = [chunk.usage.completion_tokens async for chunk in stream]

    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == len("Hello from the fake engine!") + 1


async def test_stream_ends_with_done(serve: Serve) -> None:
    server = await serve()

    async with server.http.post(
        f"{server.url}/v1/chat/completions", json={"messages": MESSAGES, "stream": True}
    ) as response:
        events = (await response.text()).split("\n\n")

    assert response.headers["content-type"].startswith("text/event-stream")
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]"
    assert all(event.startswith("data: {") for event in events[:-2])


async def test_several_choices_have_their_own_seeds_and_indexes(serve: Serve) -> None:
    server = await serve()

    answer = await server.openai.chat.completions.create(model="fake-model", messages=MESSAGES, n=3, seed=7)
    stream = await server.openai.chat.completions.create(model="fake-model", messages=MESSAGES, n=3, stream=True)
    streamed: dict[int, str] = {}
    async for chunk in stream:
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")

    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert streamed == dict.fromkeys(range(3), "Hello from the fake engine!")
    seeds = [r.sampling.seed for r in server.engine.received.values()][:3]
    assert seeds == [7, 8, 9]
    assert answer.usage.completion_tokens == 3 * len("Hello from the fake engine!") + 3


async def test_stop_string_ends_the_answer_and_the_sequence(serve: Serve) -> None:
    server = await serve(FakeEngine(reply=lambda _: "one two three four " * 50))

    answer = await server.openai.chat.completions.create(model="fake-model", messages=MESSAGES, stop=["three"])

    assert answer.choices[0].message.content == "one two "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == "three"
    assert server.engine.running == {}
    assert server.engine.generated < 20


async def test_max_tokens_cuts_with_length(serve: Serve) -> None:
    server = await serve()

    for name in ("max_tokens", "max_completion_tokens"):
        answer = await server.openai.chat.completions.create(
            model="fake-model", messages=MESSAGES, extra_body={name: 5}
        )
        assert answer.choices[0].message.content == "Hello"
        assert answer.choices[0].finish_reason == "length"


async def test_logprobs_in_openais_shape(serve: Serve) -> None:
    server = await serve()

    answer = await server.openai.chat.completions.create(
        model="fake-model", messages=MESSAGES, logprobs=True, top_logprobs=2, max_tokens=3
    )

    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["H", "e", "l"]
    assert content[0].bytes == [ord("H")]
    assert content[0].logprob == -0.25
    assert len(content[0].top_logprobs) == 2


async def test_sampling_fields_reach_the_engine(serve: Serve) -> None:
    server = await serve()

    await server.openai.chat.completions.create(
        model="alias",
        messages=MESSAGES,
        temperature=0,
        top_p=0.5,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={"65": 3},
        extra_body={
            "top_k": 11, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, "min_tokens": 2,
            "stop_token_ids": [66], "max_tokens": 9, "bad_words": ["Ab"], "skip_special_tokens": False,
        },
    )  # fmt: skip

    sampling = next(iter(server.engine.received.values())).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.0, 0.5, 11, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.25, -0.5)
    assert sampling.repetition_penalty == 1.2
    assert sampling.logit_bias == {65: 3.0}
    assert sampling.ignore_eos
    assert (sampling.min_tokens, sampling.max_tokens) == (2, 9)
    assert sampling.stop_token_ids == (66,)
    assert sampling.bad_words_ids == [[65, 98], [32, 65, 98]]
    assert not sampling.skip_special_tokens


async def test_gateway_headers_reach_the_engine(serve: Serve) -> None:
    server = await serve()

    for tenant in ("acme", "globex"):
        await server.post(
            "/v1/chat/completions",
            {"messages": MESSAGES, "cache_salt": "own"},
            headers={"x-octavo-tenant": tenant, "x-octavo-priority": "-3", "x-octavo-deadline-ms": "1500"},
        )

    first, second = server.engine.received.values()
    assert (first.tenant, first.priority, first.deadline_s) == ("acme", -3, 1.5)
    assert first.cache_salt != second.cache_salt


async def test_request_id_comes_back(serve: Serve) -> None:
    server = await serve()

    _, _, given = await server.post("/v1/chat/completions", {"messages": MESSAGES}, headers={"x-request-id": "abc-1"})
    _, _, made = await server.post("/v1/chat/completions", {"messages": MESSAGES})

    assert given["x-request-id"] == "abc-1"
    assert len(made["x-request-id"]) == 32


async def test_unknown_model_is_not_found(serve: Serve) -> None:
    server = await serve()

    with pytest.raises(openai.NotFoundError) as caught:
        await server.openai.chat.completions.create(model="other", messages=MESSAGES)

    assert caught.value.param == "model"


async def test_full_queue_answers_429_with_retry_after_even_for_a_stream(serve: Serve) -> None:
    server = await serve(FakeEngine(max_queued=0))

    for stream in (False, True):
        status, body, headers = await server.post("/v1/chat/completions", {"messages": MESSAGES, "stream": stream})
        assert status == 429
        assert headers["retry-after"] == "4"
        assert body["error"]["type"] == "RateLimitError"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 5_000}]}),
        ("/v1/completions", {"prompt": "x" * 5_000}),
        ("/v1/responses", {"input": "x" * 5_000}),
        (f"/v2/models/{MODEL_NAME}/generate", {"text_input": "x" * 5_000}),
    ],
)
async def test_a_full_queue_refuses_before_a_prompt_is_tokenized(serve: Serve, path: str, body: object) -> None:
    """Tokenized, this prompt is too long, and that would be the answer."""
    busy, idle = await serve(FakeEngine(max_queued=0)), await serve()

    assert (await busy.post(path, body))[0] == 429
    assert (await idle.post(path, body))[0] == 400


async def test_failure_under_way_is_an_error_event_and_done(serve: Serve) -> None:
    server = await serve(FakeEngine(fail_after=3))

    async with server.http.post(
        f"{server.url}/v1/chat/completions", json={"messages": MESSAGES, "stream": True}
    ) as response:
        events = (await response.text()).strip().split("\n\n")

    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == 500


async def test_prompt_beyond_the_context_is_refused(serve: Serve) -> None:
    server = await serve(FakeEngine(max_model_len=64))

    status, body, _ = await server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 100}]})
    assert (status, body["error"]["param"]) == (400, "messages")
    assert "64" in body["error"]["message"]

    status, body, _ = await server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 60})
    assert (status, body["error"]["param"]) == (400, "max_tokens")
