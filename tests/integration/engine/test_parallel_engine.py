"""An engine over several processes: through `LLM`, as a replica's engine, on two nodes, and when a rank dies."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import transformers as hf

from char_tokenizer import CharTokenizer
from engine_health import DEATH_S, death_of
from models.tiny_checkpoints import SIZES, load, write_checkpoint
from octavo_engine.config import EngineConfig
from octavo_engine.errors import EngineDeadError
from octavo_engine.llm import LLM
from octavo_engine.process import EngineProcessClient
from octavo_engine.runner.interface import SequenceSlice
from octavo_engine.sampling_params import SamplingParams

SETTINGS = {"dtype": "float32", "device": "cpu", "num_threads": 1, "num_kv_blocks": 64, "block_size": 4}
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES))
    return path


def _rank_pids(pid: int) -> list[int]:
    children = psutil.Process(pid).children(recursive=True)
    return [child.pid for child in children if any("parallel.follower" in part for part in child.cmdline())]


def _greedy(checkpoint: Path, prompt: list[int]) -> list[int]:
    """What one process says."""
    runner, tokens = load(checkpoint), list(prompt)
    for _ in range(GREEDY.max_tokens):
        tokens.append(int(runner.forward([SequenceSlice(tokens, 0, range(16), 1)]).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("busy", "split"),
    [(True, "tensor_parallel_size"), (False, "tensor_parallel_size"), (True, "pipeline_parallel_size")],
)
async def test_a_killed_rank_takes_the_engine_down_and_health_says_so(busy: bool, split: str, checkpoint: Path) -> None:
    client = EngineProcessClient(EngineConfig(model=str(checkpoint), **{split: 2}, **SETTINGS))
    await client.start()
    try:
        assert client.pid is not None
        (rank,) = _rank_pids(client.pid)
        stream = client.generate(request_id="a", prompt_token_ids=[5, 6, 7], sampling=LONG)
        if busy:
            await anext(stream)

        os.kill(rank, signal.SIGKILL)

        assert "rank 1 was killed by SIGKILL; its engine cannot go on" in await death_of(client)
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


def test_llm_over_two_ranks_says_what_one_says(smollm2_gguf: Path) -> None:
    settings = {"dtype": "float32", "num_threads": 1, "num_kv_blocks": 64, "max_num_seqs": 8}
    prompts = ["The capital of France is", "def fibonacci(n):", "Water boils at"]
    alone = LLM(str(smollm2_gguf), **settings).generate(prompts, GREEDY)

    together = LLM(str(smollm2_gguf), pipeline_parallel_size=2, **settings).generate(prompts, GREEDY)

    assert [result.outputs[0].token_ids for result in together] == [result.outputs[0].token_ids for result in alone]


@pytest.mark.slow
def test_three_tensor_ranks_run_the_real_model_in_its_own_blocks(smollm2_gguf: Path) -> None:
    settings = {"dtype": "float32", "num_threads": 1, "num_kv_blocks": 64, "max_num_seqs": 8}
    alone = LLM(str(smollm2_gguf), **settings).generate("The capital of France is", GREEDY)

    llm = LLM(str(smollm2_gguf), tensor_parallel_size=3, **settings)

    assert llm.model.quantization.startswith("Q4_1")
    assert llm.generate("The capital of France is", GREEDY)[0].outputs[0].text == alone[0].outputs[0].text


async def test_two_nodes_make_one_engine(checkpoint: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = {
        "NNODES": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    config = EngineConfig(model=str(checkpoint), tensor_parallel_size=2, **SETTINGS)
    flags = ["--model", str(checkpoint), "--tensor-parallel-size", "2", "--num-threads", "1", "--device", "cpu"]
    flags += ["--dtype", "float32", "--block-size", "4", "--num-kv-blocks", "64"]
    second = subprocess.Popen(  # noqa: ASYNC220 (started before the engine, which waits for it)
        [sys.executable, "-m", "octavo_cli.main", "serve", *flags],
        env={**os.environ, **nodes, "NODE_RANK": "1"},
        start_new_session=True,
    )
    client = EngineProcessClient(config, environment={**nodes, "NODE_RANK": "0"})
    try:
        await client.start()
        stream = client.generate(request_id="a", prompt_token_ids=[5, 6, 7], sampling=GREEDY)
        found = [token async for output in stream for token in output.token_ids]
        assert found == _greedy(checkpoint, [5, 6, 7])

        os.killpg(second.pid, signal.SIGKILL)

        assert "one of the ranks, which cannot go on alone" in await death_of(client)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(second.pid, signal.SIGKILL)
        second.wait()
        await client.shutdown(timeout_s=5.0)


def test_ranks_swap_their_parts_of_a_sequence_together(checkpoint: Path) -> None:
    llm = LLM(
        str(checkpoint), tokenizer=CharTokenizer(), tensor_parallel_size=2, kv_host_memory_bytes=1 << 20,
        preemption_mode="swap", **{**SETTINGS, "num_kv_blocks": 10},
    )  # fmt: skip
    prompts = [[5, 6, 7], [8, 9, 10, 11], [12, 13]]
    results = llm.generate(prompts, GREEDY)

    assert llm.stats.num_preemptions_by_swap > 0
    assert [result.outputs[0].token_ids for result in results] == [_greedy(checkpoint, prompt) for prompt in prompts]
