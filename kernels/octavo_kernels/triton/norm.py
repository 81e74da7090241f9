"""RMSNorm and LayerNorm, with the residual addition and 8-bit quantization of the result in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels import ops
from octavo_kernels.triton.environment import NO_QUANT, quantization_of, quantize_rows, runs_here

MAX_DIM = 32_768  # a row is kept in registers
TILE = 2_048  # elements a program works on when rows are short


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    scale_ptr,
    num_rows,
    x_stride,
    residual_stride,
    dim,
    eps,
    ADD: tl.constexpr,
    QUANT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < dim)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + rows[:, None] * residual_stride + columns[None, :], mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + rows[:, None] * dim + columns[None, :], x, mask=mask)
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / dim + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < dim, other=0.0).to(tl.float32)
    normed = wide * inverse[:, None] * weight[None, :]
    out = out_ptr + rows[:, None] * dim + columns[None, :]
    if QUANT == NO_QUANT:
        tl.store(out, normed.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        codes, scale = quantize_rows(normed, QUANT)
        tl.store(out, codes, mask=mask)
        tl.store(scale_ptr + rows, scale, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, num_rows, x_stride, dim, eps,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < dim)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / dim
    centred = tl.where(mask, x - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, axis=1) / dim + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < dim, other=0.0).to(tl.float32)
    y = centred * inverse[:, None] * weight[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=columns < dim, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + rows[:, None] * dim + columns[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


def _rows_ok(x: torch.Tensor) -> bool:
    return runs_here(x) and x.is_floating_point() and 0 < x.shape[-1] <= MAX_DIM and x.stride(-1) == 1


@ops.rms_norm.register("triton", supports=lambda x, weight, eps: _rows_ok(x) and x.numel() > 0)
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """One launch; reads x once, writes the result once. Bound by 2 * x.nbytes."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rms_norm(x, None, weight, eps, out, None, None)
    return out


@ops.add_rms_norm.register("triton", supports=lambda x, residual, weight, eps: _pair_ok(x, residual))
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch; bound by 4 * x.nbytes."""
    out, total = torch.empty_like(x), torch.empty_like(residual)
    _launch_rms_norm(x, residual, weight, eps, out, total, None)
    return out, total


@ops.rms_norm_quantize.register("triton", supports=lambda x, weight, eps, dtype: _rows_ok(x) and x.numel() > 0)
def rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    _launch_rms_norm(x, None, weight, eps, out, None, scale)
    return out, scale


@ops.add_rms_norm_quantize.register("triton", supports=lambda x, residual, weight, eps, dtype: _pair_ok(x, residual))
def add_rms_norm_quantize(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, total = torch.empty(x.shape, dtype=dtype, device=x.device), torch.empty_like(residual)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    _launch_rms_norm(x, residual, weight, eps, out, total, scale)
    return out, scale, total


@ops.layer_norm.register("triton", supports=lambda x, weight, bias, eps: _rows_ok(x) and x.numel() > 0)
def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """One launch; two passes over registers, one over memory."""
    rows = _as_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, rows_each, warps = _tile(rows.shape[1])
    _layer_norm_kernel[(triton.cdiv(rows.shape[0], rows_each),)](
        rows, weight, bias, out, rows.shape[0], rows.stride(0), rows.shape[1], eps,
        HAS_BIAS=bias is not None, ROWS=rows_each, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out


def _pair_ok(x: torch.Tensor, residual: torch.Tensor) -> bool:
    return _rows_ok(x) and _rows_ok(residual) and x.dim() == 2 and x.numel() > 0 and x.shape == residual.shape


def _launch_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    total: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> None:
    rows = _as_rows(x)
    block, rows_each, warps = _tile(rows.shape[1])
    _rms_norm_kernel[(triton.cdiv(rows.shape[0], rows_each),)](
        rows, residual, weight, out, total, scale,
        rows.shape[0], rows.stride(0), residual.stride(0) if residual is not None else 0, rows.shape[1], eps,
        ADD=residual is not None, QUANT=quantization_of(out.dtype), ROWS=rows_each, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., dim] as [rows, dim], without a copy where the strides allow."""
    return x.reshape(-1, x.shape[-1])


def _tile(dim: int) -> tuple[int, int, int]:
    """(block, rows for each program, warps): chosen by dim alone, so that results do not depend on the batch."""
    block = max(16, triton.next_power_of_2(dim))
    warps = min(16, max(1, block // 512))
    return block, max(1, min(16, TILE // block // 4)), warps
