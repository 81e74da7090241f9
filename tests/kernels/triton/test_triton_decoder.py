"""Whole models on the Triton kernels give the logits of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

from models.tiny_checkpoints import (
    SIZES,
    load,
    paged_logits,
    random_prompts,
    reference_logits,
    relative_error,
    write_checkpoint,
)
from octavo_kernels import registry

pytestmark = pytest.mark.usefixtures("on_triton")

SMALL = {**SIZES, "num_hidden_layers": 2}
FAMILIES = {
    "qwen3": (hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(**SMALL)),
    "gemma2": (
        hf.Gemma2ForCausalLM,
        lambda: hf.Gemma2Config(**SMALL, sliding_window=6, query_pre_attn_scalar=20),
    ),
    "gpt-oss": (
        hf.GptOssForCausalLM,
        lambda: hf.GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family: str, device: torch.device, tmp_path: Path) -> None:
    model_type, config = FAMILIES[family]
    model = write_checkpoint(tmp_path, model_type, config())
    prompts = random_prompts((1, 12))

    found = paged_logits(load(tmp_path, device=device.type), prompts)

    for ours, theirs in zip(found, reference_logits(model, prompts), strict=True):
        assert relative_error(ours.cpu(), theirs) < 1e-4
    used = {choice.op for choice in registry.choices() if choice.backend == "triton"}
    assert {"rms_norm", "add_rms_norm", "rope_and_store_kv", "paged_attention"} <= used


def test_a_float8_cache_gives_what_the_reference_gives(device: torch.device, tmp_path: Path) -> None:
    model_type, config = FAMILIES["qwen3"]
    write_checkpoint(tmp_path, model_type, config())
    prompts = random_prompts((1, 12))
    runner = load(tmp_path, device=device.type, kv_cache_dtype="fp8")

    found = paged_logits(runner, prompts)
    with registry.use_backends("reference"):
        expected = paged_logits(runner, prompts)

    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 0.02
