"""Rotary embedding and writing keys and values into the paged cache."""

from __future__ import annotations

import torch

from octavo_kernels.batch import PagedKVCache
from octavo_kernels.reference.norm import rms_norm

INT8_MAX = 127.0
FP8_MAX = 448.0  # largest finite float8_e4m3fn


def rope_and_store_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: PagedKVCache | None,
    cos_sin: torch.Tensor | None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-head RMSNorm (if given), rotary embedding (if given), cache write (if given); returns (query, key).

    query: [T, num_heads, head_dim]; key, value: [T, num_kv_heads, head_dim]; views of one fused projection are fine
    and implementations may overwrite them. positions, slot_mapping: [T] int64; a slot below 0 is not written.
    q_norm, k_norm: [head_dim].
    cos_sin: [max_positions, rotary_dim] float32, cosines in the first half and sines in the second; the first
    rotary_dim dimensions of a head are rotated in two halves (NeoX layout), the rest is left alone.
    """
    if q_norm is not None and k_norm is not None:
        query, key = rms_norm(query, q_norm, eps), rms_norm(key, k_norm, eps)
    if cos_sin is not None:
        query, key = rope(query, positions, cos_sin), rope(key, positions, cos_sin)
    if cache is not None:
        store_kv(key, value, slot_mapping, cache)
    return query, key


def rope(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first rotary_dim dimensions of every head by its position. x: [T, heads, head_dim] -> same."""
    rotary_dim = cos_sin.shape[-1]
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    low, high = x[..., :rotary_dim].float().chunk(2, dim=-1)
    rotated = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
    return rotated if rotary_dim == x.shape[-1] else torch.cat((rotated, x[..., rotary_dim:]), dim=-1)


def store_kv(key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor, cache: PagedKVCache) -> None:
    """Write each token's key and value at its slot. key, value: [T, num_kv_heads, head_dim]; slots distinct, and below
    0 for padding, which is not written."""
    if bool((slot_mapping < 0).any()):
        written = slot_mapping >= 0
        key, value, slot_mapping = key[written], value[written], slot_mapping[written]
    block, offset = slot_mapping // cache.block_size, slot_mapping % cache.block_size
    for fresh, stored, scales in ((key, cache.key, cache.key_scale), (value, cache.value, cache.value_scale)):
        if scales is None:
            stored[block, :, offset] = fresh.to(stored.dtype)
        else:
            codes, scale = quantize_kv(fresh, stored.dtype)
            stored[block, :, offset] = codes
            scales[block, :, offset] = scale


def quantize_kv(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric, one scale for each token and head: [T, heads, head_dim] -> codes alike, scales [T, heads]."""
    largest = x.float().abs().amax(-1)
    limit = INT8_MAX if dtype == torch.int8 else FP8_MAX
    # A tensor of limits: CUDA divides by a plain number through its reciprocal, one rounding off.
    scale = torch.where(largest > 0, largest / torch.full_like(largest, limit), torch.ones_like(largest))
    scaled = x.float() / scale.unsqueeze(-1)
    codes = scaled.round().clamp(-limit, limit).to(torch.int8) if dtype == torch.int8 else scaled.to(dtype)
    return codes, scale


def copy_blocks(cache: PagedKVCache, sources: torch.Tensor, destinations: torch.Tensor) -> None:
    """Copy whole blocks, as if all sources were read first. sources, destinations: [n] int64."""
    for stored in (cache.key, cache.value, cache.key_scale, cache.value_scale):
        if stored is not None:
            stored[destinations] = stored[sources]
