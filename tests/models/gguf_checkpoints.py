"""Small GGUF files made from transformers' models, the way llama.cpp's converter lays them out."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch

PERMUTED = ("llama", "smollm3")


def write_gguf(path: Path, model: torch.nn.Module, family: str, quantization: str = "F32") -> None:
    """Every matrix in `quantization`, vectors in float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim := getattr(config, "head_dim", config.hidden_size // config.num_attention_heads))
    writer.add_rope_dimension_count(head_dim)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_eos_token_id(2)
    _add_particular(writer, config, family)
    architecture = gguf.MODEL_ARCH[family.upper().replace("-", "_")]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, weight in _tensors(model, family).items():
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, name
        _add_tensor(writer, mapped, weight, quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_particular(writer: gguf.GGUFWriter, config: object, family: str) -> None:
    if getattr(config, "num_experts_per_tok", None):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    if family.startswith(("gemma", "gpt-oss")):
        writer.add_sliding_window(config.sliding_window)
    if config.rope_parameters.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _tensors(model: torch.nn.Module, family: str) -> dict[str, torch.Tensor]:
    """By the names that llama.cpp's name map knows."""
    state = {name: weight.detach().float() for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in state.items():
        if family == "gpt-oss" and ".mlp.experts." in name:
            tensors |= _gpt_oss_experts(name, weight)
        elif family == "gpt-oss" and name.endswith(".sinks"):
            tensors[f"{name}.weight"] = weight
        elif name.endswith("experts.gate_up_proj"):
            gate, up = weight.chunk(2, dim=1)
            stem = name.removesuffix("gate_up_proj")
            tensors |= {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            tensors[f"{name}.weight"] = weight
        elif family in PERMUTED and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = model.config.num_attention_heads if "q_proj" in name else model.config.num_key_value_heads
            tensors[name] = _pairs_from_halves(weight, heads)
        elif family.startswith("gemma") and name.endswith("norm.weight"):
            tensors[name] = weight + 1
        else:
            tensors[name] = weight
    return tensors


def _gpt_oss_experts(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gate and up alternate in transformers; matrices are [experts, in, out] there."""
    stem, _, part = name.rpartition(".")
    kind = "bias" if part.endswith("_bias") else "weight"
    rows = weight if kind == "bias" else weight.transpose(1, 2)
    if part.startswith("down_proj"):
        return {f"{stem}.down_proj.{kind}": rows}
    return {f"{stem}.gate_proj.{kind}": rows[:, 0::2], f"{stem}.up_proj.{kind}": rows[:, 1::2]}


def _pairs_from_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    rows, columns = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, columns)
    return torch.stack((halves[:, 0], halves[:, 1]), dim=2).reshape(rows, columns)


def _add_tensor(writer: gguf.GGUFWriter, name: str, weight: torch.Tensor, quantization: str) -> None:
    values = weight.contiguous().numpy()
    if values.ndim == 1 or quantization == "F32":
        writer.add_tensor(name, values.astype(np.float32))
        return
    kind = gguf.GGMLQuantizationType[quantization]
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
