"""A model over several processes gives the logits it gives in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from models.test_decoder_architectures import CASES
from models.tiny_checkpoints import (
    SIZES,
    load,
    paged_logits,
    random_prompts,
    relative_error,
    write_checkpoint,
    write_tokenizer,
)
from octavo_engine.errors import ConfigError
from octavo_engine.runner.interface import SequenceSlice

PROMPTS = random_prompts((1, 7, 23, 40))
TENSOR, PIPELINE, EXPERTS = (
    {"tensor_parallel_size": 2},
    {"pipeline_parallel_size": 2},
    {"tensor_parallel_size": 2, "enable_expert_parallel": True},
)
FOUR = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
QUICK = [
    ("llama, biases", FOUR),
    ("gpt-oss", TENSOR),
    ("qwen2 moe, shared expert", EXPERTS),
    ("gemma2", PIPELINE),
]
REST = [
    *((name, TENSOR) for name in CASES),
    *((name, PIPELINE) for name in ("llama, tied embeddings", "gemma3", "qwen3 moe", "smollm3")),
    *((name, EXPERTS) for name in ("mixtral", "qwen3 moe", "gpt-oss", "deepseek v3")),
]


def _logits_equal(name: str, settings: dict[str, Any], path: Path) -> None:
    model_type, config = CASES[name]
    write_checkpoint(path, model_type, config())
    alone = paged_logits(load(path), PROMPTS)

    runner = load(path, **settings)
    together = paged_logits(runner, PROMPTS)

    assert runner.info.num_ranks == 1 + len(runner.rank_pids)
    for ours, expected in zip(together, alone, strict=True):
        assert relative_error(ours, expected) < 1e-5
        assert ours.argmax(-1).tolist() == expected.argmax(-1).tolist()


@pytest.mark.parametrize(("name", "settings"), QUICK)
def test_ranks_together_give_the_logits_of_one(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    _logits_equal(name, settings, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), REST)
def test_every_architecture_can_be_divided(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    _logits_equal(name, settings, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [128, 131])
def test_four_ranks_share_two_key_heads(vocab_size: int, tmp_path: Path) -> None:
    sizes = {**SIZES, "num_attention_heads": 8, "vocab_size": vocab_size}
    write_checkpoint(tmp_path, hf.LlamaForCausalLM, hf.LlamaConfig(**sizes, tie_word_embeddings=True))
    prompts = [[token % 128 for token in prompt] for prompt in PROMPTS]
    alone = load(tmp_path)

    runner = load(tmp_path, tensor_parallel_size=4)

    assert runner.info.kv_bytes_per_token == alone.info.kv_bytes_per_token // 2
    for ours, expected in zip(paged_logits(runner, prompts), paged_logits(alone, prompts), strict=True):
        assert relative_error(ours, expected) < 1e-5


def test_a_chunk_of_a_prompt_asks_for_no_logits(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES))
    prompt = PROMPTS[3]
    expected = load(tmp_path).forward([SequenceSlice(prompt, 0, range(10))])

    runner = load(tmp_path, **FOUR)
    chunk = runner.forward([SequenceSlice(prompt[:30], 0, range(10), 0)])
    found = runner.forward([SequenceSlice(prompt[30:], 30, range(10))])

    assert chunk.shape == (0, SIZES["vocab_size"])
    assert relative_error(found, expected) < 1e-5


def test_each_rank_holds_only_its_part(tmp_path: Path) -> None:
    sizes = {**SIZES, "vocab_size": 128}
    write_checkpoint(tmp_path, hf.LlamaForCausalLM, hf.LlamaConfig(**sizes))
    norms = 7 * sizes["hidden_size"] * 4  # replicated

    whole = load(tmp_path).info.weight_bytes - norms

    assert load(tmp_path, tensor_parallel_size=2).info.weight_bytes - norms == whole / 2


@pytest.mark.parametrize("method", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_quantized_weights_are_divided_at_their_blocks(method: str, tmp_path: Path) -> None:
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    write_checkpoint(tmp_path, hf.LlamaForCausalLM, hf.LlamaConfig(**sizes))
    alone = paged_logits(load(tmp_path, quantization=method), PROMPTS)

    runner = load(tmp_path, quantization=method, tensor_parallel_size=2)

    for ours, expected in zip(paged_logits(runner, PROMPTS), alone, strict=True):
        assert relative_error(ours, expected) < 0.05  # kernels round the activations of each part by themselves


def test_embeddings_of_ranks_equal_those_of_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hf.Qwen3Model, hf.Qwen3Config(**SIZES))
    alone = load(tmp_path).embed(PROMPTS)

    together = load(tmp_path, **FOUR).embed(PROMPTS)

    assert relative_error(together, alone) < 1e-5


@pytest.mark.slow
def test_ranks_judge_by_yes_and_no_as_one_does(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hf.Qwen3ForCausalLM, hf.Qwen3Config(**SIZES))
    write_tokenizer(tmp_path, words=("yes", "no"))
    alone = load(tmp_path, task="classify").embed(PROMPTS)

    together = load(tmp_path, task="classify", **FOUR).embed(PROMPTS)

    assert relative_error(together, alone) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 4}, "tensor_parallel_size: 4 does not divide .* 6 heads .*; use 1, 2, or"),
        ({"pipeline_parallel_size": 5}, "pipeline_parallel_size: 5 stages for the model's 3 layers; use at most 3"),
        (EXPERTS, "enable_expert_parallel: LlamaForCausalLM has no experts"),
        ({"tensor_parallel_size": 2, "distributed_backend": "nccl"}, "distributed_backend: nccl needs GPUs"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_what_can(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES))

    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **settings)


def test_an_encoder_runs_on_one_device(tmp_path: Path) -> None:
    config = hf.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    write_checkpoint(tmp_path, hf.BertModel, config)

    with pytest.raises(ConfigError, match="BertModel runs on one device; use data_parallel_size"):
        load(tmp_path, tensor_parallel_size=2)
