"""Gated activations, optionally quantized to 8 bits for the product that follows, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels import ops
from octavo_kernels.triton.environment import (
    NO_QUANT,
    quantization_of,
    quantize_rows,
    row_codes,
    row_scale,
    runs_here,
    sigmoid,
    tanh,
)
from octavo_kernels.triton.tuning import LaunchConfig, launch_config

SILU = tl.constexpr(0)
GELU = tl.constexpr(1)
CLAMPED = tl.constexpr(2)
MAX_QUANTIZED_DIM = 32_768
GELU_SCALE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)


@triton.jit
def activate(gate, up, alpha, limit, KIND: tl.constexpr):
    """The gated activation of float32 values."""
    if KIND == SILU:
        return gate * sigmoid(gate) * up
    if KIND == GELU:
        return 0.5 * gate * (1.0 + tanh((gate + 0.044715 * gate * gate * gate) * GELU_SCALE)) * up
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    return gate * sigmoid(alpha * gate) * (up + 1.0)


@triton.jit
def _gated_kernel(
    x_ptr, out_ptr, x_stride, dim, alpha, limit, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < dim
    gate = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + dim + columns, mask=mask, other=0.0).to(tl.float32)
    y = activate(gate, up, alpha, limit, KIND)
    tl.store(out_ptr + row * dim + columns, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_quantize_kernel(
    x_ptr, out_ptr, scale_ptr, x_stride, dim, alpha, limit,
    KIND: tl.constexpr, QUANT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Two passes over a row, the second from the cache: holding a long row in registers leaves too few programs."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * x_stride
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, dim, BLOCK):
        largest = tl.maximum(largest, tl.abs(_gated(x_row, start, dim, alpha, limit, KIND, BLOCK)))
    scale = row_scale(tl.max(largest, axis=0), QUANT)
    for start in range(0, dim, BLOCK):
        y = _gated(x_row, start, dim, alpha, limit, KIND, BLOCK)
        columns = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + row * dim + columns, row_codes(y, scale, QUANT), mask=columns < dim)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _gated(x_row, start, dim, alpha, limit, KIND: tl.constexpr, BLOCK: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    mask = columns < dim
    gate = tl.load(x_row + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_row + dim + columns, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, activate(gate, up, alpha, limit, KIND), 0.0)


@triton.jit
def _quantize_kernel(x_ptr, out_ptr, scale_ptr, x_stride, dim, QUANT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < dim
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    codes, scale = quantize_rows(x[None, :], QUANT)
    tl.store(out_ptr + row * dim + columns[None, :], codes, mask=mask[None, :])
    tl.store(scale_ptr + row + tl.arange(0, 1), scale)


def _ok(x: torch.Tensor) -> bool:
    return runs_here(x) and x.is_floating_point() and x.dim() == 2 and x.numel() > 0 and x.stride(1) == 1


def _quantizable(x: torch.Tensor, dtype: torch.dtype) -> bool:
    return _ok(x) and quantization_of(dtype) != NO_QUANT.value and x.shape[1] <= MAX_QUANTIZED_DIM


@ops.silu_and_mul.register("triton", supports=_ok)
def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """One launch; bound by 1.5 * gate_up.nbytes."""
    return _launch_gated(gate_up, SILU.value)


@ops.gelu_and_mul.register("triton", supports=_ok)
def gelu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    return _launch_gated(gate_up, GELU.value)


@ops.clamped_swiglu_and_mul.register("triton", supports=lambda gate_up, alpha, limit: _ok(gate_up))
def clamped_swiglu_and_mul(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    return _launch_gated(gate_up, CLAMPED.value, alpha, limit)


@ops.silu_and_mul_quantize.register("triton", supports=_quantizable)
def silu_and_mul_quantize(gate_up: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rows, dim = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, dim), dtype=dtype, device=gate_up.device)
    scale = torch.empty(rows, dtype=torch.float32, device=gate_up.device)
    block = min(4096, triton.next_power_of_2(dim))
    default = LaunchConfig(block_n=block, num_warps=_warps(block))
    key = f"{str(dtype).removeprefix('torch.')}_{triton.next_power_of_2(dim)}"
    config = launch_config("silu_and_mul_quantize", key, gate_up.device, default)
    _gated_quantize_kernel[(rows,)](
        gate_up, out, scale, gate_up.stride(0), dim, 0.0, 0.0,
        KIND=SILU.value, QUANT=quantization_of(dtype), BLOCK=config.block_n, num_warps=config.num_warps,
    )  # fmt: skip
    return out, scale


@ops.quantize_rows.register("triton", supports=_quantizable)
def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch; bound by x.nbytes + codes."""
    rows, dim = x.shape
    out = torch.empty((rows, dim), dtype=dtype, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(dim)
    _quantize_kernel[(rows,)](
        x, out, scale, x.stride(0), dim, QUANT=quantization_of(dtype), BLOCK=block, num_warps=_warps(block)
    )
    return out, scale


def _launch_gated(gate_up: torch.Tensor, kind: int, alpha: float = 0.0, limit: float = 0.0) -> torch.Tensor:
    rows, dim = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, dim), dtype=gate_up.dtype, device=gate_up.device)
    block = min(2048, triton.next_power_of_2(dim))
    _gated_kernel[(rows, triton.cdiv(dim, block))](
        gate_up, out, gate_up.stride(0), dim, alpha, limit, KIND=kind, BLOCK=block, num_warps=_warps(block)
    )
    return out


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))
