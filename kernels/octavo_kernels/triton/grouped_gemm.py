"""Products of rows with different matrices: experts of a mixture, adapters of requests.

Rows are sorted by matrix into blocks of equal size (padded), so that every tile of the product reads one matrix; the
sort is counting by equality, two launches, without atomics and therefore the same in every run. The layout of sorted
ids and the block-to-expert table follow the usual fused-MoE form (vLLM, SGLang); tiles as in MegaBlocks
(arXiv 2211.15841).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo_kernels.triton.environment import dot
from octavo_kernels.triton.tuning import LaunchConfig

SCAN = 1_024  # assignments a program looks at in one go


@triton.jit(do_not_specialize=["assignments"])
def _count_kernel(ids_ptr, counts_ptr, assignments, BLOCK: tl.constexpr):
    """counts[g] = how many ids are g. Grid: (groups,)."""
    group = tl.program_id(0)
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, assignments, BLOCK):
        place = start + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + place, mask=place < assignments, other=-1)
        found += (ids == group).to(tl.int32)
    tl.store(counts_ptr + group, tl.sum(found, axis=0))


@triton.jit(do_not_specialize=["assignments", "num_blocks"])
def _scatter_kernel(
    ids_ptr, counts_ptr, sorted_ptr, block_group_ptr, assignments, groups, num_blocks,
    BLOCK_M: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write each group's assignments, in order, into its blocks, padded with `assignments`. Grid: (groups + 1,); the
    last program marks the blocks no group uses with -1."""
    group = tl.program_id(0)
    g = tl.arange(0, GROUPS)
    counts = tl.load(counts_ptr + g, mask=g < groups, other=0)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    first_block = tl.sum(tl.where(g < group, blocks, 0), axis=0)
    if group == groups:
        for block in range(first_block, num_blocks):
            tl.store(block_group_ptr + block, -1)
    else:
        own_blocks = tl.sum(tl.where(g == group, blocks, 0), axis=0)
        base = first_block * BLOCK_M
        for block in range(first_block, first_block + own_blocks):
            tl.store(block_group_ptr + block, group)
        done = 0
        for start in range(0, assignments, BLOCK):
            place = start + tl.arange(0, BLOCK)
            mine = tl.load(ids_ptr + place, mask=place < assignments, other=-1) == group
            rank = tl.cumsum(mine.to(tl.int32), axis=0)
            tl.store(sorted_ptr + base + done + rank - 1, place, mask=mine)
            done += tl.sum(mine.to(tl.int32), axis=0)
        padding = tl.arange(0, BLOCK_M)
        end = base + own_blocks * BLOCK_M
        tl.store(sorted_ptr + base + done + padding, assignments + padding * 0, mask=base + done + padding < end)


@triton.jit(do_not_specialize=["assignments", "out_split_stride"])
def _grouped_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, factor_ptr, sorted_ptr, block_group_ptr, out_ptr,
    assignments, out_features, in_features, x_stride, out_stride, out_split_stride,
    ROWS_EACH: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr, ADD: tl.constexpr,
    FACTOR_BY_GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[a] (+)= (x[a // ROWS_EACH] @ weight[group].T * scale + bias) * factor for the assignments a of each block.
    Grid: (blocks of outputs, blocks of rows, splits of the inputs, each to its own part of out)."""
    group = tl.load(block_group_ptr + tl.program_id(1)).to(tl.int64)
    if group < 0:
        return
    row = tl.load(sorted_ptr + tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    valid = row < assignments
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_valid = n < out_features
    x_row = x_ptr + (row // ROWS_EACH)[:, None] * x_stride
    weight_row = weight_ptr + (group * out_features + n.to(tl.int64))[:, None] * in_features
    steps = tl.cdiv(tl.cdiv(in_features, BLOCK_K), tl.num_programs(2))
    first = tl.program_id(2) * steps
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, tl.minimum(first + steps, tl.cdiv(in_features, BLOCK_K))):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (k < in_features)[None, :]
        x = tl.load(x_row + k[None, :], mask=valid[:, None] & inside, other=0.0)
        weight = tl.load(weight_row + k[None, :], mask=n_valid[:, None] & inside, other=0.0)
        if SCALED:
            weight = weight.to(x.dtype)
        else:
            x = x.to(weight.dtype)
        acc = dot(x, tl.trans(weight), acc)
    if SCALED:
        acc *= tl.load(scale_ptr + group * out_features + n, mask=n_valid, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + group * out_features + n, mask=n_valid, other=0.0).to(tl.float32)[None, :]
    if FACTOR:
        if FACTOR_BY_GROUP:
            acc *= tl.load(factor_ptr + group)
        else:
            acc *= tl.load(factor_ptr + row, mask=valid, other=0.0)[:, None]
    place = tl.program_id(2).to(tl.int64) * out_split_stride + row[:, None] * out_stride + n[None, :]
    mask = valid[:, None] & n_valid[None, :]
    if ADD:
        acc += tl.load(out_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class SortedRows:
    """sorted_ids: [blocks * block_m] int32 assignments, padded with `assignments`; block_group: [blocks] int32, -1
    for unused blocks. Sizes are upper bounds the host knows, so nothing waits for the device."""

    sorted_ids: torch.Tensor
    block_group: torch.Tensor
    block_m: int
    assignments: int

    @property
    def num_blocks(self) -> int:
        return self.block_group.shape[0]


def sort_by_group(group_ids: torch.Tensor, groups: int, block_m: int) -> SortedRows:
    """Sort assignments by group; ids outside 0 .. groups - 1 belong to none. group_ids: int32, any shape."""
    flat = group_ids.reshape(-1)
    assignments = flat.shape[0]
    num_blocks = min(assignments, groups) + assignments // block_m
    device = flat.device
    counts = torch.empty(groups, dtype=torch.int32, device=device)
    sorted_ids = torch.empty(num_blocks * block_m, dtype=torch.int32, device=device)
    block_group = torch.empty(num_blocks, dtype=torch.int32, device=device)
    _count_kernel[(groups,)](flat, counts, assignments, BLOCK=SCAN)
    _scatter_kernel[(groups + 1,)](
        flat, counts, sorted_ids, block_group, assignments, groups, num_blocks,
        BLOCK_M=block_m, GROUPS=triton.next_power_of_2(groups), BLOCK=SCAN,
    )  # fmt: skip
    return SortedRows(sorted_ids, block_group, block_m, assignments)


def grouped_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    rows: SortedRows,
    out: torch.Tensor,
    config: LaunchConfig,
    *,
    rows_each: int = 1,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    factor_by_group: bool = False,
    add: bool = False,
    splits: int = 1,
) -> None:
    """Launch the product. x: [assignments / rows_each, in]; weight: [groups, out, in]; out: [assignments, out], or
    [splits, assignments, out] parts to be summed. factor: [assignments] or, by group, [groups]."""
    _, out_features, in_features = weight.shape
    _grouped_kernel[(triton.cdiv(out_features, config.block_n), rows.num_blocks, splits)](
        x, weight, scale, bias, factor, rows.sorted_ids, rows.block_group, out,
        rows.assignments, out_features, in_features, x.stride(0), out.stride(-2), out.stride(0) if splits > 1 else 0,
        ROWS_EACH=rows_each, SCALED=scale is not None, BIAS=bias is not None, FACTOR=factor is not None, ADD=add,
        FACTOR_BY_GROUP=factor_by_group, BLOCK_M=rows.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
