"""The grouped product with matrices of packed integers or 4-bit floats, de-quantized in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels.triton.grouped_gemm import SortedRows
from octavo_kernels.triton.packed_product import add_segment, constants, pointers
from octavo_kernels.triton.packed_weight import PackedWeight
from octavo_kernels.triton.tuning import LaunchConfig


@triton.jit(do_not_specialize=["assignments", "segments"])
def _grouped_packed_kernel(
    x_ptr, codes_ptr, high_ptr, factors_ptr, row_scale_ptr, bias_ptr, factor_ptr, sorted_ptr, block_group_ptr, out_ptr,
    assignments, out_features, weight_rows, segments, x_stride, out_stride,
    ROWS_EACH: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr,
    OFFSET: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr, ROW_SCALE: tl.constexpr,
    SEGMENT: tl.constexpr, LANES: tl.constexpr, FLOAT4: tl.constexpr, LOW_ASM: tl.constexpr, HIGH_ASM: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    x_rows = x_ptr + row // ROWS_EACH * x_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(segments, UNROLL)):
        for i in tl.static_range(UNROLL):
            segment = step * UNROLL + i
            acc = add_segment(
                acc, x_rows, row < tl.where(segment < segments, assignments, 0), codes_ptr, high_ptr, factors_ptr,
                segment, weight_row, n < tl.where(segment < segments, out_features, 0), weight_rows, BITS, HALF, OFFSET,
                GROUP, MINIMA, SEGMENT, LANES, FLOAT4, LOW_ASM, HIGH_ASM,
            )  # fmt: skip
    if ROW_SCALE:
        acc *= tl.load(row_scale_ptr + weight_row, mask=n_valid, other=0.0)[None, :]
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
    total, _ = weight.shape
    out_features = total // groups
    unroll = max(1, config.block_k // weight.segment)
    _grouped_packed_kernel[(triton.cdiv(out_features, config.block_n), rows.num_blocks)](
        x, *pointers(weight), bias, factor, rows.sorted_ids, rows.block_group, out,
        rows.assignments, out_features, total, weight.codes.shape[0], x.stride(0), out.stride(0),
        ROWS_EACH=rows_each, BIAS=bias is not None, FACTOR=factor is not None, **constants(weight, x.dtype),
        UNROLL=unroll, BLOCK_M=rows.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
