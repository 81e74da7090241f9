"""Feed-forward layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo_engine.layers.linear import Linear
from octavo_kernels import ops
from octavo_kernels.step import Activation


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(activation(gate(x)) * up(x)); gate and up are one projection."""

    gate_up: Linear
    down: Linear
    activation: Activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(gated(self.activation, self.gate_up(x)))


def gated(activation: Activation, gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 * dim] -> [T, dim]."""
    return ops.silu_and_mul(gate_up) if activation is Activation.SILU else ops.gelu_and_mul(gate_up)
