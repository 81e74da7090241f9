"""KV blocks that went through host memory say the same as before, in every format, on real models too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from models.tiny_checkpoints import SIZES, load, random_prompts, write_checkpoint
from octavo_engine import LLM, SamplingParams
from octavo_engine.kv.transfers import Direction, Transfer
from octavo_engine.runner.interface import SequenceSlice
from octavo_kernels.registry import use_backends


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "float16", "int8", "fp8"])
def test_blocks_come_back_bit_for_bit(tmp_path: Path, kv_dtype: str) -> None:
    write_checkpoint(tmp_path, transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES))
    runner = load(tmp_path, kv_cache_dtype=kv_dtype)
    runner.allocate_host_cache(8)
    (prompt,) = random_prompts([20])
    runner.forward([SequenceSlice(prompt, 0, [3, 1, 4, 15, 9], 0)])
    probe = [5, 6]
    before = runner.forward([SequenceSlice(probe, 20, [3, 1, 4, 15, 9, 2], 2)])

    runner.move_blocks(Transfer(Direction.TO_HOST, {0: 3, 5: 1, 2: 4, 7: 15, 1: 9}))
    runner.forward([SequenceSlice(random_prompts([40], seed=9)[0], 0, range(16), 0)])  # overwrites all of them
    runner.move_blocks(Transfer(Direction.TO_DEVICE, {20: 0, 21: 5, 22: 2, 23: 7, 24: 1}))

    after = runner.forward([SequenceSlice(probe, 20, [20, 21, 22, 23, 24, 2], 2)])
    assert torch.equal(before, after)


def test_a_real_model_answers_the_same_whatever_memory_pressure_does(smollm2_gguf: Path) -> None:
    """SmolLM2 on the kernels of this machine: roomy, then cramped with every preempted sequence swapped out."""
    prompts = [f"Count from {n} to {n + 20}: {n}," for n in range(6)]
    sampling = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    settings = {"dtype": "float32", "max_model_len": 128, "num_threads": 1, "device": "cpu"}
    answers, stats = {}, {}
    with use_backends("cpu", "reference"):
        for name, memory in {
            "roomy": {"num_kv_blocks": 64},
            "cramped": {"num_kv_blocks": 14, "kv_host_memory_bytes": 64 << 20, "preemption_mode": "swap"},
        }.items():
            llm = LLM(str(smollm2_gguf), **settings, **memory)
            answers[name] = [result.outputs[0].token_ids for result in llm.generate(prompts, sampling)]
            stats[name] = llm.stats

    assert stats["roomy"].num_preemptions == 0
    assert stats["cramped"].num_preemptions_by_swap > 0
    assert answers["cramped"] == answers["roomy"]
