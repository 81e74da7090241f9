"""GGUF metadata in the terms of Hugging Face's config.json, so that each model reads its settings in one place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from octavo_engine.errors import ModelLoadError
from octavo_engine.loader.gguf_file import GGUFTensor, MetadataValue

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
}
_FIELDS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}


def config_from_metadata(
    metadata: Mapping[str, MetadataValue], tensors: Mapping[str, GGUFTensor], path: Path
) -> dict[str, Any]:
    """The configuration values; what is missing is reported by whoever reads them."""
    family = str(metadata.get("general.architecture", ""))
    if family not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise ModelLoadError(f"{path}: GGUF architecture {family!r} is not supported; known are {known}")
    own = {key.removeprefix(f"{family}."): value for key, value in metadata.items() if key.startswith(f"{family}.")}
    config: dict[str, Any] = {name: own[key] for key, name in _FIELDS.items() if key in own}
    config["architectures"] = [_ARCHITECTURES[family]]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    embedding = tensors.get("token_embd.weight")
    if embedding is not None:
        config["vocab_size"] = embedding.shape[0]
    stop = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    config["eos_token_id"] = [i for i in dict.fromkeys(stop) if isinstance(i, int)]
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    rope = _rope(own, tensors, config)
    if rope:
        config["rope_parameters"] = rope
    return config


def _rope(
    own: Mapping[str, MetadataValue], tensors: Mapping[str, GGUFTensor], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Rope settings: partial rotation, linear or YaRN scaling, and frequency divisors stored as a tensor (Llama 3)."""
    rope: dict[str, Any] = {}
    head_dim = config.get("head_dim") or _head_dim(config)
    turning = own.get("rope.dimension_count")
    if isinstance(turning, int) and head_dim and turning < head_dim:
        rope["partial_rotary_factor"] = turning / head_dim
    divisors = tensors.get("rope_freqs.weight")
    if divisors is not None:
        factors = divisors.data.reshape(-1).view(torch.float32).tolist()
        same = {"short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
        return {**rope, "rope_type": "longrope", **same}
    kind = own.get("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope["rope_type"] = kind
        rope["factor"] = own.get("rope.scaling.factor", 1.0)
        rope["original_max_position_embeddings"] = own.get("rope.scaling.original_context_length")
    return rope


def _head_dim(config: Mapping[str, Any]) -> int:
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else 0
