"""Mixture of experts: choosing experts for each token, and their gated MLPs."""

from __future__ import annotations

import torch
from torch.nn import functional

from octavo_kernels.expert_weights import ExpertWeight
from octavo_kernels.reference.activation import clamped_swiglu_and_mul, gelu_and_mul, silu_and_mul


def route_experts(
    router_logits: torch.Tensor,
    top_k: int,
    sigmoid: bool = False,
    renormalize: bool = True,
    correction_bias: torch.Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [T, top_k] float32, expert ids [T, top_k] int32), best first. router_logits: [T, E].

    Scores are a softmax over all experts, or sigmoids (DeepSeek-V3). correction_bias [E] takes part in the choice
    only. With num_groups > 1 only experts of the top_groups groups may be chosen, a group being worth the sum of its
    two best. renormalize makes the weights sum to one before `scale`; with softmax this equals a softmax over the
    chosen logits (Mixtral, gpt-oss).
    """
    logits = router_logits.float()
    scores = torch.sigmoid(logits) if sigmoid else torch.softmax(logits, -1)
    choice = scores if correction_bias is None else scores + correction_bias.float()
    if num_groups > 1:
        grouped = choice.view(choice.shape[0], num_groups, -1)
        worth = grouped.topk(min(2, grouped.shape[2]), -1).values.sum(-1)
        chosen = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, worth.topk(top_groups, -1).indices, True)
        choice = grouped.masked_fill(~chosen.unsqueeze(-1), float("-inf")).flatten(1)
    ids = choice.topk(top_k, -1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, ids.int()


def moe_mlp(
    x: torch.Tensor,
    gate_up: ExpertWeight,
    down: ExpertWeight,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    activation: str = "silu_and_mul",
    alpha: float = 1.702,
    limit: float = 7.0,
) -> torch.Tensor:
    """Sum over each token's experts of weight * down(activation(gate_up(x))). x: [T, dim] -> [T, dim].

    weights, expert_ids: [T, top_k] as from `route_experts`; ids outside the experts are left out (an expert on
    another rank). activation: silu_and_mul, gelu_and_mul or clamped_swiglu_and_mul (with alpha and limit).
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(gate_up.num_experts):
        token, place = (expert_ids == expert).nonzero(as_tuple=True)
        hidden = _expert_linear(x[token], gate_up, expert)
        hidden = _expert_linear(_activate(hidden, activation, alpha, limit), down, expert)
        out.index_add_(0, token, hidden.float() * weights[token, place].unsqueeze(1))
    return out.to(x.dtype)


def _expert_linear(x: torch.Tensor, weight: ExpertWeight, expert: int) -> torch.Tensor:
    bias = weight.bias[expert].to(x.dtype) if weight.bias is not None else None
    return functional.linear(x, weight.dequantize(expert, x.dtype), bias)


def _activate(x: torch.Tensor, activation: str, alpha: float, limit: float) -> torch.Tensor:
    if activation == "silu_and_mul":
        return silu_and_mul(x)
    if activation == "gelu_and_mul":
        return gelu_and_mul(x)
    if activation == "clamped_swiglu_and_mul":
        return clamped_swiglu_and_mul(x, alpha, limit)
    raise ValueError(f"moe_mlp: unknown activation {activation!r}")
