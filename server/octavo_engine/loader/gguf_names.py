"""Tensor names of GGUF files in Hugging Face's terms."""

from __future__ import annotations

import re

_TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.([a-z_0-9]+)\.(weight|bias)")


def hugging_face_name(name: str, architecture: str) -> str:
    """The name a model asks for; tensors nobody asks for keep their own."""
    if name in _TOP_LEVEL:
        return _TOP_LEVEL[name]
    found = _LAYER.fullmatch(name)
    if found is None or found[2] not in _IN_LAYER:
        return name
    return f"model.layers.{found[1]}.{_IN_LAYER[found[2]]}.{found[3]}"
