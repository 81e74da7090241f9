"""GGUF metadata in the terms of Hugging Face's config.json, so that each model reads its settings in one place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from octavo_engine.errors import ModelLoadError
from octavo_engine.loader.gguf_file import GGUFTensor, MetadataValue

Metadata = Mapping[str, MetadataValue]
Tensors = Mapping[str, GGUFTensor]

_ARCHITECTURES = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "gpt-oss": "GptOssForCausalLM",
    "llama": "LlamaForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
_FIELDS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_count": "num_local_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_used_count": "num_experts_per_tok",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, which scale their queries differently


def config_from_metadata(metadata: Metadata, tensors: Tensors, path: Path) -> dict[str, Any]:
    """The configuration values; what is missing is reported by whoever reads them."""
    family = str(metadata.get("general.architecture", ""))
    if family not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise ModelLoadError(f"{path}: GGUF architecture {family!r} is not supported; known are {known}")
    own = {key.removeprefix(f"{family}."): value for key, value in metadata.items() if key.startswith(f"{family}.")}
    config: dict[str, Any] = {name: own[key] for key, name in _FIELDS.items() if key in own}
    config["architectures"] = [_ARCHITECTURES[family]]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if "token_embd.weight" in tensors:
        config["vocab_size"] = tensors["token_embd.weight"].shape[0]
    stop = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    config["eos_token_id"] = [i for i in dict.fromkeys(stop) if isinstance(i, int)]
    config["rope_parameters"] = _rope(own, tensors, config)
    _particular(family, config)
    return config


def _particular(family: str, config: dict[str, Any]) -> None:
    """What llama.cpp knows of a family without its being in the file."""
    if family == "llama" and config.get("num_local_experts"):
        config["architectures"] = ["MixtralForCausalLM"]
    if family == "gpt-oss":
        config["intermediate_size"] = config.get("moe_intermediate_size")
        config["rope_parameters"]["truncate"] = False
    if family == "qwen3moe":
        config["norm_topk_prob"] = True
    if family in _LARGEST_GEMMA:
        width = _head_dim(config)
        if config.get("num_hidden_layers") == _LARGEST_GEMMA[family]:
            width = config["hidden_size"] // config["num_attention_heads"]
        config["query_pre_attn_scalar"] = width


def _rope(own: Metadata, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope settings: partial rotation, linear or YaRN scaling, and frequency divisors kept as tensors."""
    rope: dict[str, Any] = {}
    turning, head_dim = own.get("rope.dimension_count"), _head_dim(config)
    if isinstance(turning, int) and head_dim and turning < head_dim:
        rope["partial_rotary_factor"] = turning / head_dim
    short, long = (tensors.get(f"rope_factors_{name}.weight", tensors.get("rope_freqs.weight")) for name in _LENGTHS)
    if short is not None and long is not None:
        rope |= {"rope_type": "longrope", "short_factor": _numbers(short), "long_factor": _numbers(long)}
        rope["attention_factor"] = 1.0 if "rope_freqs.weight" in tensors else own.get("rope.scaling.attn_factor")
        return rope
    kind = own.get("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope["rope_type"] = kind
        rope["factor"] = own.get("rope.scaling.factor", 1.0)
        rope["original_max_position_embeddings"] = own.get("rope.scaling.original_context_length")
    return rope


_LENGTHS = ("short", "long")


def _numbers(tensor: GGUFTensor) -> list[float]:
    values: list[float] = tensor.data.reshape(-1).view(torch.float32).tolist()
    return values


def _head_dim(config: Mapping[str, Any]) -> int:
    """The stated width of a head, or what hidden size and heads make it; 0 where the file says neither."""
    stated, hidden, heads = (config.get(key) for key in ("head_dim", "hidden_size", "num_attention_heads"))
    if isinstance(stated, int):
        return stated
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else 0
