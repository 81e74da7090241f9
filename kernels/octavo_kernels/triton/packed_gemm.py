"""Products with integer-quantized weights that are de-quantized in registers: W4A16, W6A16, W8A16.

Two forms. For one row (a single decode) multiply and add without tensor cores, many columns of codes a program. From
two rows on, tiles of `tl.dot`; the reduction is split over programs when there are too few tiles to fill the device
(split-K, arXiv 2402.00025), with a second launch that sums the parts in a fixed order, so results do not change from
run to run.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from octavo_kernels.triton import mode
from octavo_kernels.triton.environment import dot, multiprocessors
from octavo_kernels.triton.packed_weight import SUPER_BLOCK, PackedWeight
from octavo_kernels.triton.tuning import LaunchConfig, launch_config

MAX_SPLITS = 16
DENSE_ROWS = 512  # from this many rows on, de-quantizing once and a dense product win; not measured yet
GEMV_ROWS = 1


@triton.jit
def _affine(
    codes, scales_ptr, minima_ptr, super_scales_ptr, super_minima_ptr, rows, k, mask, groups, super_groups,
    OFFSET: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr, SUPER: tl.constexpr, SUPER_BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    """codes [N, K] -> weights [N, K], float32. k [1, K / SEGMENT]: first inputs of the runs that share a scale."""
    fine = rows * groups + k // GROUP
    coarse = rows * super_groups + k // SUPER_BLOCK
    scale = tl.load(scales_ptr + fine, mask=mask, other=0.0).to(tl.float32)
    if SUPER:
        scale *= tl.load(super_scales_ptr + coarse, mask=mask, other=0.0).to(tl.float32)
    runs = tl.reshape(codes.to(tl.float32) - OFFSET, (codes.shape[0], codes.shape[1] // SEGMENT, SEGMENT))
    weight = runs * scale[:, :, None]
    if MINIMA:
        minimum = tl.load(minima_ptr + fine, mask=mask, other=0.0).to(tl.float32)
        if SUPER:
            minimum *= tl.load(super_minima_ptr + coarse, mask=mask, other=0.0).to(tl.float32)
        weight -= minimum[:, :, None]
    return tl.reshape(weight, codes.shape)


@triton.jit
def _input_of(place, BITS: tl.constexpr, HALF: tl.constexpr):
    """The input that byte `place` of a packed row (its low nibble) belongs to."""
    return place if BITS == 8 else (place // HALF) * 2 * HALF + place % HALF


@triton.jit
def _upper_bits(high_ptr, n, k, mask, in_features):
    """Bits 4 and 5 of Q6_K's codes: byte j of 32 in a chunk of 128 inputs holds inputs j, j + 32, j + 64, j + 96."""
    chunk = k // 128
    byte = tl.load(high_ptr + n * (in_features // 4) + chunk * 32 + k % 32, mask=mask, other=0)
    return ((byte.to(tl.int32) >> ((k % 128) // 32 * 2)) & 3) << 4


@triton.jit
def _twice_e2m1(code):
    """Twice the value of a 4-bit float (sign, two bits of exponent, one of mantissa), as an integer."""
    exponent = (code >> 1) & 3
    mantissa = code & 1
    size = tl.where(exponent == 0, mantissa, (2 + mantissa) << (tl.maximum(exponent, 1) - 1))
    return tl.where(code > 7, -size, size)


@triton.jit
def load_weights(
    codes_ptr, high_ptr, scales_ptr, minima_ptr, super_scales_ptr, super_minima_ptr, n, n_valid, start, in_features,
    BITS: tl.constexpr, HALF: tl.constexpr, OFFSET: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr,
    SUPER: tl.constexpr, SUPER_BLOCK: tl.constexpr, SEGMENT: tl.constexpr, FLOAT4: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows n [N] at bytes start .. start + BLOCK_K - 1 of the packed rows: (low weights [N, K], high weights, inputs
    of the low ones [K]). Eight-bit codes have no second half: the high weights repeat the low ones."""
    bytes_a_row = in_features if BITS == 8 else in_features // 2
    place = start + tl.arange(0, BLOCK_K)
    mask = n_valid[:, None] & (place < bytes_a_row)[None, :]
    rows = n.to(tl.int64)[:, None]
    codes = tl.load(codes_ptr + rows * bytes_a_row + place[None, :], mask=mask, other=0)
    first = start + tl.arange(0, BLOCK_K // SEGMENT) * SEGMENT
    runs_mask = n_valid[:, None] & (first < bytes_a_row)[None, :]
    groups = in_features // GROUP
    super_groups = in_features // SUPER_BLOCK
    k = _input_of(place, BITS, HALF)
    k_run = _input_of(first, BITS, HALF)[None, :]
    low = codes if BITS == 8 else (codes & 15).to(tl.int32)
    if BITS == 6:
        low = low | _upper_bits(high_ptr, rows, k[None, :], mask, in_features)
    if FLOAT4:
        low = _twice_e2m1(low)
    low = _affine(
        low, scales_ptr, minima_ptr, super_scales_ptr, super_minima_ptr, rows, k_run, runs_mask, groups,
        super_groups, OFFSET, GROUP, MINIMA, SUPER, SUPER_BLOCK, SEGMENT,
    )  # fmt: skip
    high = low
    if BITS != 8:
        upper = (codes >> 4).to(tl.int32)
        if BITS == 6:
            upper = upper | _upper_bits(high_ptr, rows, k[None, :] + HALF, mask, in_features)
        if FLOAT4:
            upper = _twice_e2m1(upper)
        high = _affine(
            upper, scales_ptr, minima_ptr, super_scales_ptr, super_minima_ptr, rows, k_run + HALF, runs_mask, groups,
            super_groups, OFFSET, GROUP, MINIMA, SUPER, SUPER_BLOCK, SEGMENT,
        )  # fmt: skip
    return low, high, k


@triton.jit
def _gemv_kernel(
    x_ptr, codes_ptr, high_ptr, scales_ptr, minima_ptr, super_scales_ptr, super_minima_ptr, bias_ptr, out_ptr,
    x_stride, out_features, in_features,
    BIAS: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, OFFSET: tl.constexpr, GROUP: tl.constexpr,
    MINIMA: tl.constexpr, SUPER: tl.constexpr, SUPER_BLOCK: tl.constexpr, SEGMENT: tl.constexpr, FLOAT4: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of outputs, rows of x)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    bytes_a_row = in_features if BITS == 8 else in_features // 2
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in tl.range(0, bytes_a_row, BLOCK_K, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK_K)
        low, high, k = load_weights(
            codes_ptr, high_ptr, scales_ptr, minima_ptr, super_scales_ptr, super_minima_ptr, n, n < out_features,
            start, in_features, BITS, HALF, OFFSET, GROUP, MINIMA, SUPER, SUPER_BLOCK, SEGMENT, FLOAT4,
            BLOCK_K,
        )  # fmt: skip
        x_low = tl.load(x_ptr + row * x_stride + k, mask=place < bytes_a_row, other=0.0).to(tl.float32)
        acc += low * x_low[None, :]
        if BITS != 8:
            x_high = tl.load(x_ptr + row * x_stride + k + HALF, mask=place < bytes_a_row, other=0.0).to(tl.float32)
            acc += high * x_high[None, :]
    total = tl.sum(acc, axis=1)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < out_features, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_features + n, total.to(out_ptr.dtype.element_ty), mask=n < out_features)


@triton.jit(do_not_specialize=["rows"])
def _gemm_kernel(
    x_ptr, codes_ptr, high_ptr, scales_ptr, minima_ptr, super_scales_ptr, super_minima_ptr, bias_ptr, out_ptr,
    rows, x_stride, out_features, in_features,
    BIAS: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, OFFSET: tl.constexpr, GROUP: tl.constexpr,
    MINIMA: tl.constexpr, SUPER: tl.constexpr, SUPER_BLOCK: tl.constexpr, SEGMENT: tl.constexpr, FLOAT4: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of outputs, blocks of rows, splits of the inputs). SPLIT: out is float32 [splits, rows, outputs].
    BLOCK_K counts bytes of codes."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    bytes_a_row = in_features if BITS == 8 else in_features // 2
    steps = tl.cdiv(tl.cdiv(bytes_a_row, BLOCK_K), tl.num_programs(2))
    first = tl.program_id(2) * steps
    last = tl.minimum(first + steps, tl.cdiv(bytes_a_row, BLOCK_K))
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, last):
        place = step * BLOCK_K + tl.arange(0, BLOCK_K)
        low, high, k = load_weights(
            codes_ptr, high_ptr, scales_ptr, minima_ptr, super_scales_ptr, super_minima_ptr, n, n < out_features,
            step * BLOCK_K, in_features, BITS, HALF, OFFSET, GROUP, MINIMA, SUPER, SUPER_BLOCK, SEGMENT, FLOAT4,
            BLOCK_K,
        )  # fmt: skip
        mask = (m < rows)[:, None] & (place < bytes_a_row)[None, :]
        x_low = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=mask, other=0.0)
        acc = dot(x_low, tl.trans(low.to(x_low.dtype)), acc)
        if BITS != 8:
            x_high = tl.load(x_ptr + m[:, None] * x_stride + k[None, :] + HALF, mask=mask, other=0.0)
            acc = dot(x_high, tl.trans(high.to(x_high.dtype)), acc)
    mask = (m < rows)[:, None] & (n < out_features)[None, :]
    if SPLIT:
        m += tl.program_id(2).to(tl.int64) * rows
    elif BIAS:
        acc += tl.load(bias_ptr + n, mask=n < out_features, other=0.0).to(tl.float32)[None, :]
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


@triton.jit
def _dequantize_kernel(
    codes_ptr, high_ptr, scales_ptr, minima_ptr, super_scales_ptr, super_minima_ptr, ids_ptr, out_ptr,
    out_features, in_features,
    GATHER: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, OFFSET: tl.constexpr, GROUP: tl.constexpr,
    MINIMA: tl.constexpr, SUPER: tl.constexpr, SUPER_BLOCK: tl.constexpr, SEGMENT: tl.constexpr, FLOAT4: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, parts of a row). GATHER: row i is weight row ids[i]; ids outside the matrix give zeros."""
    target = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + target) if GATHER else target
    place = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    bytes_a_row = in_features if BITS == 8 else in_features // 2
    inside = (row >= 0) & (row < out_features)
    n = tl.zeros((1,), tl.int64) + tl.where(inside, row, 0)
    low, high, k = load_weights(
        codes_ptr, high_ptr, scales_ptr, minima_ptr, super_scales_ptr, super_minima_ptr, n, n >= 0,
        tl.program_id(1) * BLOCK_K, in_features, BITS, HALF, OFFSET, GROUP, MINIMA, SUPER, SUPER_BLOCK, SEGMENT,
        FLOAT4, BLOCK_K,
    )  # fmt: skip
    keep = tl.where(inside, 1.0, 0.0)
    mask = (place < bytes_a_row)[None, :]
    base = out_ptr + target * in_features
    tl.store(base + k[None, :], (low * keep).to(out_ptr.dtype.element_ty), mask=mask)
    if BITS != 8:
        tl.store(base + k[None, :] + HALF, (high * keep).to(out_ptr.dtype.element_ty), mask=mask)


def packed_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias. x: [T, in] -> [T, out] in x's dtype. Bound by weight.nbytes for few rows."""
    rows = x.shape[0]
    if rows >= DENSE_ROWS and not mode.batch_invariant():
        return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
    if rows <= GEMV_ROWS and not mode.batch_invariant():
        return _gemv(x, weight, bias)
    return _gemm(x, weight, bias)


def dequantize(weight: PackedWeight, dtype: torch.dtype, row_ids: torch.Tensor | None = None) -> torch.Tensor:
    """The dense matrix, or the rows named by row_ids [T]. One launch."""
    rows = weight.shape[0] if row_ids is None else row_ids.shape[0]
    out = torch.empty((rows, weight.in_features), dtype=dtype, device=weight.device)
    if rows == 0:
        return out
    width = weight.codes.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    _dequantize_kernel[(rows, triton.cdiv(width, block))](
        *pointers(weight), row_ids, out, weight.shape[0], weight.in_features,
        GATHER=row_ids is not None, BLOCK_K=block, **constants(weight, block), num_warps=4,
    )  # fmt: skip
    return out


def _gemv(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    out_features, in_features = weight.shape
    out = torch.empty((x.shape[0], out_features), dtype=x.dtype, device=x.device)
    config = _config("packed_gemv", x, weight, LaunchConfig(block_n=4, block_k=512, num_warps=4, num_stages=3))
    _gemv_kernel[(triton.cdiv(out_features, config.block_n), x.shape[0])](
        x, *pointers(weight), bias, out, x.stride(0), out_features, in_features,
        BIAS=bias is not None, BLOCK_N=config.block_n, BLOCK_K=config.block_k, STAGES=config.num_stages,
        **constants(weight, config.block_k),
        num_warps=config.num_warps,
    )  # fmt: skip
    return out


def _gemm(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    rows = x.shape[0]
    out_features, in_features = weight.shape
    out = torch.empty((rows, out_features), dtype=x.dtype, device=x.device)
    config = _gemm_config(x, weight)
    grid = (triton.cdiv(out_features, config.block_n), triton.cdiv(rows, config.block_m))
    splits = _splits(x, grid[0] * grid[1], weight.codes.shape[1], config)
    parts = torch.empty((splits, rows, out_features), dtype=torch.float32, device=x.device) if splits > 1 else out
    _gemm_kernel[(*grid, splits)](
        x, *pointers(weight), bias, parts, rows, x.stride(0), out_features, in_features,
        BIAS=bias is not None, SPLIT=splits > 1, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, **constants(weight, config.block_k),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        sum_splits(parts, bias, out)
    return out


def sum_splits(parts: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out [rows, outputs] = parts [splits, rows, outputs] summed + bias."""
    block = 512
    sum_splits_kernel[(triton.cdiv(out.numel(), block),)](
        parts, bias, out, out.shape[1], out.numel(), parts.shape[0],
        BIAS=bias is not None, SPLITS=triton.next_power_of_2(parts.shape[0]), BLOCK=block,
    )  # fmt: skip


def _gemm_config(x: torch.Tensor, weight: PackedWeight) -> LaunchConfig:
    if mode.batch_invariant():
        return LaunchConfig(block_m=32, block_n=64, block_k=64, splits=1)
    rows = min(64, max(16, triton.next_power_of_2(x.shape[0])))
    default = LaunchConfig(block_m=rows, block_n=64, block_k=64, num_warps=4, num_stages=3)
    return _config(f"packed_gemm_m{rows}", x, weight, default)


def _config(kernel: str, x: torch.Tensor, weight: PackedWeight, default: LaunchConfig) -> LaunchConfig:
    return launch_config(kernel, f"b{weight.bits}_g{weight.group}_{_size_class(weight)}", x.device, default)


def _size_class(weight: PackedWeight) -> str:
    """Outputs by inputs, rounded up to powers of two: one measurement serves neighbouring shapes."""
    return "x".join(str(triton.next_power_of_2(size)) for size in weight.shape)


def _splits(x: torch.Tensor, programs: int, width: int, config: LaunchConfig) -> int:
    if config.splits:
        return config.splits
    steps = triton.cdiv(width, config.block_k)
    return int(max(1, min(2 * multiprocessors(x.device) // programs, steps // 4, MAX_SPLITS)))


def pointers(weight: PackedWeight) -> tuple[torch.Tensor | None, ...]:
    """The tensors `load_weights` reads, in its order."""
    return weight.codes, weight.high, weight.scales, weight.minima, weight.super_scales, weight.super_minima


def constants(weight: PackedWeight, block_k: int) -> dict[str, int]:
    """The kernel's compile-time description of the format. SEGMENT: bytes of a tile that share one scale."""
    return {
        "SEGMENT": math.gcd(weight.group, weight.half or weight.group, block_k),
        "BITS": weight.bits,
        "HALF": weight.half,
        "OFFSET": weight.offset,
        "GROUP": weight.group,
        "FLOAT4": weight.float4,
        "MINIMA": weight.minima is not None,
        "SUPER": weight.super_scales is not None,
        "SUPER_BLOCK": SUPER_BLOCK,
    }
