"""Two stages, each a process, with a step in flight in each: the answers of one process, and both stages busy."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers as hf

from char_tokenizer import CharTokenizer
from models.tiny_checkpoints import SIZES, random_prompts, write_checkpoint
from octavo_engine.llm import LLM
from octavo_engine.sampling_params import SamplingParams

SETTINGS = {"dtype": "float32", "device": "cpu", "num_threads": 1, "block_size": 4, "max_num_batched_tokens": 32,
            "max_num_seqs": 8}  # fmt: skip
PROMPTS = [*random_prompts([3, 30, 11, 7, 50, 1, 16], seed=3), [5, 6, 7]]
SAMPLING = [
    SamplingParams(max_tokens=14 + index, temperature=float(index % 2), seed=index, ignore_eos=True, logprobs=index % 3)
    for index in range(len(PROMPTS))
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES))
    return path


def answers(llm: LLM) -> list[list[int]]:
    return [result.outputs[0].token_ids for result in llm.generate(PROMPTS, SAMPLING)]


@pytest.mark.parametrize("num_kv_blocks", [200, 24])  # with room for all, and with preemption
def test_answers_of_stages_with_a_step_in_each_equal_those_of_one_process(checkpoint: Path, num_kv_blocks: int) -> None:
    settings = {**SETTINGS, "num_kv_blocks": num_kv_blocks, "tokenizer": CharTokenizer()}
    expected = answers(LLM(str(checkpoint), **settings))
    ahead = {}
    for mode in ("auto", "off"):
        llm = LLM(str(checkpoint), pipeline_parallel_size=2, async_scheduling=mode, **settings)
        assert answers(llm) == expected
        stats = llm.stats
        assert stats.kv_blocks_used == 0
        assert (stats.num_preemptions > 0) == (num_kv_blocks < 200)
        ahead[mode] = stats.steps_ahead / stats.step
    assert ahead["auto"] > 0.5  # most steps began in the first stage while the second computed
    assert ahead["off"] == 0
