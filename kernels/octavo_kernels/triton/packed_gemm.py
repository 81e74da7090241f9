"""Products with integer-quantized weights that are de-quantized in registers: W4A16, W6A16, W8A16.

One form for every number of rows up to `DENSE_ROWS`: few rows are padded to the tensor core's sixteen. The reduction is
split over programs when there are too few tiles to fill the device (split-K, arXiv 2402.00025), with a second launch
that sums the parts in a fixed order, so results do not change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels.triton import mode
from octavo_kernels.triton.environment import multiprocessors
from octavo_kernels.triton.packed_product import (
    add_segment,
    constants,
    first_input,
    load_codes,
    load_factors,
    pointers,
    scaled,
)
from octavo_kernels.triton.packed_weight import PackedWeight
from octavo_kernels.triton.tuning import LaunchConfig, launch_config

MAX_SPLITS = 16
DENSE_ROWS = 160  # from about here on, de-quantizing once and a dense product win (from times of both on an H200)


@triton.jit(do_not_specialize=["rows", "segments"])
def _gemm_kernel(
    x_ptr, codes_ptr, high_ptr, factors_ptr, row_scale_ptr, bias_ptr, out_ptr,
    rows, x_stride, out_features, segments,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, OFFSET: tl.constexpr,
    GROUP: tl.constexpr, MINIMA: tl.constexpr, ROW_SCALE: tl.constexpr, SEGMENT: tl.constexpr,
    LANES: tl.constexpr, FLOAT4: tl.constexpr, LOW_ASM: tl.constexpr, HIGH_ASM: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of outputs, blocks of rows, splits of the segments). SPLIT: out is float32 [splits, rows, outputs].
    UNROLL: segments of a step."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_valid = n < out_features
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    m_valid = m < rows
    x_rows = x_ptr + m * x_stride
    steps = tl.cdiv(segments, UNROLL)
    each = tl.cdiv(steps, tl.num_programs(2))
    first = tl.program_id(2) * each
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, tl.minimum(first + each, steps)):
        for i in tl.static_range(UNROLL):
            segment = step * UNROLL + i
            acc = add_segment(
                acc, x_rows, m < tl.where(segment < segments, rows, 0), codes_ptr, high_ptr, factors_ptr, segment, n,
                n < tl.where(segment < segments, out_features, 0), out_features, BITS, HALF, OFFSET, GROUP, MINIMA,
                SEGMENT, LANES, FLOAT4, LOW_ASM, HIGH_ASM,
            )  # fmt: skip
    if ROW_SCALE:
        acc *= tl.load(row_scale_ptr + n, mask=n_valid, other=0.0)[None, :]
    mask = m_valid[:, None] & n_valid[None, :]
    if SPLIT:
        m += tl.program_id(2).to(tl.int64) * rows
    elif BIAS:
        acc += tl.load(bias_ptr + n, mask=n_valid, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + m[:, None] * out_features + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["elements", "splits"])
def sum_splits_kernel(
    parts_ptr, bias_ptr, out_ptr, out_features, elements, splits,
    BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = sum of parts [splits, rows, outputs] + bias, always in the same order."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, SPLITS)
    mask = (s < splits)[:, None] & (places < elements)[None, :]
    total = tl.sum(tl.load(parts_ptr + s.to(tl.int64)[:, None] * elements + places[None, :], mask=mask, other=0.0), 0)
    if BIAS:
        total += tl.load(bias_ptr + places % out_features, mask=places < elements, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=places < elements)


@triton.jit(do_not_specialize=["count", "segments"])
def _dequantize_kernel(
    codes_ptr, high_ptr, factors_ptr, row_scale_ptr, ids_ptr, out_ptr,
    count, out_features, in_features, segments,
    GATHER: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, OFFSET: tl.constexpr, GROUP: tl.constexpr,
    MINIMA: tl.constexpr, ROW_SCALE: tl.constexpr, SEGMENT: tl.constexpr, LANES: tl.constexpr,
    FLOAT4: tl.constexpr, LOW_ASM: tl.constexpr, HIGH_ASM: tl.constexpr, EACH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of rows, runs of EACH segments). GATHER: row i is weight row ids[i]; ids outside the matrix give
    zeros."""
    target = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    wanted = target < count
    row = tl.load(ids_ptr + target, mask=wanted, other=-1) if GATHER else target
    valid = wanted & (row >= 0) & (row < out_features)
    n = tl.where(valid, row, 0)
    j = tl.arange(0, LANES)
    for i in tl.static_range(EACH):
        segment = tl.program_id(1) * EACH + i
        here = valid & (segment + tl.zeros_like(target) < segments)
        low, high = load_codes(
            codes_ptr, high_ptr, segment, n, here, out_features, BITS, SEGMENT, LANES, OFFSET,
            FLOAT4, "", "", tl.float32,
        )  # fmt: skip
        k = first_input(segment, BITS, HALF, SEGMENT)
        for half in tl.static_range(1 if BITS == 8 else 2):
            at = k + half * HALF
            scale, minimum = load_factors(factors_ptr, at, n, here, out_features, GROUP, MINIMA)
            dense = scaled(low if half == 0 else high, scale, minimum, MINIMA, tl.float32)
            if ROW_SCALE:
                dense *= tl.load(row_scale_ptr + n, mask=here, other=0.0)[:, None]
            dense = tl.where(here[:, None], dense, 0.0)
            mask = (target < tl.where(segment < segments, count, 0))[:, None] & (j < SEGMENT)[None, :]
            place = target[:, None] * in_features + (at + j)[None, :]
            tl.store(out_ptr + place, dense.to(out_ptr.dtype.element_ty), mask=mask)


