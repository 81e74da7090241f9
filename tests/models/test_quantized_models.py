"""Quantized weights and caches stay near the exact model, and what was done is reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

from models.tiny_checkpoints import SIZES, load, paged_logits, random_prompts, reference_logits, write_checkpoint
from octavo_engine.errors import ConfigError
from octavo_engine.loader.quantization import OnTheFly, quantize

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
