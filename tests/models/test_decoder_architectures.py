"""Every decoder architecture gives the logits of transformers, through the paged cache and in mixed batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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

LENGTHS = (1, 7, 23, 40)
Case = tuple[type, Callable[[], Any]]


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **values}}


LLAMA3_ROPE = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
YARN_ROPE = _rope("yarn", factor=4.0, original_max_position_embeddings=64)


def _llama(**particular: Any) -> Case:
    return hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**{**SIZES, **particular})


CASES: dict[str, Case] = {
    "llama, grouped queries": _llama(),
    "llama, every head its own key": _llama(num_key_value_heads=6),
    "llama, one key for all heads": _llama(num_key_value_heads=1),
    "llama, tied embeddings": _llama(tie_word_embeddings=True),
    "llama, biases": _llama(attention_bias=True, mlp_bias=True),
    "llama, linear rope": _llama(**_rope("linear", factor=3.0)),
    "llama, dynamic rope": _llama(**_rope("dynamic", factor=3.0)),
    "llama, llama3 rope": _llama(**LLAMA3_ROPE),
    "llama, yarn rope": _llama(**YARN_ROPE),
}


@pytest.mark.parametrize("name", CASES)
def test_float32_logits_equal_transformers_in_mixed_batches(name: str, tmp_path: Path) -> None:
    model_type, config = CASES[name]
    model = write_checkpoint(tmp_path, model_type, config())
    prompts = random_prompts(LENGTHS)

    found = paged_logits(load(tmp_path), prompts)

    for ours, theirs in zip(found, reference_logits(model, prompts), strict=True):
        assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_logits_are_as_near_float32_as_those_of_transformers(name: str, tmp_path: Path) -> None:
    model_type, config = CASES[name]
    model = write_checkpoint(tmp_path, model_type, config())
    prompts = random_prompts(LENGTHS)
    exact = torch.cat(reference_logits(model, prompts))
    peer = torch.cat(reference_logits(model.bfloat16(), prompts))

    found = torch.cat(paged_logits(load(tmp_path, dtype="bfloat16"), prompts))

    assert (found - exact).norm() < 1.5 * (peer - exact).norm()
