"""What decides how much memory a model needs, as its checkpoint says, and the verdict whether it fits. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_STORED_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}


@dataclass(frozen=True)
class ModelShape:
    """What of a checkpoint decides its memory. `weight_bytes` as stored; sizes in elements."""

    weight_bytes: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    kv_elements: int  # of keys and values of one token in one layer
    max_model_len: int
    stored_bytes: int = 2  # of a weight
    quantized: bool = False  # as stored
    tied_embedding: bool = True


@dataclass(frozen=True)
class Fit:
    """The verdict, and the numbers behind it in words. Bytes over all ranks; `request_bytes` is the cache of one
    request of full length."""

    fits: bool
    message: str
    weight_bytes: int = 0
    request_bytes: int = 0


def shape_of(config: Mapping[str, Any], weight_bytes: int) -> ModelShape | None:
    """The shape that a checkpoint's config.json tells; None when it is not one of a transformer as we know them."""
    inner = config.get("text_config")
    text: Mapping[str, Any] = inner if isinstance(inner, Mapping) else config
    both = {**text, **config}
    try:
        heads, hidden = int(text["num_attention_heads"]), int(text["hidden_size"])
        if text.get("kv_lora_rank"):  # latent attention keeps one compressed vector for all heads
            kv_elements = int(text["kv_lora_rank"]) + int(text.get("qk_rope_head_dim") or 0)
        else:
            head_dim = int(text.get("head_dim") or hidden // heads)
            kv_elements = 2 * int(text.get("num_key_value_heads") or heads) * head_dim
        return ModelShape(
            weight_bytes=weight_bytes,
            layers=int(text["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(text.get("intermediate_size") or 4 * hidden),
            vocabulary=int(text["vocab_size"]),
            kv_elements=kv_elements,
            max_model_len=int(text["max_position_embeddings"]),
            stored_bytes=_STORED_BYTES.get(str(both.get("torch_dtype") or both.get("dtype") or ""), 2),
            quantized="quantization_config" in both,
            tied_embedding=bool(both.get("tie_word_embeddings", True)),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError):
        return None
