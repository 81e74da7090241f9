"""Projections: one weight, or several whose outputs stand side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from octavo_kernels import ops
from octavo_kernels.weights import Weight


@dataclass(frozen=True, slots=True)
class Linear:
    """x @ weight.T + bias, where the weight may be in parts (mixed storage formats that cannot be one matrix).

    reduce: sums products over the ranks that hold the other inputs.
    """

    parts: tuple[Weight, ...]
    bias: torch.Tensor | None = None
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.reduce is not None:
            out = self.reduce(ops.linear(x, self.weight))
            return out if self.bias is None else out + self.bias
        if len(self.parts) == 1:
            return ops.linear(x, self.parts[0], self.bias)
        out = torch.cat([ops.linear(x, part) for part in self.parts], dim=-1)
        return out if self.bias is None else out + self.bias

    @property
    def weight(self) -> Weight:
        """The only part."""
        (part,) = self.parts
        return part
