"""A mixture of experts as one op, for devices where waiting to learn which experts were chosen costs more than work.

Stacks the experts of a `MoE` into single tensors. On a GPU the whole layer then runs without the host looking at a
router's choice, so that decode steps can be captured as CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from octavo_engine.layers.linear import Linear
from octavo_engine.layers.mlp import GatedMLP
from octavo_engine.layers.moe import MoE, SharedExpert
from octavo_engine.layers.routing import Routing
from octavo_kernels import ops
from octavo_kernels.expert_weights import ExpertWeight, join_rows
from octavo_kernels.quantized_weights import Fp8Weight
from octavo_kernels.registry import REFERENCE, Op
from octavo_kernels.weights import QuantizedWeight


@dataclass(frozen=True, slots=True)
class FusedMoE:
    """Router, routed experts and shared expert; see `ops.moe_mlp`. alpha, limit: of the clamped activation.

    first_expert, reduce: see `MoE`.
    """

    router: Linear
    gate_up: ExpertWeight
    down: ExpertWeight
    routing: Routing
    activation: str
    alpha: float
    limit: float
    shared: SharedExpert | GatedMLP | None = None
    first_expert: int = 0
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weights, experts = self.routing(self.router(x))
        local = experts - self.first_expert if self.first_expert else experts
        out = ops.moe_mlp(
            x, self.gate_up, self.down, weights, local, self.activation, alpha=self.alpha, limit=self.limit
        )
        out = out if self.shared is None else out + self.shared(x)
        return out if self.reduce is None else self.reduce(out)


def fuse(moe: MoE) -> MoE | FusedMoE:
    """The layer as one op where its experts can be stacked, else the layer as it is.

    Dense experts can, and quantized ones of one format for which there is a kernel; experts in parts cannot.
    """
    gate_up = _stacked([expert.gate_up for expert in moe.experts])
    down = _stacked([expert.down for expert in moe.experts])
    activation = _activation(moe.experts[0])
    if gate_up is None or down is None or activation is None:
        return moe
    name, alpha, limit = activation
    if isinstance(gate_up.data, QuantizedWeight) and not _has_kernel(gate_up, down, name):
        return moe
    return FusedMoE(
        moe.router,
        gate_up,
        down,
        moe.routing,
        name,
        alpha,
        limit,
        moe.shared,
        moe.first_expert,
        moe.reduce,
    )


def _has_kernel(gate_up: ExpertWeight, down: ExpertWeight, activation: str) -> bool:
    """Whether a backend multiplies these without making them dense at every step."""
    device = gate_up.data.device
    x = torch.empty((1, gate_up.data.shape[-1]), device=device)
    weights, experts = torch.ones((1, 1), device=device), torch.zeros((1, 1), dtype=torch.int32, device=device)
    return ops.moe_mlp.backend_for(x, gate_up, down, weights, experts, activation) != REFERENCE


def _activation(expert: GatedMLP) -> tuple[str, float, float] | None:
    """(name of the op, alpha, limit)."""
    function = expert.activation
    if isinstance(function, Op):
        return function.name, 0.0, 0.0
    if isinstance(function, partial) and isinstance(function.func, Op):
        return function.func.name, function.keywords.get("alpha", 0.0), function.keywords.get("limit", 0.0)
    return None


def _stacked(projections: list[Linear]) -> ExpertWeight | None:
    """One tensor for all experts, or None."""
    if any(len(projection.parts) != 1 for projection in projections):
        return None
    biases = [projection.bias for projection in projections if projection.bias is not None]
    bias = torch.stack(biases) if len(biases) == len(projections) else None
    weights = [projection.weight for projection in projections]
    dense = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    if len(dense) == len(weights):
        return ExpertWeight(torch.stack(dense), None, bias)
    quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    joined = join_rows(quantized) if len(quantized) == len(weights) else None
    if isinstance(joined, Fp8Weight) and not joined.is_blockwise:
        rows, columns = weights[0].shape
        return ExpertWeight(joined.codes.view(len(weights), rows, columns), joined.scale.view(-1, rows), bias)
    return ExpertWeight(joined, None, bias, len(weights)) if joined is not None else None
