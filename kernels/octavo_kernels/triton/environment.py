"""Where Triton kernels run here: on a CUDA device, or interpreted on CPU tensors (`TRITON_INTERPRET=1`).

Kernels name the integers that change from step to step in `do_not_specialize`: Triton would otherwise compile again
when a count becomes 1 or a multiple of 16, in the middle of serving.
"""

from __future__ import annotations

import functools
import os

import torch

# Triton 3.9 warns until the choice is made; fused multiply-add is what the reference on CUDA does too.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
import triton.language as tl

from octavo_kernels.registry import BackendUnavailableError

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
ENV_COMPILE_ONLY = "OCTAVO_TRITON_COMPILE_ONLY"
COMPILE_ONLY: bool = os.environ.get(ENV_COMPILE_ONLY, "") == "1"  # see `octavo_kernels.triton.offline`
INTERPRETED_KERNELS = tl.constexpr(INTERPRETED)

INT8_MAX = tl.constexpr(127.0)
FP8_MAX = tl.constexpr(448.0)
LOG2E = tl.constexpr(1.4426950408889634)
ROUND_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds a float32 half to even
FP8_SUBNORMAL_MAGIC = tl.constexpr(24576.0)  # 1.5 * 2**14: the same, to multiples of 2**-9

NO_QUANT = tl.constexpr(0)
INT8 = tl.constexpr(1)
FP8 = tl.constexpr(2)

DEFAULT_MULTIPROCESSORS = 132  # of an H100 or H200; assumed where no device can be asked


def require_device() -> str:
    """Describe what the kernels run on, or raise `BackendUnavailableError` with the reason."""
    if INTERPRETED:
        return f"Triton {triton.__version__}, interpreted on the CPU"
    if COMPILE_ONLY:
        return f"Triton {triton.__version__}, compiled for a device that is not here; nothing runs"
    if not torch.cuda.is_available():
        raise BackendUnavailableError("no CUDA device (set TRITON_INTERPRET=1 to interpret the kernels on the CPU)")
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0):
        raise BackendUnavailableError(
            f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}; the kernels need 8.0 or newer"
        )
    return f"Triton {triton.__version__} on {torch.cuda.get_device_name()}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device, to decide how far to split work."""
    if device.type != "cuda":
        return DEFAULT_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def runs_here(x: torch.Tensor) -> bool:
    """Whether a kernel can take this tensor: on CUDA, or anywhere when interpreted or only compiled."""
    return INTERPRETED or COMPILE_ONLY or x.device.type == "cuda"


def quantization_of(dtype: torch.dtype) -> int:
    """The constexpr that names an 8-bit storage type; anything else is not quantized."""
    codes = {torch.int8: INT8.value, torch.float8_e4m3fn: FP8.value}
    return int(codes.get(dtype, NO_QUANT.value))


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32; float32 operands are not cut to TF32. The interpreter multiplies bfloat16 operands as if
    they were integers, so there they are widened first."""
    if INTERPRETED_KERNELS and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def round_half_even(x):
    """Nearest integer of |x| < 2**22 as float32."""
    return (x + ROUND_MAGIC) - ROUND_MAGIC


@triton.jit
def to_fp8(x):
    """Nearest float8_e4m3fn of float32 values within its range. The interpreter loses the carry when a mantissa
    rounds up to the next power of two, so there the value is first rounded to four significant bits."""
    if INTERPRETED_KERNELS:
        spread = x * 1048577.0  # 2**20 + 1: Dekker's splitting
        normal = spread - (spread - x)
        subnormal = (x + FP8_SUBNORMAL_MAGIC) - FP8_SUBNORMAL_MAGIC
        x = tl.where(tl.abs(x) < 0.015625, subnormal, normal)
    return x.to(tl.float8e4nv)


@triton.jit
def row_scale(largest, KIND: tl.constexpr):
    """The scale of rows whose largest size is `largest`, 1 for rows of zeros."""
    return tl.where(largest > 0, tl.div_rn(largest, INT8_MAX if KIND == INT8 else FP8_MAX), 1.0)


@triton.jit
def row_codes(x, scale, KIND: tl.constexpr):
    """Codes of float32 x under `scale`, which broadcasts to x."""
    scaled = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    if KIND == INT8:
        codes = tl.minimum(tl.maximum(round_half_even(scaled), -INT8_MAX), INT8_MAX).to(tl.int8)
    else:
        codes = to_fp8(tl.minimum(tl.maximum(scaled, -FP8_MAX), FP8_MAX))
    return codes


@triton.jit
def quantize_rows(x, KIND: tl.constexpr):
    """Symmetric codes with one scale a row. x: [rows, columns] float32 -> (codes, scale [rows])."""
    scale = row_scale(tl.max(tl.abs(x), axis=1), KIND)
    return row_codes(x, scale[:, None], KIND), scale


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def tanh(x):
    """Through exp2 of a non-positive number, so that nothing overflows; near 0, where that would cancel, by the first
    terms of its series."""
    e = tl.exp2(tl.abs(x) * -2.0 * LOG2E)
    t = (1.0 - e) / (1.0 + e)
    square = x * x
    series = x * (1.0 + square * (-0.33333334 + square * (0.13333334 + square * -0.053968254)))
    return tl.where(tl.abs(x) < 0.2, series, tl.where(x < 0, -t, t))
