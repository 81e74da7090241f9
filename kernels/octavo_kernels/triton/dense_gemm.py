"""A dense product whose sums do not depend on the number of rows. For batch-invariant mode only: cuBLAS chooses its
kernel, and with it the order of its sums, by the shape of the batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels.triton.environment import dot

BLOCK_M, BLOCK_N, BLOCK_K = 64, 64, 64
GROUP_M = 8  # rows of tiles that share columns of the weight while these are in the cache


@triton.jit(do_not_specialize=["rows"])
def _dense_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, out_features, in_features, x_stride, weight_stride,
    BIAS: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m_tile, n_tile = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), GROUP_M)
    m = (m_tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (n_tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, in_features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < in_features)[None, :]
        x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=(m < rows)[:, None] & inside, other=0.0)
        weight = tl.load(
            weight_ptr + n[:, None] * weight_stride + k[None, :], mask=(n < out_features)[:, None] & inside, other=0.0
        )
        acc = dot(x, tl.trans(weight.to(x.dtype)), acc)
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < out_features, other=0.0).to(tl.float32)[None, :]
    place = m[:, None] * out_features + n[None, :]
    mask = (m < rows)[:, None] & (n < out_features)[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


def invariant_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias. x: [T, in], weight: [out, in] -> [T, out]."""
    rows, in_features = x.shape
    out_features = weight.shape[0]
    out = torch.empty((rows, out_features), dtype=x.dtype, device=x.device)
    _dense_kernel[(triton.cdiv(rows, BLOCK_M), triton.cdiv(out_features, BLOCK_N))](
        x, weight, bias, out, rows, out_features, in_features, x.stride(0), weight.stride(0),
        BIAS=bias is not None, GROUP_M=GROUP_M, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
