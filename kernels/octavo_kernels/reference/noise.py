"""Philox4x32-10 (Salmon et al., SC 2011) in torch integers: the same random bits as Triton's generator."""

from __future__ import annotations

import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox(seed: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor) -> torch.Tensor:
    """The first word of Philox at counter (c0, c1, c2, 0). All int64 and broadcastable; seed uses 64 bits, counters 32.
    Returns int64 in 0 .. 2**32 - 1."""
    every = (seed + c0 + c1 + c2) & 0  # of the common shape
    c0, c1, c2 = (every + (c & _MASK) for c in (c0, c1, c2))
    c3 = every
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _M0)
        high2, low2 = _multiply(c2, _M1)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0


def uniform(bits: torch.Tensor) -> torch.Tensor:
    """32 random bits as a float32 in (0, 1]; small values keep full precision."""
    return (bits.double() * 2.0**-32).float() + 2.0**-33


def exponential(bits: torch.Tensor) -> torch.Tensor:
    """A standard exponential variable, precise where it is small (its small values decide a Gumbel maximum)."""
    u = uniform(bits)
    return torch.where(u < 1e-3, u + 0.5 * u * u, -torch.log(1.0 - u))


def gumbel(bits: torch.Tensor) -> torch.Tensor:
    """A standard Gumbel variable."""
    return -torch.log(exponential(bits))


def _multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(upper, lower) 32 bits of a product of 32-bit numbers, without overflowing int64."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
