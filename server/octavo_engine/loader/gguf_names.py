"""Tensor names of GGUF files in Hugging Face's terms."""

from __future__ import annotations

import re
from collections.abc import Mapping

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
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PARTICULAR: Mapping[str, Mapping[str, str]] = {
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gpt-oss": {
        "attn_sinks": "self_attn.sinks",
        "ffn_gate_inp": "mlp.router",
        "post_attention_norm": "post_attention_layernorm",
    },
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    "llama": {  # Mixtral, the only mixture of experts under this name
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
    },
}
_LAYER = re.compile(r"blk\.(\d+)\.([a-z_0-9]+)\.(weight|bias)")


def hugging_face_name(name: str, architecture: str) -> str:
    """The name a model asks for, with `{expert}` where a tensor stacks all experts; unknown ones keep their own."""
    if name in _TOP_LEVEL:
        return _TOP_LEVEL[name]
    found = _LAYER.fullmatch(name)
    roles = {**_IN_LAYER, **_PARTICULAR.get(architecture, {})}
    if found is None or found[2] not in roles:
        return name
    name = f"model.layers.{found[1]}.{roles[found[2]]}.{found[3]}"
    return name.removesuffix(".weight") if name.endswith(".sinks.weight") else name
