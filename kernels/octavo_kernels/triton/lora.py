"""Adapters of mixed batches as two grouped products: to the low rank and back, added in place."""

from __future__ import annotations

import torch
import triton

from octavo_kernels import ops
from octavo_kernels.triton.environment import multiprocessors, runs_here
from octavo_kernels.triton.grouped_gemm import grouped_product, sort_by_group
from octavo_kernels.triton.mode import batch_invariant
from octavo_kernels.triton.packed_gemm import sum_splits
from octavo_kernels.triton.tuning import LaunchConfig

BLOCK_M = 16
BLOCK_K = 128
MAX_SPLITS = 16


def _supports(
    out: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    adapters: torch.Tensor,
    scales: torch.Tensor,
) -> bool:
    dense = lora_a.is_contiguous() and lora_b.is_contiguous() and x.stride(1) == 1 and out.stride(1) == 1
    return runs_here(out) and dense and x.shape[0] > 0


@ops.add_lora.register("triton", supports=_supports)
def add_lora(
    out: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    adapters: torch.Tensor,
    scales: torch.Tensor,
) -> torch.Tensor:
    """Sort by adapter (2 launches), shrink (split over the inputs, then summed), expand. Rows without an adapter are
    not touched."""
    tokens, in_features = x.shape
    count, rank, _ = lora_a.shape
    rows = sort_by_group(adapters, count, BLOCK_M)
    rank_block = min(64, max(16, triton.next_power_of_2(rank)))
    shrink = LaunchConfig(block_m=BLOCK_M, block_n=rank_block, block_k=BLOCK_K, num_stages=3)
    splits = _splits(x, rows.num_blocks * triton.cdiv(rank, rank_block), in_features)
    low = torch.empty((tokens, rank), dtype=torch.float32, device=x.device)
    parts = torch.empty((splits, tokens, rank), dtype=torch.float32, device=x.device) if splits > 1 else low
    grouped_product(x, lora_a, rows, parts, shrink, splits=splits)
    if splits > 1:
        sum_splits(parts, None, low)
    expand = LaunchConfig(block_m=BLOCK_M, block_n=128, block_k=max(16, rank_block))
    grouped_product(low, lora_b, rows, out, expand, factor=scales, factor_by_group=True, add=True)
    return out


def _splits(x: torch.Tensor, programs: int, in_features: int) -> int:
    """In batch-invariant mode by the shape of the weight alone."""
    steps = triton.cdiv(in_features, BLOCK_K)
    wanted = MAX_SPLITS if batch_invariant() else multiprocessors(x.device) // programs
    return int(max(1, min(wanted, steps // 4, MAX_SPLITS)))
