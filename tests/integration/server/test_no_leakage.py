"""Many tenants at once, with aborts, adapters, too little memory, a shared prefix: each gets what it gets alone."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from fakes.asgi_client import asgi_call
from fakes.eventually import eventually
from models.lora_adapters import write_adapter
from models.tiny_checkpoints import SIZES, write_checkpoint, write_tokenizer
from octavo_engine.config import EngineConfig
from octavo_engine.llm import LLM
from octavo_engine.process import EngineProcessClient
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.tokenizer.load import load_tokenizer
from octavo_server.app import build_app
from octavo_server.replica import Replica
from octavo_server.settings import ServeSettings

SHARED = [7, 8, 9, 10, 11, 12, 13, 14] * 3
NUM_TOKENS = 6
ADAPTERS = ("a", "b", "c")  # one more than can run at once


class Crowd:
    """A replica with a small real model, and what each prompt gets where nobody else is."""

    def __init__(self, folder: Path, app: Any, engine: EngineProcessClient) -> None:
        self.app = app
        self.engine = engine
        self._alone = LLM(str(folder), device="cpu", dtype="float32", block_size=4, num_kv_blocks=64, num_threads=1,
                          enable_prefix_caching=False, enable_lora=True, lora_modules=adapters(folder))  # fmt: skip

    def alone(self, prompts: list[list[int]], names: list[str]) -> list[list[int]]:
        """What each prompt gets from the base model ("") or an adapter."""
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        each = zip(prompts, names, strict=True)
        return [self._alone.generate([prompt], sampling, adapter=name)[0].outputs[0].token_ids for prompt, name in each]

    async def ask(self, prompt: list[int], tenant: str, adapter: str = "", **fields: Any) -> tuple[list[int], int]:
        """The tokens, and how many of the prompt came from the cache."""
        body = {"model": adapter or "base", "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0,
                "ignore_eos": True, "return_token_ids": True, **fields}  # fmt: skip
        headers = {"x-octavo-tenant": tenant}
        status, _, answer = await asgi_call(self.app, "POST", "/v1/completions", json.dumps(body).encode(), headers)
        assert status == 200, answer
        value = json.loads(answer)
        return value["choices"][0]["token_ids"], value["usage"]["prompt_tokens_details"]["cached_tokens"]


def adapters(folder: Path) -> dict[str, str]:
    return {name: str(folder / name) for name in ADAPTERS}


@pytest.fixture
async def crowd(tmp_path: Path) -> AsyncIterator[Crowd]:
    base = write_checkpoint(tmp_path, hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES))
    write_tokenizer(tmp_path)
    for seed, name in enumerate(ADAPTERS):
        write_adapter(base, tmp_path / name, seed, target_modules=["q_proj", "v_proj", "down_proj"])
    config = EngineConfig(model=str(tmp_path), device="cpu", dtype="float32", block_size=4, num_kv_blocks=96,
                          max_num_seqs=16, num_threads=1, num_speculative_tokens=2, enable_lora=True,
                          max_loras=len(ADAPTERS) - 1, lora_modules=adapters(tmp_path))  # fmt: skip
    engine = EngineProcessClient(config)
    replica = Replica(ServeSettings(model="fake", served_model_names=("base",)), engine, load_tokenizer)
    await replica.start()
    yield Crowd(tmp_path, build_app(replica), engine)
    await replica.close(5.0)


async def run_crowd(crowd: Crowd, count: int) -> None:
    rng = random.Random(count)
    secrets = [[rng.randrange(3, 131) for _ in range(rng.randint(4, 20))] for _ in range(count)]
    prompts = [[*SHARED[: rng.randrange(0, len(SHARED))], *secret] for secret in secrets]
    names = [rng.choice(["", *ADAPTERS]) for _ in range(count)]
    expected = await asyncio.to_thread(crowd.alone, prompts, names)

    async def one(index: int) -> None:
        tenant = f"tenant-{index % 7}"
        if index % 4 == 0:  # leaves in the middle
            leaving = asyncio.create_task(crowd.ask(prompts[index], tenant, names[index], max_tokens=60))
            await asyncio.wait([leaving], timeout=rng.random() * 0.05)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            return
        found, _ = await crowd.ask(prompts[index], tenant, names[index])
        assert found == expected[index], "another's tokens, or another's cache"

    for start in range(0, count, 50):
        await asyncio.gather(*(one(index) for index in range(start, min(start + 50, count))))

    assert crowd.engine.stats.num_preemptions > 0
    assert crowd.engine.stats.prefix_hits > 0
    await eventually(lambda: crowd.engine.stats.kv_blocks_used == 0, 10)


async def test_a_crowd_of_tenants_gets_what_each_gets_alone(crowd: Crowd) -> None:
    await run_crowd(crowd, 120)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
async def test_two_thousand_secrets_stay_secret(crowd: Crowd) -> None:
    await run_crowd(crowd, 2_000)


async def test_a_cached_prefix_is_seen_by_its_own_tenant_alone(crowd: Crowd) -> None:
    prompt = [*SHARED, 21, 22, 23]

    first = await crowd.ask(prompt, "a")
    own = await crowd.ask(prompt, "a")
    others = [await crowd.ask(prompt, tenant) for tenant in ("b", "", "A")]
    guessed = await crowd.ask(prompt, "b", cache_salt="a")

    assert first[1] == 0
    assert own[1] >= len(SHARED) - 4
    assert [cached for _, cached in others] == [0, 0, 0]
    assert guessed[1] == 0
    assert first[0] == own[0] == others[0][0] == guessed[0]
