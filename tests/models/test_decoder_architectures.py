"""Every decoder architecture gives the logits of transformers, through the paged cache and in mixed batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from models.tiny_checkpoints import (
    SIZES,
    load,
    paged_logits,
    random_prompts,
    reference_logits,
    relative_error,
    write_checkpoint,
)
from octavo_kernels.registry import load_backend, use_backends

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


def _case(name: str, **particular: Any) -> Case:
    """`name`: the family as in transformers' class names."""
    model_type, config_type = getattr(hf, f"{name}ForCausalLM"), getattr(hf, f"{name}Config")
    return model_type, lambda: config_type(**{**SIZES, **particular})


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.5, 1.6, 1.8], "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0]}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    **EXPERTS,
    "num_key_value_heads": 6,
    "head_dim": 8,
}
GROUPS = {"n_group": 4, "topk_group": 2}
DEEP_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=0.9)
CASES |= {
    "mistral": _case("Mistral", sliding_window=None),
    "mistral, sliding window": _case("Mistral", sliding_window=6),
    "mixtral": _case("Mixtral", num_local_experts=5, num_experts_per_tok=2),
    "qwen2": _case("Qwen2"),
    "qwen2, window on later layers": _case("Qwen2", **WINDOW),
    "qwen2 moe, shared expert": _case("Qwen2Moe", num_experts=4, shared_expert_intermediate_size=24, **EXPERTS),
    "qwen3": _case("Qwen3"),
    "qwen3 moe": _case("Qwen3Moe", num_experts=6, norm_topk_prob=True, **EXPERTS),
    "qwen3 moe, some layers dense": _case("Qwen3Moe", num_experts=4, mlp_only_layers=[1], **EXPERTS),
    "gemma2": _case("Gemma2", sliding_window=6, query_pre_attn_scalar=20),
    "gemma3": (hf.Gemma3ForCausalLM, lambda: hf.Gemma3TextConfig(**SIZES, sliding_window=6, query_pre_attn_scalar=20)),
    "phi3": _case("Phi3"),
    "phi3, grouped queries, part of a head turned, tied": _case(
        "Phi3", tie_word_embeddings=True, **_rope("default", partial_rotary_factor=0.75)
    ),
    "olmo2": _case("Olmo2"),
    "deepseek v2": _case("DeepseekV2", **LATENT, topk_method="greedy"),
    "deepseek v2, groups, queries compressed, yarn": _case(
        "DeepseekV2", **{**LATENT, "q_lora_rank": 20}, **GROUPS, topk_method="group_limited_greedy", **DEEP_YARN
    ),
    "deepseek v3": _case("DeepseekV3", **{**LATENT, "q_lora_rank": 20}, **GROUPS, **DEEP_YARN),
    "deepseek v3, all in one group": _case("DeepseekV3", **LATENT, n_group=1, topk_group=1, norm_topk_prob=False),
    "smollm3": _case("SmolLM3", no_rope_layers=[1, 0, 1]),
    "gpt-oss": _case("GptOss", num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
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
def test_native_cpu_kernels_give_the_same_logits(name: str, tmp_path: Path) -> None:
    status = load_backend("cpu")
    if not status.available:
        pytest.skip(f"no native kernels here: {status.detail}")
    model_type, config = CASES[name]
    model = write_checkpoint(tmp_path, model_type, config())
    prompts = random_prompts(LENGTHS)

    with use_backends("cpu"):
        found = paged_logits(load(tmp_path), prompts)

    for ours, theirs in zip(found, reference_logits(model, prompts), strict=True):
        assert relative_error(ours, theirs) < 1e-4


OP_BY_OP = {name for name in CASES if any(mark in name for mark in ("moe", "mixtral", "gpt-oss", "deepseek"))}


@pytest.mark.parametrize("name", CASES)
def test_whole_native_steps_give_the_same_logits_for_every_family_of_the_usual_stack(name: str, tmp_path: Path) -> None:
    status = load_backend("cpu")
    if not status.available:
        pytest.skip(f"no native kernels here: {status.detail}")
    model_type, make_config = CASES[name]
    config = make_config()
    config.intermediate_size = 96  # native steps want a multiple of 32
    model = write_checkpoint(tmp_path, model_type, config)
    prompts = random_prompts(LENGTHS)

    with use_backends("cpu"):
        runner = load(tmp_path)
        found = paged_logits(runner, prompts)

    assert ("whole step" in runner.info.backend) == (name not in OP_BY_OP)
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

    ours, theirs = ((logits - exact).norm(dim=-1).median() for logits in (found, peer))  # medians: routers may flip
    assert ours < 1.5 * theirs


@pytest.mark.parametrize(("served", "length"), [(16, 16), (256, 40)])
def test_long_rope_takes_the_factors_of_the_served_length(served: int, length: int, tmp_path: Path) -> None:
    rope = _rope("longrope", partial_rotary_factor=0.75, **FACTORS)
    config = hf.Phi3Config(**{**SIZES, "hidden_size": 96, "original_max_position_embeddings": 16, **rope})
    model = write_checkpoint(tmp_path, hf.Phi3ForCausalLM, config)
    prompts = random_prompts((length, length - 1 if served > 16 else 3))

    found = paged_logits(load(tmp_path, max_model_len=served), prompts)

    for ours, theirs in zip(found, reference_logits(model, prompts), strict=True):
        assert relative_error(ours, theirs) < 1e-4


def test_a_tied_head_that_was_written_all_the_same_is_let_pass(tmp_path: Path) -> None:
    model_type, config = CASES["llama, tied embeddings"]
    write_checkpoint(tmp_path, model_type, config())
    tensors = load_file(tmp_path / "model.safetensors")
    copy = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": copy}, tmp_path / "model.safetensors")

    assert load(tmp_path).info.task == "generate"
