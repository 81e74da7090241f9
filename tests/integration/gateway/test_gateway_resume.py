"""A replica is killed in the middle of its answers: the clients notice nothing, and pay once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from fakes.gateway_door import HELLO, Door, entry, open_door, until
from fakes.openai_replica import OpenAIReplica
from fakes.replica_process import ReplicaProcess
from octavo_gateway.registry import Endpoint, ModelEntry, RetryPolicy, Strategy
from octavo_gateway.usage import Ledger, read_usage

TOKENS = 240
CHAT: dict[str, Any] = {
    "model": "fake-model", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": TOKENS,
    "ignore_eos": True, "temperature": 1.0,
}  # fmt: skip
WHOLE = ("Hello from the fake engine!" * 9)[: TOKENS - TOKENS // 28]  # every 28th token is an end, which shows nothing


@contextlib.asynccontextmanager
async def fleet(count: int = 2, **engine: Any) -> AsyncIterator[list[ReplicaProcess]]:
    replicas = [ReplicaProcess({"step_s": 0.02} | engine) for _ in range(count)]
    try:
        await asyncio.gather(*(asyncio.to_thread(replica.start) for replica in replicas))
        yield replicas
    finally:
        for replica in replicas:
            replica.kill()


def model(replicas: list[ReplicaProcess], **fields: Any) -> ModelEntry:
    endpoints = tuple(Endpoint(f"r{number}", replica.url) for number, replica in enumerate(replicas))
    values: dict[str, Any] = {"name": "fake-model", "endpoints": endpoints, "strategy": Strategy.ROUND_ROBIN}
    return ModelEntry(**(values | fields))


def chunks(text: str) -> list[Any]:
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event.startswith("data: {")]
    return [json.loads(event) for event in events]


def content(text: str) -> str:
    return "".join(
        choice["delta"].get("content") or "" for chunk in chunks(text) for choice in chunk.get("choices", ())
    )


def token_ids(text: str) -> list[int]:
    return [token for chunk in chunks(text) for choice in chunk["choices"] for token in choice.get("token_ids") or []]


async def kill_when_all_stream(door: Door, victim: ReplicaProcess, count: int) -> None:
    await until(lambda: sum(exchange.bytes_sent > 3_000 for exchange in door.server.app._exchanges) >= count, 60)
    await asyncio.to_thread(victim.kill)


async def test_streams_of_a_killed_replica_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    async with fleet() as replicas, open_door(model(replicas), ledger=ledger, connect_timeout=10) as door:
        asking = [asyncio.ensure_future(door.read(CHAT | {"seed": n} if n % 2 else CHAT)) for n in range(24)]
        await kill_when_all_stream(door, replicas[0], 24)
        answers = await asyncio.gather(*asking)
        page = door.server.app.metrics.page().decode()
    ledger.close()
    resumed = re.search(r'octavo_gateway_retries_total{model="fake-model",reason="resume"} (\S+)', page)

    assert {status for status, _, _ in answers} == {200}
    for _, text, _ in answers:
        assert text.endswith("data: [DONE]\n\n")
        assert content(text) == WHOLE
        found = chunks(text)
        assert len({(chunk["id"], chunk["created"]) for chunk in found}) == 1
        assert sum(choice["delta"].get("role") == "assistant" for c in found for choice in c["choices"]) == 1
        assert found[-1]["choices"][0]["finish_reason"] == "length"
        assert "token_ids" not in text
    assert resumed is not None
    assert float(resumed[1]) == 12
    (row,) = read_usage(tmp_path / "usage.sqlite")
    assert (row.requests, row.output_tokens, row.estimated) == (24, 24 * TOKENS, 0)
    assert row.prompt_tokens == 24 * prompt_tokens_of(replicas[1])


def prompt_tokens_of(replica: ReplicaProcess) -> int:
    """Prompt tokens of one request, by the survivor's log."""
    found = [json.loads(m[1]) for line in replica.lines if (m := re.search(r"request (\{.*\})", line))]
    return int(next(fields["prompt_tokens"] for fields in found if fields.get("prompt_tokens")))


