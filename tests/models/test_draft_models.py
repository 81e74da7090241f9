"""Real models guessing for real models: equal answers, shared memory, models that do not fit each other refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers

from char_tokenizer import CharTokenizer
from models.tiny_checkpoints import SIZES, write_checkpoint
from octavo_engine import LLM, SamplingParams
from octavo_engine.errors import ConfigError
from octavo_kernels.registry import use_backends

SETTINGS = {"device": "cpu", "dtype": "float32", "num_threads": 1}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES))
    return tmp_path / "model"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_model_that_guesses_for_itself_is_always_right(checkpoint: Path, temperature: float) -> None:
    sampling = [SamplingParams(max_tokens=24, temperature=temperature, seed=i, ignore_eos=True) for i in range(3)]
    prompts = [[5, 6, 7], [8, 9, 10, 11], [12, 13]]
    settings = {**SETTINGS, "num_kv_blocks": 64, "block_size": 4, "tokenizer": CharTokenizer()}
    plain = LLM(str(checkpoint), **settings).generate(prompts, sampling)
    llm = LLM(str(checkpoint), speculative_model=str(checkpoint), num_speculative_tokens=4, **settings)
    guessed = llm.generate(prompts, sampling)

    assert [r.outputs[0].token_ids for r in guessed] == [r.outputs[0].token_ids for r in plain]
    stats = llm.stats
    assert stats.spec_accepted_tokens >= 0.9 * stats.spec_draft_tokens > 0
    assert stats.step < 3 * 24 / 2


def test_both_models_share_the_memory_for_keys_and_values(checkpoint: Path) -> None:
    settings = {**SETTINGS, "kv_cache_memory_bytes": 1 << 20, "block_size": 4, "tokenizer": CharTokenizer()}
    alone = LLM(str(checkpoint), **settings).model.kv_blocks_total
    shared = LLM(str(checkpoint), speculative_model=str(checkpoint), num_speculative_tokens=4, **settings)
    assert shared.model.kv_blocks_total == alone // 2


def test_a_draft_model_with_another_tokenizer_is_refused(checkpoint: Path, smollm2_gguf: Path) -> None:
    other = checkpoint.parent / "other"
    shutil.copytree(checkpoint, other)
    with pytest.raises(ConfigError, match="speculative_model: has 131 tokens, the model has 49152"):
        LLM(str(smollm2_gguf), speculative_model=str(other), num_speculative_tokens=4, max_model_len=64, **SETTINGS)


def test_a_real_model_answers_the_same_with_a_draft_model(smollm2_gguf: Path) -> None:
    """SmolLM2 guesses for itself on the kernels of this machine."""
    prompts = ["The capital of France is", "1, 2, 3, 4,", "Once upon a time"]
    sampling = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    settings = {**SETTINGS, "max_model_len": 128, "num_kv_blocks": 32}
    with use_backends("cpu", "reference"):
        plain = LLM(str(smollm2_gguf), **settings).generate(prompts, sampling)
        llm = LLM(str(smollm2_gguf), speculative_model=str(smollm2_gguf), num_speculative_tokens=3, **settings)
        guessed = llm.generate(prompts, sampling)

    assert [r.outputs[0].token_ids for r in guessed] == [r.outputs[0].token_ids for r in plain]
    assert llm.stats.spec_accepted_tokens > 0  # how many depends on what guesses cost here
