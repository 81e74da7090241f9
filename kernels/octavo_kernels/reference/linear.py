"""Matrix products with dense or quantized weights."""

from __future__ import annotations

import torch
from torch.nn import functional

from octavo_kernels.weights import GGUFWeight, QuantizedWeight, Weight


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias. x: [T, in_features] -> [T, out_features] in x's dtype.

    A quantized weight is multiplied as the dense matrix it stands for; other backends may quantize x on the fly.
    """
    dense = weight.dequantize(x.dtype) if isinstance(weight, QuantizedWeight) else weight
    return functional.linear(x, dense, bias)


def embedding(token_ids: torch.Tensor, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the embedding matrix. token_ids: [T] int64 -> [T, dim] of `dtype`."""
    if isinstance(weight, GGUFWeight):
        rows = GGUFWeight(weight.data[token_ids], weight.ggml_type, weight.in_features)
        return rows.dequantize(dtype)
    dense = weight.dequantize(dtype) if isinstance(weight, QuantizedWeight) else weight
    return functional.embedding(token_ids, dense).to(dtype)


def pack_weight(weight: Weight) -> Weight:
    """Bring a weight into the layout the device's kernels want, once at load time. The reference keeps it."""
    return weight
