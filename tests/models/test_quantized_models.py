"""Quantized weights and caches stay near the exact model, and what was done is reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch.nn import functional

from models.tiny_checkpoints import SIZES, load, paged_logits, random_prompts, reference_logits, write_checkpoint
from octavo_engine.errors import ConfigError
from octavo_engine.loader.quantization import OnTheFly, quantize
from octavo_engine.runner.interface import SequenceSlice
from octavo_engine.runner.torch_runner import TorchModelRunner
from octavo_engine.tokenizer.load import load_tokenizer
from octavo_kernels.registry import BACKENDS_BY_DEVICE, use_backends

WIDE = {**SIZES, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def model(tmp_path: Path) -> torch.nn.Module:
    return write_checkpoint(tmp_path, hf.LlamaForCausalLM, hf.LlamaConfig(**WIDE))


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Root-mean-square difference as a share of the root-mean-square logit."""
    return float((torch.cat(found) - torch.cat(exact)).norm() / torch.cat(exact).norm())


@pytest.mark.parametrize(("quantization", "stored"), [("int8", "Q8_0"), ("int4", "Q4_1"), ("fp8", "fp8-row")])
def test_weights_quantized_on_the_fly_stand_for_their_rounded_selves(
    quantization: str, stored: str, model: torch.nn.Module, tmp_path: Path
) -> None:
    prompts = random_prompts((9, 30))
    exact = reference_logits(model, prompts)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                kind = OnTheFly.INT8 if name == "lm_head" and quantization == "int4" else OnTheFly(quantization)
                module.weight.copy_(quantize(module.weight, kind, torch.device("cpu")).dequantize())

    runner = load(tmp_path, quantization=quantization)
    found = paged_logits(runner, prompts)

    assert error(found, reference_logits(model, prompts)) < 1e-4
    assert error(found, exact) > 1e-3
    assert runner.info.quantization.startswith(stored)


@pytest.mark.parametrize(("kv_cache_dtype", "tolerance"), [("bfloat16", 0.02), ("int8", 0.03), ("fp8", 0.15)])
def test_keys_and_values_in_fewer_bits(
    kv_cache_dtype: str, tolerance: float, model: torch.nn.Module, tmp_path: Path
) -> None:
    prompts = random_prompts((9, 30))

    runner = load(tmp_path, kv_cache_dtype=kv_cache_dtype)

    assert 0 < error(paged_logits(runner, prompts), reference_logits(model, prompts)) < tolerance
    exact_bytes = 2 * 3 * 2 * 16 * 4
    assert runner.info.kv_bytes_per_token < exact_bytes


def test_a_quantized_checkpoint_is_not_quantized_again(smollm2_gguf: Path) -> None:
    with pytest.raises(ConfigError, match="is quantized already and cannot be brought to int4; use quantization=auto"):
        load(smollm2_gguf, quantization="int4")


TEXT = (
    "The river rises in the hills behind the old town and runs for forty miles before it meets the sea. In spring, "
    "when the snow melts, it floods the low meadows, and the farmers move their sheep to higher ground. There is a "
    "stone bridge with five arches, built by monks in the twelfth century, and beside it a mill whose wheel still "
    "turns on market days. Travellers used to stop here for bread and news. Today most of them drive past on the new "
    "road, but those who turn off find a quiet street, a church with a crooked tower, and an inn that has been kept "
    "by the same family for nine generations."
)


SHORT = {"num_kv_blocks": 16, "block_size": 16, "max_model_len": 256}


@pytest.fixture(scope="module")
def tokens(smollm2_gguf: Path) -> list[int]:
    return load_tokenizer(smollm2_gguf).encode(TEXT)


@pytest.fixture(scope="module")
def exact_perplexity(smollm2_gguf: Path, tokens: list[int]) -> float:
    return perplexity(load(smollm2_gguf, **SHORT), tokens)


@pytest.mark.parametrize(("kv_cache_dtype", "bound"), [("bfloat16", 1.005), ("int8", 1.01), ("fp8", 1.02)])
def test_the_real_model_reads_as_well_with_a_small_cache(
    kv_cache_dtype: str, bound: float, smollm2_gguf: Path, tokens: list[int], exact_perplexity: float
) -> None:
    runner = load(smollm2_gguf, kv_cache_dtype=kv_cache_dtype, **SHORT)

    assert exact_perplexity < 30
    assert perplexity(runner, tokens) < bound * exact_perplexity


def test_the_real_model_reads_as_well_with_the_default_settings_of_this_machine(
    smollm2_gguf: Path, tokens: list[int], exact_perplexity: float
) -> None:
    with use_backends(*BACKENDS_BY_DEVICE["cpu"]):
        found = perplexity(load(smollm2_gguf, dtype="auto", **SHORT), tokens)

    assert found < 1.02 * exact_perplexity


def perplexity(runner: TorchModelRunner, tokens: list[int]) -> float:
    logits = runner.forward([SequenceSlice(tokens[:-1], 0, list(range(16)), len(tokens) - 1)])
    return float(functional.cross_entropy(logits, torch.tensor(tokens[1:])).exp())
