"""GGUF files of every supported family give the logits of the model they were made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as hf

from models.gguf_checkpoints import write_gguf
from models.tiny_checkpoints import (
    SIZES,
    load,
    paged_logits,
    random_prompts,
    reference_logits,
    relative_error,
    write_checkpoint,
)
from octavo_engine.errors import ModelLoadError

WIDE = {**SIZES, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA = {**WIDE, "sliding_window": 6, "query_pre_attn_scalar": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
CASES: dict[str, tuple[str, type, Callable[[], Any]]] = {
    "llama": ("llama", hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**WIDE)),
    "mixtral": (
        "llama",
        hf.MixtralForCausalLM,
        lambda: hf.MixtralConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2),
    ),
    "qwen2": ("qwen2", hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**WIDE)),
    "qwen3": ("qwen3", hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(**WIDE, tie_word_embeddings=True)),
    "qwen3moe": ("qwen3moe", hf.Qwen3MoeForCausalLM, lambda: hf.Qwen3MoeConfig(**WIDE, **EXPERTS)),
    "gemma2": ("gemma2", hf.Gemma2ForCausalLM, lambda: hf.Gemma2Config(**GEMMA)),
    "gemma3": ("gemma3", hf.Gemma3ForCausalLM, lambda: hf.Gemma3TextConfig(**GEMMA)),
    "gpt-oss": (
        "gpt-oss",
        hf.GptOssForCausalLM,
        lambda: hf.GptOssConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
    ),
    "phi3": ("phi3", hf.Phi3ForCausalLM, lambda: hf.Phi3Config(**WIDE)),
    "smollm3": ("smollm3", hf.SmolLM3ForCausalLM, lambda: hf.SmolLM3Config(**{**WIDE, "num_hidden_layers": 4})),
}


def make(name: str, folder: Path, quantization: str) -> tuple[torch.nn.Module, Path]:
    family, model_type, config = CASES[name]
    model, path = write_checkpoint(folder / "hf", model_type, config()), folder / "model.gguf"
    write_gguf(path, model, family, quantization)
    return model, path


@pytest.mark.parametrize("name", CASES)
def test_float32_files_give_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model, path = make(name, tmp_path, "F32")
    prompts = random_prompts((3, 25))

    found = paged_logits(load(path), prompts)

    for ours, theirs in zip(found, reference_logits(model, prompts), strict=True):
        assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3moe"])
def test_blocks_move_whole_when_rows_are_reordered_or_split_by_expert(name: str, tmp_path: Path) -> None:
    model, path = make(name, tmp_path, "Q8_0")
    prompts = random_prompts((3, 25))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                blocks = gguf.quants.quantize(parameter.numpy(), gguf.GGMLQuantizationType.Q8_0)
                rounded = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
                parameter.copy_(torch.from_numpy(rounded))

    found = paged_logits(load(path), prompts)

    for ours, theirs in zip(found, reference_logits(model, prompts), strict=True):
        assert relative_error(ours, theirs) < 1e-4


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    with pytest.raises(ModelLoadError, match="'mamba' is not supported; known are gemma2, gemma3, gpt-oss, llama"):
        load(path)
