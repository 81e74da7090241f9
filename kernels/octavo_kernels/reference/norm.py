"""Normalisation."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32.

    x: [..., dim]; weight: [dim] in x's dtype or float32 (models with `1 + weight` fold the one in at load time).
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x to the residual stream and normalise the sum: returns (rms_norm(x + residual), x + residual).

    x, residual: [T, dim], same dtype. Implementations may overwrite both inputs.
    """
    total = x + residual
    return rms_norm(total, weight, eps), total


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(x - mean) / std * weight + bias over the last dimension."""
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)
