"""Mixture of experts: the router in one launch, the experts' MLPs as two grouped products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels import ops
from octavo_kernels.expert_weights import ExpertWeight
from octavo_kernels.triton import mode
from octavo_kernels.triton.environment import runs_here, sigmoid
from octavo_kernels.triton.grouped_gemm import SortedRows, grouped_product, sort_by_group
from octavo_kernels.triton.grouped_packed import grouped_packed_product
from octavo_kernels.triton.packed_weight import PackedWeight
from octavo_kernels.triton.tuning import LaunchConfig, launch_config

MAX_EXPERTS = 1_024
EXCLUDED = tl.constexpr(float("-inf"))


@triton.jit
def _router_kernel(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, stride, num_experts, scale,
    SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, BIAS: tl.constexpr, NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """One token a program; EXPERTS is num_experts rounded up to a power of two, SLOTS likewise of TOP_K."""
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EXPERTS)
    valid = e < num_experts
    logits = tl.load(logits_ptr + token * stride + e, mask=valid, other=EXCLUDED).to(tl.float32)
    if SIGMOID:
        scores = sigmoid(logits)
    else:
        scores = tl.exp(logits - tl.max(logits, axis=0))
        scores = scores / tl.sum(scores, axis=0)
    choice = scores
    if BIAS:
        choice += tl.load(bias_ptr + e, mask=valid, other=0.0).to(tl.float32)
    choice = tl.where(valid, choice, EXCLUDED)
    if NUM_GROUPS > 1:  # num_experts is a power of two then
        grouped = tl.reshape(choice, (NUM_GROUPS, EXPERTS // NUM_GROUPS))
        inner = tl.arange(0, EXPERTS // NUM_GROUPS)[None, :]
        best, place = tl.max(grouped, axis=1, return_indices=True)
        second = tl.max(tl.where(inner == place[:, None], EXCLUDED, grouped), axis=1)
        worth = best + second
        g = tl.arange(0, NUM_GROUPS)
        allowed = tl.zeros((NUM_GROUPS,), tl.int32)
        for _ in range(TOP_GROUPS):
            _worth, group = tl.max(worth, axis=0, return_indices=True)
            allowed = tl.where(g == group, 1, allowed)
            worth = tl.where(g == group, EXCLUDED, worth)
        choice = tl.reshape(tl.where(allowed[:, None] > 0, grouped, EXCLUDED), (EXPERTS,))
    slots = tl.arange(0, SLOTS)
    weights = tl.zeros((SLOTS,), tl.float32)
    ids = tl.zeros((SLOTS,), tl.int32)
    for slot in range(TOP_K):
        _choice, expert = tl.max(choice, axis=0, return_indices=True)
        weight = tl.sum(tl.where(e == expert, scores, 0.0), axis=0)
        weights = tl.where(slots == slot, weight, weights)
        ids = tl.where(slots == slot, expert, ids)
        choice = tl.where(e == expert, EXCLUDED, choice)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, axis=0) + 1e-20)
    tl.store(weights_ptr + token * TOP_K + slots, weights * scale, mask=slots < TOP_K)
    tl.store(ids_ptr + token * TOP_K + slots, ids, mask=slots < TOP_K)


@triton.jit
def _combine_kernel(
    parts_ptr, ids_ptr, out_ptr, dim, num_experts, TOP_K: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[t] = sum of parts [t * TOP_K + j] over the slots with an expert here. Grid: (tokens, parts of a row)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.arange(0, SLOTS)
    ids = tl.load(ids_ptr + token * TOP_K + slots, mask=slots < TOP_K, other=-1)
    here = (ids >= 0) & (ids < num_experts)
    place = (token * TOP_K + slots)[:, None] * dim + columns[None, :]
    parts = tl.load(parts_ptr + place, mask=here[:, None] & (columns < dim)[None, :], other=0.0).to(tl.float32)
    tl.store(out_ptr + token * dim + columns, tl.sum(parts, axis=0).to(out_ptr.dtype.element_ty), mask=columns < dim)


def _supports_router(
    router_logits: torch.Tensor,
    top_k: int,
    sigmoid: bool = False,
    renormalize: bool = True,
    correction_bias: torch.Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
) -> bool:
    experts = router_logits.shape[1]
    even = num_groups == 1 or (experts == triton.next_power_of_2(experts) and experts // num_groups >= 2)
    powers = num_groups == triton.next_power_of_2(num_groups)
    shape_ok = 0 < top_k <= experts <= MAX_EXPERTS and even and powers and router_logits.shape[0] > 0
    return runs_here(router_logits) and shape_ok and router_logits.stride(1) == 1


@ops.route_experts.register("triton", supports=_supports_router)
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
    """One launch."""
    tokens, experts = router_logits.shape
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=router_logits.device)
    ids = torch.empty((tokens, top_k), dtype=torch.int32, device=router_logits.device)
    _router_kernel[(tokens,)](
        router_logits, correction_bias, weights, ids, router_logits.stride(0), experts, scale,
        SIGMOID=sigmoid, RENORMALIZE=renormalize, BIAS=correction_bias is not None, NUM_GROUPS=num_groups,
        TOP_GROUPS=top_groups, TOP_K=top_k, SLOTS=triton.next_power_of_2(top_k),
        EXPERTS=max(16, triton.next_power_of_2(experts)), num_warps=1 if experts <= 256 else 4,
    )  # fmt: skip
    return weights, ids


_ACTIVATIONS = ("silu_and_mul", "gelu_and_mul", "clamped_swiglu_and_mul")


def _supports_mlp(
    x: torch.Tensor,
    gate_up: ExpertWeight,
    down: ExpertWeight,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    activation: str = "silu_and_mul",
    alpha: float = 1.702,
    limit: float = 7.0,
) -> bool:
    readable = _readable(gate_up) and _readable(down) and x.stride(1) == 1
    return runs_here(x) and readable and x.shape[0] > 0 and activation in _ACTIVATIONS


def _readable(weight: ExpertWeight) -> bool:
    if isinstance(weight.data, torch.Tensor):
        return weight.data.is_contiguous()
    return isinstance(weight.data, PackedWeight)


@ops.moe_mlp.register("triton", supports=_supports_mlp)
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
    """Six launches: sort (2), product, activation, product with the routing weights, sum over the slots. For few
    tokens bound by the bytes of the experts that are chosen."""
    tokens, top_k = expert_ids.shape
    config = _config(x, gate_up, tokens * top_k)
    rows = sort_by_group(expert_ids, gate_up.num_experts, config.block_m)
    hidden = torch.empty((tokens * top_k, gate_up.out_features), dtype=x.dtype, device=x.device)
    _product(x, gate_up, rows, hidden, config, rows_each=top_k)
    if activation == "silu_and_mul":
        hidden = ops.silu_and_mul(hidden)
    elif activation == "gelu_and_mul":
        hidden = ops.gelu_and_mul(hidden)
    else:
        hidden = ops.clamped_swiglu_and_mul(hidden, alpha, limit)
    parts = torch.empty((tokens * top_k, down.out_features), dtype=torch.float32, device=x.device)
    _product(hidden, down, rows, parts, config, factor=weights.reshape(-1))
    out = torch.empty((tokens, down.out_features), dtype=x.dtype, device=x.device)
    block = min(1024, triton.next_power_of_2(down.out_features))
    _combine_kernel[(tokens, triton.cdiv(down.out_features, block))](
        parts, expert_ids, out, down.out_features, gate_up.num_experts,
        TOP_K=top_k, SLOTS=triton.next_power_of_2(top_k), BLOCK=block,
    )  # fmt: skip
    return out


def _product(
    x: torch.Tensor,
    weight: ExpertWeight,
    rows: SortedRows,
    out: torch.Tensor,
    config: LaunchConfig,
    rows_each: int = 1,
    factor: torch.Tensor | None = None,
) -> None:
    if isinstance(weight.data, torch.Tensor):
        grouped_product(
            x, weight.data, rows, out, config, rows_each=rows_each, scale=weight.scale, bias=weight.bias, factor=factor
        )
    elif isinstance(weight.data, PackedWeight):
        grouped_packed_product(
            x, weight.data, weight.num_experts, rows, out, config, rows_each=rows_each, bias=weight.bias, factor=factor
        )
    else:
        raise TypeError(f"moe_mlp: no Triton kernel for experts stored as {weight.data.format}")


def _config(x: torch.Tensor, weight: ExpertWeight, assignments: int) -> LaunchConfig:
    if mode.batch_invariant():
        return LaunchConfig(block_m=32, block_n=64, block_k=64)
    rows = min(128, max(16, triton.next_power_of_2(triton.cdiv(assignments, weight.num_experts))))
    if isinstance(weight.data, PackedWeight):
        default = LaunchConfig(block_m=rows, block_n=64, block_k=64, num_warps=8 if rows >= 128 else 4, num_stages=3)
        key = f"m{rows}_e{weight.num_experts}_{weight.data.format}"
        return launch_config("grouped_packed", key, x.device, default)
    bits = weight.data.dtype.itemsize * 8 if isinstance(weight.data, torch.Tensor) else 16
    default = LaunchConfig(
        block_m=rows, block_n=128 if rows >= 64 and bits < 32 else 64, block_k=64 if bits < 32 else 32,
        num_warps=8 if rows >= 128 else 4, num_stages=4 if bits < 32 else 2,
    )  # fmt: skip
    key = f"m{rows}_e{weight.num_experts}_b{bits}"
    return launch_config("grouped_gemm", key, x.device, default)
