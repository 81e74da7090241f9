"""Two engine processes behind one client."""

from __future__ import annotations

import asyncio
import os
import signal

from engine_health import death_of
from fake_runner import greedy, load_fake
from octavo_engine.config import EngineConfig
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
