"""Rotary position embedding as a checkpoint describes it."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from octavo_engine.errors import ModelLoadError
from octavo_engine.models.raw_config import RawConfig

_TINY = 1e-3


class RopeKind(enum.StrEnum):
    """How rotary frequencies are stretched beyond the length a model was first trained for."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"
    YARN = "yarn"
    LONGROPE = "longrope"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of one kind of layer; the fields after `kind` matter to some kinds only.

    rotary_dim: how many of a head's dimensions turn. attention_factor: cosines and sines are multiplied by it.
    short_factor, long_factor: [rotary_dim / 2] divisors of the frequencies (long-rope, and `rope_freqs` of GGUF).
    """

    theta: float
    rotary_dim: int
    kind: RopeKind = RopeKind.DEFAULT
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


def rope_config(raw: RawConfig, section: RawConfig | None = None, *, default_theta: float = 10_000.0) -> RopeConfig:
    """Rotary settings, in the present form (`rope_parameters`) or the former one (`rope_theta` and `rope_scaling`).

    section: the object to read instead of `rope_parameters` (models with several ropes).
    """
    rope = section or raw.section("rope_parameters") or raw.section("rope_scaling") or RawConfig({}, raw.origin)
    theta = rope.number("rope_theta", raw.number("rope_theta", default_theta), low=1.001)
    partial = rope.number("partial_rotary_factor", raw.number("partial_rotary_factor", 1.0), low=0.0, high=1.0)
    rotary_dim = int(head_layout(raw)[2] * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ModelLoadError(f"{rope.origin}: partial_rotary_factor leaves {rotary_dim} rotary dimensions: impossible")
    name = rope.text("rope_type", rope.text("type", "default"))
    if name in ("default", "dynamic"):  # dynamic scaling acts only beyond max_position_embeddings, our limit
        return RopeConfig(theta, rotary_dim)
    reader = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope, "su": _longrope}.get(name)
    if reader is None:
        raise rope.wrong("rope_type", "one of default, dynamic, linear, llama3, yarn, longrope")
    return reader(raw, rope, theta, rotary_dim)


def _linear(raw: RawConfig, rope: RawConfig, theta: float, rotary_dim: int) -> RopeConfig:
    return RopeConfig(theta, rotary_dim, RopeKind.LINEAR, factor=_factor(rope))


def _llama3(raw: RawConfig, rope: RawConfig, theta: float, rotary_dim: int) -> RopeConfig:
    return RopeConfig(
        theta,
        rotary_dim,
        RopeKind.LLAMA3,
        factor=_factor(rope),
        original_max_position=rope.integer("original_max_position_embeddings"),
        low_freq_factor=(low := rope.number("low_freq_factor", low=_TINY)),
        high_freq_factor=rope.number("high_freq_factor", low=low + _TINY),
    )


def _yarn(raw: RawConfig, rope: RawConfig, theta: float, rotary_dim: int) -> RopeConfig:
    original = rope.integer("original_max_position_embeddings", raw.integer("max_position_embeddings"))
    factor = _factor(rope, raw.integer("max_position_embeddings") / original)
    derived = _yarn_attention_factor(
        factor, rope.number("mscale", 0.0, low=0.0, high=100.0), rope.number("mscale_all_dim", 0.0, low=0.0, high=100.0)
    )
    return RopeConfig(
        theta,
        rotary_dim,
        RopeKind.YARN,
        factor=factor,
        original_max_position=original,
        beta_fast=rope.number("beta_fast", 32.0, low=_TINY),
        beta_slow=rope.number("beta_slow", 1.0, low=_TINY),
        truncate=rope.flag("truncate", True),
        attention_factor=rope.number("attention_factor", derived, low=_TINY, high=1e3),
    )


def _longrope(raw: RawConfig, rope: RawConfig, theta: float, rotary_dim: int) -> RopeConfig:
    longest = raw.integer("max_position_embeddings")
    original = raw.integer(
        "original_max_position_embeddings", rope.integer("original_max_position_embeddings", longest)
    )
    factors = rope.numbers("short_factor"), rope.numbers("long_factor")
    if any(len(f) != rotary_dim // 2 or min(f) <= 0 for f in factors):
        raise ModelLoadError(
            f"{rope.origin}: short_factor and long_factor need {rotary_dim // 2} positive numbers each"
        )
    derived = _longrope_attention_factor(longest / original, original)
    return RopeConfig(
        theta,
        rotary_dim,
        RopeKind.LONGROPE,
        original_max_position=original,
        attention_factor=rope.number("attention_factor", derived, low=_TINY, high=1e3),
        short_factor=factors[0],
        long_factor=factors[1],
    )


def _factor(rope: RawConfig, default: float | None = None) -> float:
    return rope.number("factor", default, low=_TINY, high=1e6)


def _yarn_attention_factor(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """How much YaRN sharpens attention for a stretch of `factor`."""

    def scaled(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return scaled(mscale) / scaled(mscale_all_dim) if mscale and mscale_all_dim else scaled(1.0)


def _longrope_attention_factor(stretch: float, original_max_position: int) -> float:
    """How much long-rope sharpens attention (arXiv 2402.13753)."""
    if stretch <= 1.0 or original_max_position <= 1:
        return 1.0
    return math.sqrt(1 + math.log(stretch) / math.log(original_max_position))


def head_layout(raw: RawConfig) -> tuple[int, int, int]:
    """(query heads, key-value heads, dimensions of a head)."""
    hidden, heads = raw.integer("hidden_size"), raw.integer("num_attention_heads", high=4096)
    kv_heads = raw.integer("num_key_value_heads", heads, high=4096)
    if heads % kv_heads:
        raise raw.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    if not raw.has("head_dim") and hidden % heads:
        raise raw.wrong("num_attention_heads", f"a divisor of hidden_size ({hidden})")
    head_dim = raw.integer("head_dim", hidden // heads, high=1024)
    if head_dim % 2:
        raise raw.wrong("head_dim", "even")
    return heads, kv_heads, head_dim
