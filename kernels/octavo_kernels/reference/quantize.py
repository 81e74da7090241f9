"""Symmetric 8-bit quantization of activations, one scale for each row, alone or fused with what produced the row."""

from __future__ import annotations

import torch

from octavo_kernels.reference.activation import silu_and_mul
from octavo_kernels.reference.kv_cache import quantize_kv
from octavo_kernels.reference.norm import rms_norm


def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [T, dim] -> (codes [T, dim] of `dtype`, int8 or float8_e4m3fn; scale [T] float32); x = codes * scale."""
    return quantize_kv(x, dtype)


def rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` then `quantize_rows`, without rounding to x's dtype in between. x: [T, dim]."""
    return quantize_rows(rms_norm(x.float(), weight, eps), dtype)


def add_rms_norm_quantize(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`add_rms_norm` with a quantized result: (codes, scale [T], x + residual)."""
    total = x + residual
    return (*rms_norm_quantize(total, weight, eps, dtype), total)


def silu_and_mul_quantize(gate_up: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`silu_and_mul` then `quantize_rows`, in float32 between them. gate_up: [T, 2 * dim] -> codes [T, dim]."""
    return quantize_rows(silu_and_mul(gate_up.float()), dtype)
