"""A mixture of experts as one op, for devices where waiting to learn which experts were chosen costs more than work.

Stacks the experts of a `MoE` into single tensors. On a GPU the whole layer then runs without the host looking at a
router's choice, so that decode steps can be captured as CUDA graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from octavo_engine.layers.linear import Linear
from octavo_engine.layers.mlp import GatedMLP
from octavo_engine.layers.moe import MoE, SharedExpert
from octavo_kernels import ops
from octavo_kernels.expert_weights import ExpertWeight
from octavo_kernels.quantized_weights import Fp8Weight
from octavo_kernels.registry import Op


@dataclass(frozen=True, slots=True)
class FusedMoE:
    """Router, routed experts and shared expert; see `ops.moe_mlp`. alpha, limit: of the clamped activation."""

    router: Linear
    gate_up: ExpertWeight
    down: ExpertWeight
    top_k: int
    renormalize: bool
    activation: str
    alpha: float
    limit: float
    shared: SharedExpert | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weights, experts = ops.route_experts(self.router(x), self.top_k, False, self.renormalize)
        out = ops.moe_mlp(
            x, self.gate_up, self.down, weights, experts, self.activation, alpha=self.alpha, limit=self.limit
        )
        return out if self.shared is None else out + self.shared(x)


def fuse(moe: MoE) -> MoE | FusedMoE:
    """The layer as one op where its experts can be stacked, else the layer as it is.

    Dense experts and those in float8 with a scale for each row can; experts in parts, or in formats that are read in
    blocks, cannot.
    """
    gate_up = _stacked([expert.gate_up for expert in moe.experts])
    down = _stacked([expert.down for expert in moe.experts])
    activation = _activation(moe.experts[0])
    if gate_up is None or down is None or activation is None:
        return moe
    name, alpha, limit = activation
    return FusedMoE(moe.router, gate_up, down, moe.top_k, moe.renormalize, name, alpha, limit, moe.shared)


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
    rows = [weight for weight in weights if isinstance(weight, Fp8Weight) and weight.scale.shape == weight.shape[:1]]
    if len(rows) == len(weights):
        # Bytes: torch stacks no float8 on some devices.
        codes = torch.stack([row.codes.view(torch.uint8) for row in rows]).view(torch.float8_e4m3fn)
        return ExpertWeight(codes, torch.stack([row.scale for row in rows]), bias)
    return None
