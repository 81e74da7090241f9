"""Two engine processes behind one client, and behind `LLM`."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from char_tokenizer import CharTokenizer
from engine_health import death_of
from fake_runner import greedy, load_fake
from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError, EngineDeadError
from octavo_engine.llm import LLM
from octavo_engine.messages import FinishReason
from octavo_engine.process.data_parallel import DataParallelClient
from octavo_engine.sampling_params import SamplingParams

CONFIG = EngineConfig(
    model="fake", data_parallel_size=2, device="cpu", block_size=4, num_kv_blocks=64, max_num_seqs=8, num_threads=1
)


async def _tokens(client: DataParallelClient, name: str, prompt: list[int]) -> list[int]:
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    stream = client.generate(request_id=name, prompt_token_ids=prompt, sampling=sampling)
    return [token async for output in stream for token in output.token_ids]


async def test_both_engines_answer_as_one_would_and_die_as_one() -> None:
    client = DataParallelClient(CONFIG, load_fake)
    await client.start()
    try:
        prompts = [[number, 2, 3] for number in range(1, 13)]
        answers = await asyncio.gather(*(_tokens(client, str(i), prompt) for i, prompt in enumerate(prompts)))

        assert answers == [greedy(prompt, 8) for prompt in prompts]
        assert client.model.kv_blocks_total == 2 * 64
        assert (await client.embed(request_id="e", prompt_token_ids=[5, 6])).embedding is not None
        while client.stats.num_running:
            await asyncio.sleep(0.05)
        assert sum(client.stats.requests_finished.values()) == 12
        assert all(engine.stats.generation_tokens for engine in client.engines)

        pid = client.engines[1].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert "was killed by SIGKILL" in await death_of(client)
    finally:
        await client.shutdown(timeout_s=5.0)


SETTINGS = {name: getattr(CONFIG, name) for name in CONFIG.__struct_fields__ if name != "model"}


def engine_processes() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if any("spawn_main" in part for part in child.cmdline())]


def test_llm_over_two_engines_says_what_one_says_and_leaves_no_process() -> None:
    sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    prompts = [[number % 60 + 1, number // 60 + 2, 3] for number in range(120)]  # more than the engines take at once
    phases: list[str] = []
    with LLM(
        "fake", load=load_fake, tokenizer=CharTokenizer(), on_progress=lambda p: phases.append(p.phase), **SETTINGS
    ) as llm:
        results = llm.generate(prompts, sampling)
        cut = llm.generate([prompts[0]], SamplingParams(max_tokens=8, temperature=0.0, stop=(_first_text(llm),)))
        vectors = llm.embed([[5, 6], [7]])

        assert [result.outputs[0].token_ids for result in results] == [greedy(prompt, 8) for prompt in prompts]
        assert cut[0].outputs[0].finish_reason is FinishReason.STOP
        assert len(vectors) == 2
        assert llm.model.kv_blocks_total == 2 * 64
        assert phases
        running = engine_processes()
        assert len(running) == 2

    assert not psutil.wait_procs(running, timeout=10)[1]


def _first_text(llm: LLM) -> str:
    return llm.tokenizer.decode(greedy([1, 2, 3], 1))


def test_a_dead_engine_ends_what_llm_runs() -> None:
    with LLM("fake", load=load_fake, tokenizer=CharTokenizer(), **SETTINGS) as llm:
        engine_processes()[0].kill()

        with pytest.raises(EngineDeadError, match="SIGKILL"):
            llm.generate([[number, 2, 3] for number in range(1, 20)], SamplingParams(max_tokens=30, temperature=0.0))


def test_llm_over_two_engines_that_cannot_start_says_why() -> None:
    with pytest.raises(ConfigError, match="kv_events_endpoint"):
        LLM("fake", load=load_fake, **(SETTINGS | {"kv_events_endpoint": "tcp://127.0.0.1:5999"}))


@pytest.mark.slow
def test_llm_over_two_engines_of_the_real_model(smollm2_gguf: Path) -> None:
    settings = {"dtype": "float32", "num_threads": 1, "num_kv_blocks": 64, "max_num_seqs": 4, "device": "cpu"}
    prompts = ["The capital of France is", "def fibonacci(n):", "Water boils at", "In 1869 a railway"]
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    alone = LLM(str(smollm2_gguf), **settings).generate(prompts, sampling)

    with LLM(str(smollm2_gguf), data_parallel_size=2, **settings) as llm:
        together = llm.generate(prompts, sampling)

    assert [result.outputs[0].token_ids for result in together] == [result.outputs[0].token_ids for result in alone]
