"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from octavo_engine.layers.linear import Linear
from octavo_kernels import ops
from octavo_kernels.step import Activation

GatedActivation = Callable[[torch.Tensor], torch.Tensor]  # [T, 2 * dim] -> [T, dim]

GATED: dict[Activation, GatedActivation] = {
    Activation.SILU: ops.silu_and_mul,
    Activation.GELU: ops.gelu_and_mul,
}


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(activation(gate(x)) * up(x)); gate and up are one projection."""

    gate_up: Linear
    down: Linear
    activation: GatedActivation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.gate_up(x)))
