"""Dense products where cuBLAS is not the better choice: few rows, and sums that must not depend on the number of rows.

With few rows a product only streams the weight. cuBLAS reaches about 70 % of the memory rate there; small tiles, a deep
pipeline and a split reduction reach more. In batch-invariant mode every product takes one shape of tile and no split:
cuBLAS chooses its kernel, and with it the order of its sums, by the shape of the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels.triton import mode
from octavo_kernels.triton.environment import dot, multiprocessors
from octavo_kernels.triton.packed_gemm import sum_splits
from octavo_kernels.triton.tuning import LaunchConfig, launch_config

INVARIANT = LaunchConfig(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3, splits=1)
GROUP_M = 8  # rows of tiles that share columns of the weight while these are in the cache
FEW_ROWS = 16
MAX_SPLITS = 16


@triton.jit(do_not_specialize=["rows"])
def _dense_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, out_features, in_features, x_stride, weight_stride,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of rows, blocks of outputs, splits of the inputs). SPLIT: out is float32 [splits, rows, outputs].
    WHOLE: outputs and inputs are whole numbers of tiles."""
    m_tile, n_tile = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), GROUP_M)
    m = (m_tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (n_tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    steps = tl.cdiv(in_features, BLOCK_K)
    each = tl.cdiv(steps, tl.num_programs(2))
    first = tl.program_id(2) * each
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, tl.minimum(first + each, steps)):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        if WHOLE:
            x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=(m < rows)[:, None], other=0.0)
            weight = tl.load(weight_ptr + n[:, None] * weight_stride + k[None, :])
        else:
            inside = (k < in_features)[None, :]
            x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=(m < rows)[:, None] & inside, other=0.0)
            weight = tl.load(
                weight_ptr + n[:, None] * weight_stride + k[None, :],
                mask=(n < out_features)[:, None] & inside, other=0.0,
            )  # fmt: skip
        acc = dot(x, tl.trans(weight.to(x.dtype)), acc)
    mask = (m < rows)[:, None] & (n < out_features)[None, :]
    if SPLIT:
        m += tl.program_id(2).to(tl.int64) * rows
    elif BIAS:
        acc += tl.load(bias_ptr + n, mask=n < out_features, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + m[:, None] * out_features + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def better_than_cublas(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Few rows of 16-bit floats (measured, see docs/kernels.md), or results that must be batch-invariant."""
    if weight.stride(1) != 1 or not weight.is_floating_point():
        return False
    return mode.batch_invariant() or (x.shape[0] <= FEW_ROWS and x.dtype == weight.dtype and x.dtype.itemsize == 2)


def dense_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias. x: [T, in], weight: [out, in] -> [T, out]. Bound by weight.nbytes for few rows."""
    rows, in_features = x.shape
    out_features = weight.shape[0]
    out = torch.empty((rows, out_features), dtype=x.dtype, device=x.device)
    config = _config(x, weight)
    grid = (triton.cdiv(rows, config.block_m), triton.cdiv(out_features, config.block_n))
    splits = _splits(x, grid[0] * grid[1], triton.cdiv(in_features, config.block_k), config)
    parts = torch.empty((splits, rows, out_features), dtype=torch.float32, device=x.device) if splits > 1 else out
    _dense_kernel[(*grid, splits)](
        x, weight, bias, parts, rows, out_features, in_features, x.stride(0), weight.stride(0),
        BIAS=bias is not None, SPLIT=splits > 1,
        WHOLE=out_features % config.block_n == 0 and in_features % config.block_k == 0,
        GROUP_M=GROUP_M, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        sum_splits(parts, bias, out)
    return out


def _config(x: torch.Tensor, weight: torch.Tensor) -> LaunchConfig:
    if mode.batch_invariant():
        return INVARIANT
    rows = max(16, triton.next_power_of_2(x.shape[0]))
    default = LaunchConfig(block_m=rows, block_n=32, block_k=256, num_warps=4, num_stages=4)
    key = "x".join(str(triton.next_power_of_2(size)) for size in weight.shape)
    return launch_config(f"dense_gemm_m{rows}", key, x.device, default)


def _splits(x: torch.Tensor, programs: int, steps: int, config: LaunchConfig) -> int:
    if config.splits:
        return config.splits
    return int(max(1, min(3 * multiprocessors(x.device) // programs, steps // 4, MAX_SPLITS)))
