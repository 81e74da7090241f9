"""No combination of sampling options ends the engine or another request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fake_runner import greedy, load_fake
from fakes.asgi_client import asgi_call
from fakes.byte_tokenizer import ByteTokenizer
from octavo_engine.config import EngineConfig
from octavo_engine.process import EngineProcessClient
from octavo_server.app import build_app
from octavo_server.replica import Replica
from octavo_server.settings import ServeSettings

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
GOOD = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "return_token_ids": True}


class Target:
    """A replica with a real engine process, driven from one event loop."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        config = EngineConfig(model="fake", block_size=4, num_kv_blocks=128, num_threads=1)
        self.engine = EngineProcessClient(config, load_fake)
        self.app = self.runner.run(self._start())
        self.pid = self.engine.pid

    async def _start(self) -> Any:
        self.replica = Replica(ServeSettings(model="fake"), self.engine, lambda path: ByteTokenizer())
        await self.replica.start()
        return build_app(self.replica)

    async def both(self, body: dict[str, Any]) -> tuple[int, list[int]]:
        """The status of `body`, and what a good greedy request beside it got."""
        (status, _, _), (_, _, good) = await asyncio.gather(
            asgi_call(self.app, "POST", "/v1/completions", json.dumps(body).encode()),
            asgi_call(self.app, "POST", "/v1/completions", json.dumps(GOOD).encode()),
        )
        return status, json.loads(good)["choices"][0]["token_ids"]


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    made = Target()
    yield made
    made.runner.run(made.replica.close(5.0))
    made.runner.close()


tokens = st.integers(0, 89)
options = st.fixed_dictionaries(
    {"prompt": st.lists(tokens, min_size=1, max_size=12), "max_tokens": st.integers(1, 6)},
    optional={
        "temperature": st.sampled_from([0, 1e-6, 0.7, 2]),
        "top_p": st.sampled_from([1e-6, 0.5, 1]),
        "top_k": st.sampled_from([-1, 0, 1, 5, 10**6]),
        "min_p": st.sampled_from([0, 0.5, 1]),
        "typical_p": st.sampled_from([0.01, 0.9, 1]),
        "repetition_penalty": st.sampled_from([0.01, 1.3, 10]),
        "presence_penalty": st.sampled_from([-2, 0.5, 2]),
        "frequency_penalty": st.sampled_from([-2, 2]),
        "logit_bias": st.dictionaries(tokens.map(str), st.sampled_from([-100, 0, 100]), max_size=4),
        "allowed_token_ids": st.lists(tokens, min_size=1, max_size=4),
        "stop_token_ids": st.lists(tokens, max_size=3),
        "bad_words": st.lists(st.sampled_from(["a", "ab", "\x01"]), max_size=2),
        "min_tokens": st.integers(0, 6),
        "ignore_eos": st.booleans(),
        "logprobs": st.integers(0, 20),
        "prompt_logprobs": st.integers(0, 20),
        "seed": st.sampled_from([0, -(2**63), 2**63 - 2]),
        "n": st.integers(1, 3),
        "best_of": st.integers(1, 3),
        "stop": st.sampled_from(["\x01", ["\x02", "\x03\x04"]]),
        "echo": st.booleans(),
        "stream": st.booleans(),
    },
)  # fmt: skip


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(options)
def test_any_sampling_options_beside_a_good_request(target: Target, body: dict[str, Any]) -> None:
    status, neighbour = target.runner.run(target.both(body))

    assert status in (200, 400), body
    assert neighbour == greedy(PROMPT, 6)
    assert target.engine.pid == target.pid
    target.engine.check_health()
