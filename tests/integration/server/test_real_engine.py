"""The whole replica on a real model: a child process of `octavo serve`, the official client, real tokens."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

CAPITAL = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


@pytest.fixture(scope="module")
def server(smollm2_gguf: Path) -> Iterator[str]:
    """Address of a replica that serves SmolLM2-135M."""
    process = subprocess.Popen(
        [
            sys.executable, "-m", "octavo_cli.main", "serve", str(smollm2_gguf), "--served-model-name", "smollm2",
            "--port", "0", "--device", "cpu", "--max-model-len", "1024", "--num-kv-blocks", "256",
            "--drain-propagation", "0", "--tool-call-parser", "hermes",
        ],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    lines: list[str] = []
    url = None
    while url is None:
        lines.append(process.stderr.readline())
        assert lines[-1], "".join(lines)
        found = re.search(r"listening on (http://\S+)", lines[-1])
        url = found[1] if found else None
    threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True).start()
    deadline = time.monotonic() + 180
    while httpx2.get(f"{url}/health/ready").status_code != 200:
        assert process.poll() is None, "".join(lines)
        assert time.monotonic() < deadline, "".join(lines)
        time.sleep(0.2)
    yield url
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0, "".join(lines)
    log = "".join(lines)
    assert "Traceback" not in log
    assert "capital" not in log, "prompts must never be logged"


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def test_it_knows_the_capital_of_france(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smollm2", messages=CAPITAL, temperature=0, max_tokens=16)

    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"


def test_a_greedy_stream_equals_the_greedy_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="smollm2", messages=CAPITAL, temperature=0, max_tokens=24)
    stream = client.chat.completions.create(
        model="smollm2", messages=CAPITAL, temperature=0, max_tokens=24, stream=True
    )

    assert "".join(c.choices[0].delta.content or "" for c in stream) == whole.choices[0].message.content


def test_the_second_time_the_prompt_comes_from_the_cache(client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "Tell me about the history of bread. " * 8}]
    first = client.chat.completions.create(model="smollm2", messages=question, temperature=0, max_tokens=4)
    second = client.chat.completions.create(model="smollm2", messages=question, temperature=0, max_tokens=4)

    assert first.usage.prompt_tokens_details.cached_tokens < second.usage.prompt_tokens_details.cached_tokens
    assert second.usage.prompt_tokens_details.cached_tokens % 16 == 0
    assert first.choices[0].message.content == second.choices[0].message.content


def test_a_seed_makes_sampling_repeatable(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model="smollm2", messages=[{"role": "user", "content": "Invent a name."}], temperature=1.5, seed=seed,
            max_tokens=8,
        )  # fmt: skip
        return answer.choices[0].message.content

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(3)}) > 1


def test_echo_scores_a_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smollm2", prompt="The capital of France is Paris", echo=True, max_tokens=0, logprobs=1
    )

    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text == "The capital of France is Paris"
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[-1] > -1.5
    assert logprobs.tokens[-1] == " Paris"
    assert answer.choices[0].text[logprobs.text_offset[-1] :] == " Paris"


def test_every_processor_of_logits_leaves_the_engine_well(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smollm2", prompt="One, two,", temperature=0, max_tokens=12, presence_penalty=0.5, frequency_penalty=0.5,
        logit_bias={"28": -100}, logprobs=1,
        extra_body={"repetition_penalty": 1.2, "min_tokens": 12, "bad_words": ["three"], "top_k": 50, "min_p": 0.01},
    )  # fmt: skip

    assert answer.usage.completion_tokens == 12
    assert "three" not in answer.choices[0].text


def test_stop_strings_never_show(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smollm2", prompt="One, two, three, four,", temperature=0, max_tokens=40, stop=["seven"]
    )

    assert "seven" not in answer.choices[0].text
    assert answer.choices[0].finish_reason == "stop"


def test_structured_output_keeps_to_its_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="smollm2", messages=CAPITAL, temperature=0, max_tokens=80,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    )  # fmt: skip

    value = json.loads(answer.choices[0].message.content or "")
    assert value["city"] in ("Paris", "Rome")
    assert isinstance(value["people"], int)


def test_a_grammar_that_cannot_be_compiled_names_the_field(client: openai.OpenAI) -> None:
    for fields, param in (
        ({"guided_regex": "(unclosed"}, "guided_regex"),
        ({"structured_outputs": {"grammar": "no grammar at all ((("}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}}},
         "response_format.json_schema"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="smollm2", messages=CAPITAL, extra_body=fields)
        assert caught.value.param == param


def test_a_named_tool_is_called_with_valid_arguments(client: openai.OpenAI) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
    answer = client.chat.completions.create(
        model="smollm2", messages=CAPITAL, temperature=0, max_tokens=120,
        tools=[{"type": "function", "function": {"name": "look_up", "parameters": parameters}}],
        tool_choice={"type": "function", "function": {"name": "look_up"}},
    )  # fmt: skip

    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.name == "look_up"
    assert isinstance(json.loads(call.function.arguments)["city"], str)
    assert answer.choices[0].finish_reason == "tool_calls"


async def test_many_streams_at_once_keep_to_their_own_text(server: str) -> None:
    client = openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)

    async def count_from(number: int) -> str:
        stream = await client.completions.create(
            model="smollm2", prompt=f"{number}, {number + 1}, {number + 2},", temperature=0, max_tokens=6, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    alone = [await count_from(number) for number in (10, 20, 30)]
    together = await asyncio.gather(*(count_from(number) for number in (10, 20, 30) * 3))

    assert together == alone * 3


def test_a_client_that_leaves_frees_the_blocks(server: str) -> None:
    body = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with httpx2.stream("POST", f"{server}/v1/completions", json=body) as response:
        next(response.iter_bytes())

    deadline = time.monotonic() + 10
    while True:
        lines = httpx2.get(f"{server}/metrics").text.splitlines()
        values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("octavo_")}
        if values["octavo_requests_running"] == 0 and values["octavo_kv_cache_utilization"] == 0:
            return
        assert time.monotonic() < deadline
        time.sleep(0.1)
