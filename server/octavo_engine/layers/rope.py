"""Rotary position embedding tables and the ways to stretch them to long contexts."""

from __future__ import annotations

import math

import torch

from octavo_engine.models.rope_config import RopeConfig, RopeKind


def cos_sin_table(rope: RopeConfig, max_positions: int, device: torch.device) -> torch.Tensor:
    """[max_positions, rotary_dim] float32: cosines in the first half, sines in the second."""
    frequencies = inverse_frequencies(rope, max_positions).to(torch.float32)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.attention_factor
    return table.to(device)


def inverse_frequencies(rope: RopeConfig, max_positions: int) -> torch.Tensor:
    """[rotary_dim / 2] float32 turns per position, scaled as `rope.kind` says.

    Long-rope switches to its long factors where the engine may serve more positions than the model was first
    trained for: a choice for the whole run, since cached keys cannot change their factors half-way.
    """
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
    plain = 1.0 / (rope.theta**exponents)
    match rope.kind:
        case RopeKind.LINEAR:
            plain = plain / rope.factor
        case RopeKind.LLAMA3:
            plain = _llama3(plain, rope)
        case RopeKind.YARN:
            plain = _yarn(plain, rope)
        case RopeKind.LONGROPE:
            factors = rope.long_factor if max_positions > rope.original_max_position else rope.short_factor
            plain = 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta**exponents)
        case RopeKind.DEFAULT:
            pass
    return plain


def _llama3(plain: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Llama 3.1: slow frequencies divided by the factor, fast ones kept, a smooth ramp between."""
    turns = rope.original_max_position * plain / (2 * math.pi)  # over the original context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    ramp = smooth.clamp(0.0, 1.0)
    return (1 - ramp) * plain / rope.factor + ramp * plain


def _yarn(plain: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """YaRN (arXiv 2309.00071): dimensions turning often are kept, seldom-turning ones interpolated."""

    def dimension(rotations: float) -> float:
        length = rope.original_max_position / (rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)
