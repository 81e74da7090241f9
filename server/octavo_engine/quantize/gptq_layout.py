"""The GPTQ layout of 4-bit weights, which vLLM, GPTQModel, SGLang and Octavo read.

Source: the AutoGPTQ checkpoint format; version 1 stores zero points minus one, version 2 as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from octavo_engine.errors import ConfigError
from octavo_engine.quantize.compressed_tensors import pack
from octavo_engine.quantize.scheme import Scheme
from octavo_kernels.quantized_weights import IntWeight

PER_WORD = 8


def encode(prefix: str, weight: IntWeight, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The tensors that stand for `prefix.weight`: inputs packed along the first dimension."""
    zeros = weight.zeros if weight.zeros is not None else torch.full_like(weight.scales, weight.symmetric_zero)
    stored = zeros.to(torch.int64) - (1 if scheme.symmetric else 0)
    return {
        f"{prefix}.qweight": pack(weight.codes.to(torch.int64), 4).t().contiguous(),
        f"{prefix}.qzeros": pack(stored.t().contiguous(), 4),
        f"{prefix}.scales": weight.scales.t().half().contiguous(),
        f"{prefix}.g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // weight.group_size,
    }


def quantization_config(scheme: Scheme) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    return {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size or -1,
        "desc_act": False,
        "sym": scheme.symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
    }


def check(scheme: Scheme, rows: Sequence[int]) -> None:
    """Raise `ConfigError` for what the layout cannot hold. rows: of each projection."""
    if scheme.bits != 4 or scheme.activation_bits != 16:
        raise ConfigError(f"format gptq: holds 4-bit weights, not {scheme.name}; use compressed-tensors")
    odd = [count for count in rows if count % PER_WORD]
    if odd:
        raise ConfigError(f"format gptq: needs projections of a multiple of {PER_WORD} rows, found {odd[0]}")
