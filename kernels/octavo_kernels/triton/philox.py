"""Random numbers of the sampling kernels (Philox, as in the reference), and float32 as ordered integers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def uniform_bits(seed, c0, c1, STREAM: tl.constexpr):
    """The first Philox word at counter (c0, c1, STREAM, 0)."""
    c0 = c0.to(tl.uint32, bitcast=True)
    c1 = tl.zeros_like(c0) + c1.to(tl.uint32)
    zero = tl.zeros_like(c0)
    first, _second, _third, _fourth = tl.philox(seed, c0, c1, zero + STREAM, zero)
    return first


@triton.jit
def to_uniform(bits):
    """(0, 1], as in the reference. The 64-bit detour rounds once."""
    return (bits.to(tl.float64) * 2.3283064365386963e-10).to(tl.float32) + 1.1641532182693481e-10


@triton.jit
def gumbel_noise(bits):
    u = to_uniform(bits)
    exponential = tl.where(u < 1e-3, u + 0.5 * u * u, -tl.log(1.0 - u))
    return -tl.log(exponential)


@triton.jit
def ordered_key(x):
    """float32 -> uint32 in the same order; both zeros are one number."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ tl.where(bits < 0, -1, -2147483648)).to(tl.uint32, bitcast=True)
