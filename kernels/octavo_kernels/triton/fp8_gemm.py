"""8-bit products on the tensor cores: float8 (per tensor, per token, per block of 128) and int8, with epilogues.

Hopper's tensor cores add float8 products with about 14 bits of mantissa (DeepSeek-V3, arXiv 2412.19437, part 3.3), so
a tile's product over 128 inputs is added to a float32 accumulator outside the tensor core: two-level accumulation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn import functional

from octavo_kernels import ops
from octavo_kernels.quantized_weights import Fp8Weight
from octavo_kernels.triton import mode
from octavo_kernels.triton.activation import quantize
from octavo_kernels.triton.environment import FP8, INT8, dot, quantization_of, quantize_rows, runs_here, sigmoid, tanh
from octavo_kernels.triton.tuning import LaunchConfig, launch_config

FEW_ROWS = 16  # up to here the weight's bytes set the time, and x is not quantized
MANY_ROWS = 128
BLOCK_K = 128  # the length of a scale block, and of the sums left to the tensor core
NO_ACTIVATION = tl.constexpr(0)
SILU = tl.constexpr(1)
GELU = tl.constexpr(2)
ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2}


@triton.jit
def _epilogue(acc, KIND: tl.constexpr):
    if KIND == SILU:
        acc = acc * sigmoid(acc)
    elif KIND == GELU:
        acc = 0.5 * acc * (1.0 + tanh((acc + 0.044715 * acc * acc * acc) * 0.7978845608028654))
    return acc


@triton.jit(do_not_specialize=["rows"])
def _scaled_kernel(
    x_ptr, weight_ptr, x_scale_ptr, weight_scale_ptr, bias_ptr, residual_ptr, out_ptr,
    rows, out_features, in_features, x_stride, x_scale_stride, weight_scale_stride,
    QUANT: tl.constexpr, BLOCKWISE: tl.constexpr, PER_ROW: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = activation((x * x_scale) @ (weight * weight_scale).T + bias) + residual. x: [rows, in], weight: [out, in].

    BLOCKWISE: x_scale [rows, in / 128], weight_scale [out / 128, in / 128]; else x_scale [rows] and weight_scale
    [out] (PER_ROW) or [1]. WIDE: x is not quantized, the weight's codes are widened in registers (W8A16).
    """
    m_tile, n_tile = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), GROUP_M)
    m = (m_tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (n_tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_valid = m < rows
    n_valid = n < out_features
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if QUANT == INT8 and not WIDE:
        exact = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for step in range(tl.cdiv(in_features, BLOCK_K)):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (k < in_features)[None, :]
        x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=m_valid[:, None] & inside, other=0.0)
        w = tl.load(weight_ptr + n[:, None] * in_features + k[None, :], mask=n_valid[:, None] & inside, other=0.0)
        if QUANT == INT8 and not WIDE:
            exact = tl.dot(x, tl.trans(w), exact, out_dtype=tl.int32)
        else:
            part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # what the tensor core alone adds up
            part = dot(x, tl.trans(w.to(x.dtype)), part)
            if BLOCKWISE:
                weight_scale = tl.load(weight_scale_ptr + n // BLOCK_K * weight_scale_stride + step, n_valid, 0.0)
                part *= weight_scale[None, :]
                if not WIDE:
                    x_scale = tl.load(x_scale_ptr + m * x_scale_stride + step, mask=m_valid, other=0.0)
                    part *= x_scale[:, None]
            acc += part
    if QUANT == INT8 and not WIDE:
        acc = exact.to(tl.float32)
    if not BLOCKWISE:
        if PER_ROW:
            acc *= tl.load(weight_scale_ptr + n, mask=n_valid, other=0.0)[None, :]
        else:
            acc *= tl.load(weight_scale_ptr)
        if not WIDE:
            acc *= tl.load(x_scale_ptr + m * x_scale_stride, mask=m_valid, other=0.0)[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n_valid, other=0.0).to(tl.float32)[None, :]
    acc = _epilogue(acc, ACTIVATION)
    place = m[:, None] * out_features + n[None, :]
    mask = m_valid[:, None] & n_valid[None, :]
    if RESIDUAL:
        acc += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _quantize_blocks_kernel(x_ptr, out_ptr, scale_ptr, x_stride, in_features, BLOCK: tl.constexpr):
    """One scale for each run of BLOCK inputs. Grid: (rows, runs)."""
    from_row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = k < in_features
    x = tl.load(x_ptr + from_row * x_stride + k, mask=mask, other=0.0).to(tl.float32)
    codes, scale = quantize_rows(x[None, :], FP8)
    tl.store(out_ptr + from_row * in_features + k[None, :], codes, mask=mask[None, :])
    tl.store(scale_ptr + from_row * tl.num_programs(1) + tl.program_id(1) + tl.arange(0, 1), scale)


@ops.scaled_linear.register(
    "triton",
    supports=lambda x, x_scale, weight, weight_scale, dtype, *rest, **more: (
        runs_here(x) and x.is_contiguous() and weight.is_contiguous() and x.shape[0] > 0
    ),
)
def scaled_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    plain = activation is None and residual is None and weight_scale.dim() == 1 and x_scale.dim() == 1
    if plain and _cublas_takes(x, weight, dtype):
        return _cublas(x, x_scale, weight, weight_scale, dtype, bias)
    return _launch(x, x_scale, weight, weight_scale, dtype, bias, activation, residual)


def _cublas_takes(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Float8 with one scale a row: cuBLASLt is faster than ours (1.6 times on an H200), where sizes suit it."""
    return (
        x.device.type == "cuda"
        and x.dtype == weight.dtype == torch.float8_e4m3fn
        and dtype == torch.bfloat16
        and weight.shape[0] % 16 == 0
        and weight.shape[1] % 16 == 0
        and not mode.batch_invariant()
        and _has_fp8(x.device)
    )


def _cublas(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    by_column = weight_scale.expand(weight.shape[0]).unsqueeze(0).contiguous()
    out = torch._scaled_mm(x, weight.t(), x_scale.unsqueeze(1), by_column, out_dtype=dtype)
    return out if bias is None else out.add_(bias)


def _cublas_takes_blocks(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Blocks of 128 by 128: cuBLASLt is twice as fast for many rows, where this torch offers it."""
    whole = weight.shape[0] % BLOCK_K == 0 and weight.shape[1] % BLOCK_K == 0
    return _cublas_takes(x, weight, dtype) and whole and x.shape[0] >= MANY_ROWS and hasattr(functional, "scaled_mm")


def _cublas_blocks(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Scales of x are wanted column by column."""
    kinds = functional.ScalingType
    out = functional.scaled_mm(
        x, weight.t(), x_scale.t().contiguous().t(), kinds.BlockWise1x128, weight_scale.t(), kinds.BlockWise128x128,
        output_dtype=dtype,
    )  # fmt: skip
    return out if bias is None else out.add_(bias)


def fp8_linear(x: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """Quantize x as the weight's scales ask (for each token, or each token and block), then one product in float8.
    Few rows, and GPUs without float8, keep x wide: reading the weight is what takes the time there."""
    codes, scale = weight.codes, weight.scale
    if mode.batch_invariant() or x.shape[0] <= FEW_ROWS or not _has_fp8(x.device):
        return _launch(x, None, codes, scale, x.dtype, bias, None, None)
    if weight.is_blockwise:
        x_codes, x_scale = quantize_blocks(x)
        if _cublas_takes_blocks(x_codes, codes, x.dtype):
            return _cublas_blocks(x_codes, x_scale, codes, scale, x.dtype, bias)
    else:
        x_codes, x_scale = quantize(x, torch.float8_e4m3fn)
        if _cublas_takes(x_codes, codes, x.dtype):
            return _cublas(x_codes, x_scale, codes, scale, x.dtype, bias)
    return _launch(x_codes, x_scale, codes, scale, x.dtype, bias, None, None)


def quantize_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [T, in] -> (float8 codes [T, in], scales [T, ceil(in / 128)])."""
    rows, in_features = x.shape
    runs = triton.cdiv(in_features, BLOCK_K)
    codes = torch.empty((rows, in_features), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((rows, runs), dtype=torch.float32, device=x.device)
    _quantize_blocks_kernel[(rows, runs)](x, codes, scale, x.stride(0), in_features, BLOCK=BLOCK_K, num_warps=1)
    return codes, scale


def _launch(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    rows, in_features = x.shape
    out_features = weight.shape[0]
    out = torch.empty((rows, out_features), dtype=dtype, device=x.device)
    config = _config(x, weight)
    blockwise = weight_scale.dim() == 2
    _scaled_kernel[(triton.cdiv(rows, config.block_m), triton.cdiv(out_features, config.block_n))](
        x, weight, x_scale, weight_scale, bias, residual, out, rows, out_features, in_features, x.stride(0),
        x_scale.stride(0) if x_scale is not None else 0, weight_scale.stride(0) if blockwise else 0,
        QUANT=quantization_of(weight.dtype), BLOCKWISE=blockwise, PER_ROW=weight_scale.numel() > 1,
        BIAS=bias is not None, RESIDUAL=residual is not None, ACTIVATION=ACTIVATIONS[activation],
        WIDE=x_scale is None, GROUP_M=8, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=BLOCK_K,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def _config(x: torch.Tensor, weight: torch.Tensor) -> LaunchConfig:
    if mode.batch_invariant():
        return LaunchConfig(block_m=32, block_n=64)
    rows = min(128, max(16, triton.next_power_of_2(x.shape[0])))
    default = LaunchConfig(
        block_m=rows, block_n=128 if rows >= 64 else 32, num_warps=8 if rows >= 128 else 4, num_stages=3
    )
    key = f"{str(x.dtype).removeprefix('torch.')}_m{rows}_" + "x".join(
        str(triton.next_power_of_2(size)) for size in weight.shape
    )
    return launch_config("scaled_gemm", key, x.device, default)


def _has_fp8(device: torch.device) -> bool:
    """Whether tensor cores multiply float8 (compute capability 8.9 and up)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
