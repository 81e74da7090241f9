"""Thousands of hostile requests at a whole replica with a real engine process, and a good stream beside them.

The process stays the same, no answer is a 5xx, every 4xx names its field, every block comes back, and what good greedy
streams get is bit for bit what they get alone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from fakes.asgi_client import asgi_call
from fakes.eventually import eventually
from fakes.hostile_grammars import hostile_grammars
from models.tiny_checkpoints import SIZES, write_checkpoint, write_tokenizer
from octavo_engine.config import EngineConfig
from octavo_engine.process import EngineProcessClient
from octavo_engine.tokenizer.load import load_tokenizer
from octavo_server.app import build_app
from octavo_server.openai.refused_fields import REFUSED_FIELDS
from octavo_server.openai.request_types import ChatCompletionRequest, CompletionRequest
from octavo_server.replica import Replica
from octavo_server.responses.request import ResponsesRequest
from octavo_server.settings import ServeSettings

BASES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [1, 2, 3], "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 3},
    "/v2/models/fake/generate": {"text_input": "Hi", "max_tokens": 3},
    "/v2/models/fake/generate_stream": {"text_input": "Hi", "max_tokens": 3},
    "/v2/models/fake/infer": {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["Hi"]}]},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1, 2]},
}
FIELDS = sorted({
    *ChatCompletionRequest.__struct_fields__, *CompletionRequest.__struct_fields__, *ResponsesRequest.__struct_fields__,
    *REFUSED_FIELDS, "text_input", "sampling_parameters", "parameters", "inputs", "outputs", "tokens", "id",
})  # fmt: skip
SCALARS = [
    None, True, False, 0, 1, -1, 2, 3, 89, 97, 2**31, -(2**31), 2**63, 2**64, 10**300, 0.0, -0.0, 0.5, 1e308, -1e-308,
    "", "a", "\x00", "\ud7ff", "𝔘" * 50, "x" * 5_000, "auto", "required", "none", "text", "json_object", "user", "tool",
    "fake", "nobody", "../../etc/passwd", "{{ 7*7 }}", "file:///etc/passwd", "data:image/png;base64,AAAA", "NaN",
]  # fmt: skip


def hostile_bodies(seed: int, count: int) -> Iterable[tuple[str, bytes]]:
    """Good requests with something wrong: values, types, nesting, sizes, repetitions, cut or noisy bytes."""
    rng = random.Random(seed)

    def value(depth: int = 0) -> Any:
        kind = rng.random()
        if kind < 0.6 or depth > 3:
            return rng.choice(SCALARS)
        if kind < 0.75:
            return [value(depth + 1) for _ in range(rng.choice((0, 1, 2, 5, 5 if depth else 300)))]
        if kind < 0.95:
            names = ["role", "content", "type", "name", "function", "text", "json", "regex", "schema", "1", "stream"]
            return {rng.choice(names): value(depth + 1) for _ in range(rng.randint(0, 3))}
        return rng.choice(
            [[[[[[[[[]]]]]]]], {"a": {"b": {"c": {}}}}, list(range(3_000)), {str(i): i for i in range(200)}]
        )

    for _ in range(count):
        path = rng.choice(list(BASES))
        body = dict(BASES[path])
        for _ in range(rng.randint(1, 4)):
            body[rng.choice([*FIELDS, *body])] = value()
        data = json.dumps(body).encode()
        spoil = rng.random()
        if spoil < 0.05:
            data = data[: rng.randrange(len(data))]
        elif spoil < 0.10:
            at = rng.randrange(len(data))
            data = data[:at] + rng.randbytes(rng.randint(1, 8)) + data[at:]
        elif spoil < 0.12:
            data = data[:-1] + b',"prompt":' + b"[" * 500 + b"]" * 500 + b"}"
        elif spoil < 0.122:
            data = data[:-1] + b" " * (9 << 20) + b"}"
        yield path, data


class Target:
    """A replica with a real engine process behind it, driven in this one, and what its good streams must say."""

    def __init__(self, engine: EngineProcessClient, replica: Replica, good: dict[str, Any]) -> None:
        self.engine = engine
        self.replica = replica
        self.app = build_app(replica)
        self.good = json.dumps({**good, "stream": True, "temperature": 0, "return_token_ids": True}).encode()

    async def good_stream(self) -> list[Any]:
        _, _, answer = await asgi_call(self.app, "POST", "/v1/completions", self.good)
        events = [json.loads(event[6:]) for event in answer.decode().split("\n\n") if event.startswith("data: {")]
        choices = [event["choices"][0] for event in events]
        return [
            "".join(choice["text"] for choice in choices),
            [token for choice in choices for token in choice["token_ids"]],
            choices[-1]["finish_reason"],
        ]

    async def attack(self, requests: Iterable[tuple[str, bytes]], width: int = 24) -> dict[int, int]:
        """Send all, `width` at a time with two good streams beside them; how many answers had which status."""
        alone = await self.good_stream()
        pid, counts, waiting = self.engine.pid, dict[int, int](), iter(requests)
        while wave := list(itertools.islice(waiting, width)):
            *answers, first, second = await asyncio.gather(
                *(asgi_call(self.app, "POST", path, body) for path, body in wave),
                self.good_stream(),
                self.good_stream(),
            )
            assert first == second == alone
            for (path, body), (status, _, answer) in zip(wave, answers, strict=True):
                check(path, body, status, answer)
                counts[status] = counts.get(status, 0) + 1
        self.engine.check_health()
        assert self.engine.pid == pid
        await eventually(lambda: self.engine.stats.num_running == self.engine.stats.num_waiting == 0, 30)
        await eventually(lambda: self.engine.stats.kv_blocks_used == 0, 10)
        return counts


def check(path: str, body: bytes, status: int, answer: bytes) -> None:
    assert status < 500, (path, body[:500], answer[:500])
    text = answer.decode()
    if status == 200:
        failed = [event for event in text.split("\n\n") if '"code":5' in event or '"code": 5' in event]
        assert not failed, (path, body[:500], failed)
        return
    error = json.loads(text)["error"]
    message = error if isinstance(error, str) else error["message"]
    assert message
    assert "Traceback" not in text
    assert "0x" not in text.replace("\\x0", "").replace("\\\\x", "") or b"0x" in body
    assert len(text) < 6_000
    if status == 400 and isinstance(error, dict):
        assert error["param"] or "body" in message.lower(), (path, body[:500], answer)


@pytest.fixture
async def target(tmp_path: Path) -> AsyncIterator[Target]:
    write_checkpoint(tmp_path, hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES))
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ tools or '' }}"
    )
    config = EngineConfig(model=str(tmp_path), device="cpu", block_size=4, num_kv_blocks=512, num_threads=1)
    engine = EngineProcessClient(config)
    settings = ServeSettings(
        model="fake", served_model_names=("fake",), tool_call_parser="hermes", reasoning_parser="think"
    )
    replica = Replica(settings, engine, load_tokenizer)
    await replica.start()
    yield Target(engine, replica, {"prompt": [1, 2, 3, 4, 5, 6, 7, 8], "max_tokens": 12})
    await replica.close(5.0)


@pytest.fixture
async def small_model(smollm2_gguf: Path) -> AsyncIterator[Target]:
    config = EngineConfig(
        model=str(smollm2_gguf), device="cpu", num_kv_blocks=256, max_model_len=512, num_threads=1, step_timeout_s=120
    )
    engine = EngineProcessClient(config)
    replica = Replica(ServeSettings(model="fake", served_model_names=("fake",)), engine, load_tokenizer)
    await replica.start()
    yield Target(engine, replica, {"prompt": "The capital of France is", "max_tokens": 8})
    await replica.close(5.0)


async def test_hostile_bodies_hurt_nobody(target: Target) -> None:
    counts = await target.attack(hostile_bodies(seed=1, count=250))

    assert counts[200] > 10
    assert counts[400] > 120


@pytest.mark.slow
@pytest.mark.timeout(1_800)
async def test_ten_thousand_hostile_bodies_hurt_nobody(target: Target) -> None:
    counts = await target.attack(hostile_bodies(seed=2, count=10_000))

    assert sum(counts.values()) == 10_000
    assert counts[200] > 500


@pytest.mark.slow
@pytest.mark.timeout(1_800)
async def test_five_hundred_hostile_grammars_hurt_nobody(small_model: Target) -> None:
    await small_model.attack(grammar_requests(), width=8)


async def test_some_hostile_grammars_hurt_nobody(small_model: Target) -> None:
    await small_model.attack(list(grammar_requests())[::25], width=8)


def test_there_are_five_hundred_hostile_grammars() -> None:
    assert len(list(hostile_grammars())) >= 500


def grammar_requests() -> Iterable[tuple[str, bytes]]:
    for name, value in hostile_grammars():
        body = {"prompt": "Say:", "max_tokens": 3, "temperature": 0, name: value}
        yield "/v1/completions", json.dumps(body).encode()
