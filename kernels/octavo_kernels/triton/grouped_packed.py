"""The grouped product with matrices of packed integers or 4-bit floats, de-quantized in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels.triton.environment import dot
from octavo_kernels.triton.grouped_gemm import SortedRows
from octavo_kernels.triton.packed_gemm import constants, load_weights, pointers
from octavo_kernels.triton.packed_weight import PackedWeight
from octavo_kernels.triton.tuning import LaunchConfig


@triton.jit(do_not_specialize=["assignments"])
def _grouped_packed_kernel(
    x_ptr, codes_ptr, high_ptr, scales_ptr, minima_ptr, super_scales_ptr, super_minima_ptr, bias_ptr, factor_ptr,
    sorted_ptr, block_group_ptr, out_ptr, assignments, out_features, in_features, x_stride, out_stride,
    ROWS_EACH: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr,
    OFFSET: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr, SUPER: tl.constexpr, SUPER_BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr, FLOAT4: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[a] = (x[a // ROWS_EACH] @ weight[group].T + bias) * factor[a]; the weight's rows are groups * out_features.
    Grid: (blocks of outputs, blocks of rows)."""
    group = tl.load(block_group_ptr + tl.program_id(1)).to(tl.int64)
    if group < 0:
        return
    row = tl.load(sorted_ptr + tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    valid = row < assignments
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_valid = n < out_features
    weight_row = group * out_features + n
    bytes_a_row = in_features if BITS == 8 else in_features // 2
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, bytes_a_row, BLOCK_K):
        low, high, k = load_weights(
            codes_ptr, high_ptr, scales_ptr, minima_ptr, super_scales_ptr, super_minima_ptr, weight_row, n_valid,
            start, in_features, BITS, HALF, OFFSET, GROUP, MINIMA, SUPER, SUPER_BLOCK, SEGMENT, FLOAT4, BLOCK_K,
        )  # fmt: skip
        mask = valid[:, None] & (start + tl.arange(0, BLOCK_K) < bytes_a_row)[None, :]
        x_row = x_ptr + (row // ROWS_EACH)[:, None] * x_stride + k[None, :]
        x_low = tl.load(x_row, mask=mask, other=0.0)
        acc = dot(x_low, tl.trans(low.to(x_low.dtype)), acc)
        if BITS != 8:
            x_high = tl.load(x_row + HALF, mask=mask, other=0.0)
            acc = dot(x_high, tl.trans(high.to(x_high.dtype)), acc)
    if BIAS:
        acc += tl.load(bias_ptr + group * out_features + n, mask=n_valid, other=0.0).to(tl.float32)[None, :]
    if FACTOR:
        acc *= tl.load(factor_ptr + row, mask=valid, other=0.0)[:, None]
    place = row[:, None] * out_stride + n[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=valid[:, None] & n_valid[None, :])


def grouped_packed_product(
    x: torch.Tensor,
    weight: PackedWeight,
    groups: int,
    rows: SortedRows,
    out: torch.Tensor,
    config: LaunchConfig,
    *,
    rows_each: int = 1,
    bias: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
) -> None:
    """x: [assignments / rows_each, in]; weight: [groups * out, in]; out: [assignments, out]; factor: [assignments]."""
    total, in_features = weight.shape
    out_features = total // groups
    _grouped_packed_kernel[(triton.cdiv(out_features, config.block_n), rows.num_blocks)](
        x, *pointers(weight), bias, factor, rows.sorted_ids, rows.block_group, out,
        rows.assignments, out_features, in_features, x.stride(0), out.stride(0),
        ROWS_EACH=rows_each, BIAS=bias is not None, FACTOR=factor is not None, **constants(weight, config.block_k),
        BLOCK_M=rows.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
