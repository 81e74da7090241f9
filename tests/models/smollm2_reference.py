"""The real SmolLM2 in transformers, from the same GGUF file: dequantized by the `gguf` package, float32."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load_reference(path: Path) -> torch.nn.Module:
    """`LlamaForCausalLM` with the file's weights."""
    reader = gguf.GGUFReader(path)

    def value(key: str) -> int:
        return reader.fields[f"llama.{key}"].contents()

    config = transformers.LlamaConfig(
        vocab_size=value("vocab_size"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        role = tensor.name.split(".")[-2]
        if role in heads:
            weight = _split_halves(weight, heads[role])
        state[_hf_name(tensor.name)] = torch.from_numpy(np.array(weight, dtype=np.float32))
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def _hf_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, index, role, _ = name.split(".")
    return f"model.layers.{index}.{_NAMES[role]}.weight"


def _split_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF stores the two dimensions that turn together side by side; transformers keeps them half a head apart."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.concatenate((pairs[:, :, 0], pairs[:, :, 1]), axis=1).reshape(rows, columns)
