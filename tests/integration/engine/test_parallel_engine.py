"""An engine over several processes: through `LLM`, as a replica's engine, on two nodes, and when a rank dies."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import transformers as hf

from models.tiny_checkpoints import SIZES, write_checkpoint
from octavo_engine.config import EngineConfig
from octavo_engine.errors import EngineDeadError
from octavo_engine.process import EngineProcessClient
from octavo_engine.sampling_params import SamplingParams

SETTINGS = {"dtype": "float32", "device": "cpu", "num_threads": 1, "num_kv_blocks": 64, "block_size": 4}
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
DEATH_S = 10.0


class Numbers:
    """A tokenizer for prompts that are token ids already."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, token_ids))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES))
    return path


def _rank_pids(pid: int) -> list[int]:
    children = psutil.Process(pid).children(recursive=True)
    return [child.pid for child in children if any("parallel.follower" in part for part in child.cmdline())]


async def _dies(client: EngineProcessClient) -> str:
    """What health says once it is bad."""
    deadline = time.monotonic() + DEATH_S
    while time.monotonic() < deadline:
        try:
            client.check_health()
        except EngineDeadError as error:
            return str(error)
        await asyncio.sleep(0.05)
    raise AssertionError(f"the engine still counts as healthy {DEATH_S} s after a rank was killed")


@pytest.mark.parametrize("busy", [True, False])
async def test_a_killed_rank_takes_the_engine_down_and_health_says_so(busy: bool, checkpoint: Path) -> None:
    client = EngineProcessClient(EngineConfig(model=str(checkpoint), tensor_parallel_size=2, **SETTINGS))
    await client.start()
    try:
        assert client.pid is not None
        (rank,) = _rank_pids(client.pid)
        stream = client.generate(request_id="a", prompt_token_ids=[5, 6, 7], sampling=LONG)
        if busy:
            await anext(stream)

        os.kill(rank, signal.SIGKILL)

        assert "rank 1 was killed by SIGKILL; its engine cannot go on" in await _dies(client)
        if busy:
            with pytest.raises(EngineDeadError, match="rank 1"):
                async for _ in stream:
                    pass
    finally:
        await client.shutdown(timeout_s=5.0)


async def test_no_rank_outlives_a_killed_engine(checkpoint: Path) -> None:
    client = EngineProcessClient(EngineConfig(model=str(checkpoint), pipeline_parallel_size=2, **SETTINGS))
    await client.start()
    assert client.pid is not None
    ranks = [psutil.Process(pid) for pid in _rank_pids(client.pid)]

    os.kill(client.pid, signal.SIGKILL)

    gone, alive = psutil.wait_procs(ranks, timeout=DEATH_S)
    assert len(gone) == 1
    assert not alive
    await client.shutdown(timeout_s=5.0)