async def test_the_openai_client_sees_one_stream_with_its_usage_and_token_ids() -> None:
    async with fleet() as replicas, open_door(model(replicas), connect_timeout=10) as door:
        client = openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0)
        stream = await client.completions.create(
            model="fake-model", prompt="Hi", max_tokens=100, stream=True, stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "return_token_ids": True, "temperature": 0.0},
        )  # fmt: skip
        text, tokens, usage = "", [], None
        killing: asyncio.Task[None] | None = None
        async for chunk in stream:
            if chunk.choices:
                text += chunk.choices[0].text
                tokens += (chunk.choices[0].model_extra or {}).get("token_ids") or []
            if killing is None and len(tokens) > 20:
                (exchange,) = door.server.app._exchanges
                victim = replicas[int(exchange.endpoint[1:])]
                killing = asyncio.create_task(asyncio.to_thread(victim.kill))
            usage = chunk.usage or usage
        await client.close()
        assert killing is not None
        await killing

    assert text == ("Hello from the fake engine!" * 5)[: 100 - 3]
    assert len(tokens) == 100
    assert usage is not None
    assert usage.completion_tokens == 100


async def test_who_leaves_while_the_answer_moves_pays_for_what_was_told(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    async with (
        fleet(1) as replicas,
        fleet(1, step_s=30.0) as slow,
        open_door(model(replicas), ledger=ledger, connect_timeout=10) as door,
    ):
        asking = asyncio.ensure_future(door.read(CHAT))
        await until(lambda: any(exchange.bytes_sent > 3_000 for exchange in door.server.app._exchanges), 60)
        (exchange,) = door.server.app._exchanges
        door.serve(model([*replicas, *slow]))
        await asyncio.to_thread(replicas[0].kill)
        await until(lambda: exchange.endpoint == "r1", 60)
        asking.cancel()
        await until(lambda: door.server.app.in_flight == 0 and door.server.app.accounts.num_unsettled == 0, 60)
        told = exchange.progress.num_tokens if exchange.progress is not None else 0
    ledger.close()

    (row,) = read_usage(tmp_path / "usage.sqlite", ("outcome",))
    assert row.group == ("cancelled",)
    assert row.output_tokens == told > 5
    assert row.estimated == 1


async def test_answers_survive_one_killing_after_another() -> None:
    async with fleet(3) as replicas, open_door(model(replicas), connect_timeout=10) as door:
        asking = [asyncio.ensure_future(door.read(CHAT)) for _ in range(9)]
        await kill_when_all_stream(door, replicas[0], 9)
        await until(lambda: all(exchange.endpoint != "r0" for exchange in door.server.app._exchanges))
        await asyncio.to_thread(replicas[1].kill)
        answers = await asyncio.gather(*asking)

    assert [content(text) for _, text, _ in answers] == [WHOLE] * 9


@pytest.mark.parametrize(
    ("body", "fields", "settings"),
    [
        (CHAT | {"n": 2}, {}, {}),
        (CHAT, {"retry": RetryPolicy(attempts=1)}, {}),
        (CHAT, {}, {"resume": False}),
    ],
)
async def test_what_cannot_be_resumed_ends_with_an_explicit_error(body: Any, fields: Any, settings: Any) -> None:
    async with fleet() as replicas, open_door(model(replicas, **fields), connect_timeout=10, **settings) as door:
        asking = [asyncio.ensure_future(door.read(body)) for _ in range(4)]
        await kill_when_all_stream(door, replicas[0], 4)
        answers = await asyncio.gather(*asking)
    broken = [text for _, text, _ in answers if not text.endswith("data: [DONE]\n\n")]

    assert len(broken) == 2
    assert all(json.loads(text.strip().split("data: ")[-1])["error"]["code"] == "replica_failed" for text in broken)


async def test_a_replica_that_would_begin_anew_is_not_believed() -> None:
    """It does not know how to go on: the client must not get the beginning of the answer twice."""
    async with fleet(1) as replicas, OpenAIReplica("other", tokens=50).serve() as other:
        both = model(replicas)
        other_entry = entry(other, name="fake-model")
        async with open_door(both, connect_timeout=10) as door:
            asking = asyncio.ensure_future(door.read(CHAT))
            await until(lambda: any(exchange.bytes_sent > 3_000 for exchange in door.server.app._exchanges))
            door.serve(replace(both, endpoints=(*both.endpoints, *other_entry.endpoints)))
            await asyncio.to_thread(replicas[0].kill)
            _, text, _ = await asking

    assert '"replica_failed"' in text
    assert "other-0" not in text
    assert WHOLE.startswith(content(text))


async def test_a_lone_replica_that_comes_back_is_waited_for() -> None:
    async with fleet(1) as replicas, open_door(model(replicas), connect_timeout=10) as door:
        asking = asyncio.ensure_future(door.read(CHAT))
        await until(lambda: any(exchange.bytes_sent > 3_000 for exchange in door.server.app._exchanges))
        door.serve(model([]))
        door.serve(replace(model([]), scale_to_zero=True))
        await asyncio.to_thread(replicas[0].kill)
        fresh = ReplicaProcess({"step_s": 0.005})
        await asyncio.to_thread(fresh.start)
        replicas.append(fresh)
        door.serve(model([fresh]))
        _, text, _ = await asking

    assert content(text) == WHOLE
    assert text.endswith("data: [DONE]\n\n")


@contextlib.contextmanager
def real_replica(model_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    process = subprocess.Popen(
        [
            sys.executable, "-m", "octavo_cli.main", "serve", str(model_path), "--served-model-name", "smollm2",
            "--port", "0", "--device", "cpu", "--max-model-len", "1024", "--num-kv-blocks", "256",
        ],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    lines: list[str] = []
    try:
        url = None
        while url is None:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
            found = re.search(r"listening on (http://\S+)", lines[-1])
            url = found[1] if found else None
        threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True).start()
        while httpx2.get(f"{url}/health/ready").status_code != 200:
            assert process.poll() is None, "".join(lines)
            time.sleep(0.2)
        yield url, process
    finally:
        kill_all(process)


def kill_all(process: subprocess.Popen[str]) -> None:
    """The replica and its engine, as when their container dies."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_real_model_goes_on_as_it_would_have(smollm2_gguf: Path) -> None:
    """A greedy answer, and a seeded one with penalties. Recomputing what was told rounds differently than having
    generated it, as after a preemption; so each greedy choice is checked to be one, up to rounding."""
    question = [{"role": "user", "content": "Write a short story about a fox and a river."}]
    common: dict[str, Any] = {"model": "smollm2", "messages": question, "stream": True, "max_tokens": 60}
    common |= {"return_token_ids": True, "stream_options": {"include_usage": True}}
    bodies = [
        common | {"temperature": 0.0},
        common | {"temperature": 0.8, "seed": 8, "frequency_penalty": 0.6, "repetition_penalty": 1.1},
    ]
    with real_replica(smollm2_gguf) as first, real_replica(smollm2_gguf) as second:
        endpoints = tuple(Endpoint(f"r{n}", url) for n, (url, _) in enumerate((first, second)))
        both = ModelEntry(name="smollm2", endpoints=endpoints, strategy=Strategy.ROUND_ROBIN)
        async with open_door(replace(both, endpoints=endpoints[:1]), connect_timeout=10) as door:
            asking = [asyncio.ensure_future(door.read(body)) for body in bodies]
            await until(lambda: sum(e.bytes_sent > 2_500 for e in door.server.app._exchanges) == 2, 240)
            door.serve(both)
            kill_all(first[1])
            texts = [text for _, text, _ in await asyncio.gather(*asking)]
            page = door.server.app.metrics.page().decode()
            tokens = [
                [t for c in chunks(text) for ch in c["choices"] for t in ch.get("token_ids") or []] for text in texts
            ]
            whole = {**bodies[0], "stream": False, "max_tokens": 1}
            del whole["stream_options"]
            prompt = json.loads((await door.read(whole))[1])["prompt_token_ids"]
            judged = {"model": "smollm2", "prompt": prompt + tokens[0], "max_tokens": 1, "prompt_logprobs": 1}
            verdict = json.loads((await door.read(judged, path="/v1/completions"))[1])["choices"][0]["prompt_logprobs"]

    assert 'octavo_gateway_retries_total{model="smollm2",reason="resume"} 2.0' in page
    assert all(text.endswith("data: [DONE]\n\n") for text in texts)
    for text, told in zip(texts, tokens, strict=True):
        assert len({chunk["id"] for chunk in chunks(text)}) == 1
        assert chunks(text)[-1]["usage"]["completion_tokens"] == len(told)
    assert len(tokens[0]) == len(tokens[1]) == 60
    for token, ranked in zip(tokens[0], verdict[len(prompt) :], strict=True):
        best = max(entry["logprob"] for entry in ranked.values())
        assert ranked[str(token)]["logprob"] > best - 0.5


async def test_other_runtimes_are_streamed_as_ever() -> None:
    async with OpenAIReplica("r").serve() as replica, open_door(entry(replica)) as door:
        text = await door.events(HELLO)

    assert "resumable" in str(replica.received[0].headers)
    assert "r-4" in text
