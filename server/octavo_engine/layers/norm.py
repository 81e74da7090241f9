"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from octavo_kernels import ops


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Root-mean-square norm over the last dimension. weight: [dim]."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Add x to the residual stream (None: x starts it); returns the normed sum and the sum."""
        if residual is None:
            return self(x), x
        return ops.add_rms_norm(x, residual, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class SharedRMSNorm:
    """Root-mean-square norm over a dimension of which each rank holds a part. weight: [held].

    size: values summed over all ranks, those that several hold counted each time. reduce: None where one rank has all.
    """

    weight: torch.Tensor
    eps: float
    size: int
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.reduce is None:
            return ops.rms_norm(x.contiguous(), self.weight, self.eps)
        squares = self.reduce(x.float().square().sum(-1, keepdim=True))
        return (x.float() * torch.rsqrt(squares / self.size + self.eps) * self.weight).to(x.dtype)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Mean and variance norm over the last dimension. weight, bias: [dim]."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)
