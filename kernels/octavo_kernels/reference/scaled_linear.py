"""Products of 8-bit matrices with scales."""

from __future__ import annotations

import torch
from torch.nn import functional

SCALE_BLOCK = 128


def scaled_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation((x * x_scale) @ (weight * weight_scale).T + bias) + residual, in `dtype`.

    x: [T, in] and weight: [out, in], both int8 or both float8_e4m3fn. x_scale: [T], or [T, in / 128] beside
    weight_scale [out / 128, in / 128] (blocks of 128, rounded up); else weight_scale is [out] or [1].
    activation: None, "silu" or "gelu" (tanh). residual: [T, out].
    """
    wide = _scaled(x, x_scale if x_scale.dim() == 2 else x_scale.unsqueeze(1), 1)
    blockwise = weight_scale.dim() == 2
    dense = _scaled(weight, weight_scale if blockwise else weight_scale.view(-1, 1), SCALE_BLOCK if blockwise else 1)
    out = functional.linear(wide, dense, bias.float() if bias is not None else None)
    if activation == "silu":
        out = functional.silu(out)
    elif activation == "gelu":
        out = functional.gelu(out, approximate="tanh")
    return (out if residual is None else out + residual.float()).to(dtype)


def _scaled(codes: torch.Tensor, scale: torch.Tensor, rows_each: int) -> torch.Tensor:
    """codes [rows, in] times scale [rows / rows_each, 1 or in / 128], float32."""
    rows, columns = codes.shape
    spread = scale.repeat_interleave(rows_each, 0)[:rows] if rows_each > 1 else scale
    if scale.shape[1] > 1 or columns <= SCALE_BLOCK:
        spread = spread.repeat_interleave(SCALE_BLOCK, 1)[:, :columns]
    return codes.float() * spread