def packed_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias. x: [T, in] -> [T, out] in x's dtype. Bound by weight.nbytes for few rows."""
    if x.shape[0] >= DENSE_ROWS and not mode.batch_invariant():
        return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
    rows, segments = x.shape[0], weight.codes.shape[0]
    out_features = weight.shape[0]
    out = torch.empty((rows, out_features), dtype=x.dtype, device=x.device)
    config = _config(x, weight)
    unroll = max(1, config.block_k // weight.segment)
    grid = (triton.cdiv(out_features, config.block_n), triton.cdiv(rows, config.block_m))
    splits = _splits(x, grid[0] * grid[1], triton.cdiv(segments, unroll), config)
    parts = torch.empty((splits, rows, out_features), dtype=torch.float32, device=x.device) if splits > 1 else out
    _gemm_kernel[(*grid, splits)](
        x, *pointers(weight), bias, parts, rows, x.stride(0), out_features, segments,
        BIAS=bias is not None, SPLIT=splits > 1, UNROLL=unroll, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        **constants(weight, x.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        sum_splits(parts, bias, out)
    return out


def dequantize(weight: PackedWeight, dtype: torch.dtype, row_ids: torch.Tensor | None = None) -> torch.Tensor:
    """The dense matrix, or the rows named by row_ids [T]. One launch."""
    count = weight.shape[0] if row_ids is None else row_ids.shape[0]
    out = torch.empty((count, weight.in_features), dtype=dtype, device=weight.device)
    if count == 0:
        return out
    segments = weight.codes.shape[0]
    block, each = (16 if row_ids is None else 1), max(1, 64 // weight.segment)
    _dequantize_kernel[(triton.cdiv(count, block), triton.cdiv(segments, each))](
        *pointers(weight), row_ids, out, count, weight.shape[0], weight.in_features, segments,
        GATHER=row_ids is not None, EACH=each, BLOCK_N=block, **constants(weight, torch.float32), num_warps=4,
    )  # fmt: skip
    return out


def sum_splits(parts: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out [rows, outputs] = parts [splits, rows, outputs] summed + bias."""
    block = 512
    sum_splits_kernel[(triton.cdiv(out.numel(), block),)](
        parts, bias, out, out.shape[1], out.numel(), parts.shape[0],
        BIAS=bias is not None, SPLITS=triton.next_power_of_2(parts.shape[0]), BLOCK=block,
    )  # fmt: skip


def _config(x: torch.Tensor, weight: PackedWeight) -> LaunchConfig:
    """block_k: bytes of codes of a step."""
    if mode.batch_invariant():
        return LaunchConfig(block_m=32, block_n=64, block_k=64, splits=1)
    rows = min(64, max(16, triton.next_power_of_2(x.shape[0])))
    default = LaunchConfig(block_m=min(32, rows), block_n=128, block_k=32, num_warps=4, num_stages=3)
    key = f"b{weight.bits}_g{weight.group}_s{weight.segment}_{_size_class(weight)}"
    return launch_config(f"packed_gemm_m{rows}", key, x.device, default)


def _size_class(weight: PackedWeight) -> str:
    """Outputs by inputs, rounded up to powers of two: one measurement serves neighbouring shapes."""
    return "x".join(str(triton.next_power_of_2(size)) for size in weight.shape)


def _splits(x: torch.Tensor, programs: int, steps: int, config: LaunchConfig) -> int:
    if config.splits:
        return config.splits
    return int(max(1, min(7 * multiprocessors(x.device) // programs, steps // 4, MAX_SPLITS)))
