"""The compressed-tensors layout, which transformers, vLLM and Octavo read.

Source: the compressed-tensors package (formats `pack-quantized` and `int-quantized`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from octavo_engine.quantize.scheme import Scheme
from octavo_kernels.quantized_weights import IntWeight


def encode(prefix: str, weight: IntWeight, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The tensors that stand for `prefix.weight`: plain int8 beside int8 activations, else packed into int32."""
    if scheme.activation_bits == 8:
        return {f"{prefix}.weight": weight.codes, f"{prefix}.weight_scale": weight.scales}
    unsigned = weight.codes.to(torch.int64) + (0 if weight.bits == 4 else 1 << (weight.bits - 1))
    tensors = {
        f"{prefix}.weight_packed": pack(unsigned, weight.bits),
        f"{prefix}.weight_scale": weight.scales,
        f"{prefix}.weight_shape": torch.tensor(weight.shape),
    }
    if weight.zeros is not None:
        zeros = pack(weight.zeros.to(torch.int64).t(), weight.bits)
        tensors[f"{prefix}.weight_zero_point"] = zeros.t().contiguous()
    return tensors


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers of 4 or 8 bits, the first in the lowest bits. [rows, n] -> [rows, ceil(n * bits / 32)] int32."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % per_word))
    words = padded.view(values.shape[0], -1, per_word) << torch.arange(0, 32, bits, device=values.device)
    total = words.sum(-1)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def quantization_config(
    scheme: Scheme, ignored: Sequence[str], exact: Scheme, exactly: Sequence[str]
) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    ignored: linear layers that keep their precision. exactly: those rounded as `exact` says.
    """
    layout = "int-quantized" if scheme.activation_bits == 8 else "pack-quantized"
    groups = {"group_0": _group(scheme, ["Linear"], layout)}
    if exactly:
        groups["group_1"] = _group(exact, exactly, layout)
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }


def _group(scheme: Scheme, targets: Sequence[str], layout: str) -> dict[str, Any]:
    grouped = scheme.group_size > 0
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": scheme.group_size if grouped else None,
        "dynamic": False,
        "observer": "minmax",
    }
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": activations if scheme.activation_bits == 8 else None,
        "output_activations": None,
        "format": layout,
    }
