"""Per-head RMSNorm, rotary embedding and the (quantized) write into the paged cache, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels import ops
from octavo_kernels.batch import PagedKVCache
from octavo_kernels.triton.environment import NO_QUANT, quantization_of, quantize_rows, runs_here

MAX_HEADS_EACH = 8  # heads a program rotates
MAX_HEAD_DIM = 512


@triton.jit
def _rotate(
    x_ptr, heads, valid, dims, head_stride, norm_ptr, cos_sin_ptr, position, eps,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Heads of one token, normalised and rotated, float32 [heads, dims]. The partner of each dimension in its
    rotation is loaded a second time (from the L1 cache) instead of being exchanged between threads."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    row = x_ptr + heads[:, None] * head_stride
    x = tl.load(row + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORM:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
        weight = tl.load(norm_ptr + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
        x = x * inverse * weight[None, :]
    if ROTARY_DIM > 0:
        rotated = dims < ROTARY_DIM
        partner = tl.where(dims < HALF, dims + HALF, dims - HALF)
        other = tl.load(row + partner[None, :], mask=mask & rotated[None, :], other=0.0).to(tl.float32)
        if NORM:
            partner_weight = tl.load(norm_ptr + partner, mask=rotated, other=0.0).to(tl.float32)
            other = other * inverse * partner_weight[None, :]
        angle = position * ROTARY_DIM + tl.where(dims < HALF, dims, dims - HALF)
        cos = tl.load(cos_sin_ptr + angle, mask=rotated, other=1.0)
        sin = tl.load(cos_sin_ptr + angle + HALF, mask=rotated, other=0.0)
        x = x * cos[None, :] + other * tl.where(dims < HALF, -sin, sin)[None, :]
    return x


@triton.jit
def _store(
    codes_ptr, scale_ptr, x, heads, valid, dims, slot, block_stride, head_stride, offset_stride, scale_block_stride,
    scale_head_stride, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, QUANT: tl.constexpr,
):  # fmt: skip
    """Write one token's heads at its slot of the cache."""
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    place = codes_ptr + block * block_stride + heads[:, None] * head_stride + offset * offset_stride + dims[None, :]
    if QUANT == NO_QUANT:
        tl.store(place, x.to(codes_ptr.dtype.element_ty), mask=mask)
    else:
        codes, scale = quantize_rows(x.to(tl.float32), QUANT)
        tl.store(place, codes, mask=mask)
        tl.store(scale_ptr + block * scale_block_stride + heads * scale_head_stride + offset, scale, mask=valid)


@triton.jit(do_not_specialize=["num_slots", "max_positions"])
def _rope_store_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, positions_ptr, slots_ptr, cos_sin_ptr, q_norm_ptr, k_norm_ptr,
    key_cache_ptr, value_cache_ptr, key_scale_ptr, value_scale_ptr,
    num_slots, max_positions, eps,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    block_stride, cache_head_stride, offset_stride, scale_block_stride, scale_head_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    NORM: tl.constexpr, STORE: tl.constexpr, QUANT: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEADS_EACH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    QUERY_PARTS: tl.constexpr = (NUM_HEADS + HEADS_EACH - 1) // HEADS_EACH
    position = tl.load(positions_ptr + token)
    if ROTARY_DIM > 0:
        position = tl.minimum(tl.maximum(position, 0), max_positions - 1)
    if part < QUERY_PARTS:
        heads = part * HEADS_EACH + tl.arange(0, HEADS_EACH)
        valid = heads < NUM_HEADS
        x = _rotate(
            q_ptr + token * q_stride, heads, valid, dims, q_head_stride, q_norm_ptr, cos_sin_ptr, position, eps,
            HEAD_DIM, ROTARY_DIM, NORM,
        )  # fmt: skip
        place = q_out_ptr + token * NUM_HEADS * HEAD_DIM + heads[:, None] * HEAD_DIM + dims[None, :]
        tl.store(place, x.to(q_out_ptr.dtype.element_ty), mask=valid[:, None] & (dims < HEAD_DIM)[None, :])
    else:
        heads = (part - QUERY_PARTS) * HEADS_EACH + tl.arange(0, HEADS_EACH)
        valid = heads < NUM_KV_HEADS
        x = _rotate(
            k_ptr + token * k_stride, heads, valid, dims, k_head_stride, k_norm_ptr, cos_sin_ptr, position, eps,
            HEAD_DIM, ROTARY_DIM, NORM,
        )  # fmt: skip
        mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
        key = x.to(k_out_ptr.dtype.element_ty)
        tl.store(
            k_out_ptr + token * NUM_KV_HEADS * HEAD_DIM + heads[:, None] * HEAD_DIM + dims[None, :], key, mask=mask
        )
        if STORE:
            slot = tl.load(slots_ptr + token)
            if (slot >= 0) & (slot < num_slots):
                value = tl.load(v_ptr + token * v_stride + heads[:, None] * v_head_stride + dims[None, :], mask, 0.0)
                _store(
                    key_cache_ptr, key_scale_ptr, key, heads, valid, dims, slot, block_stride, cache_head_stride,
                    offset_stride, scale_block_stride, scale_head_stride, BLOCK_SIZE, HEAD_DIM, QUANT,
                )  # fmt: skip
                _store(
                    value_cache_ptr, value_scale_ptr, value, heads, valid, dims, slot, block_stride, cache_head_stride,
                    offset_stride, scale_block_stride, scale_head_stride, BLOCK_SIZE, HEAD_DIM, QUANT,
                )  # fmt: skip


def _supports(
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
) -> bool:
    plain = all(x.stride(-1) == 1 for x in (query, key, value))
    same_layout = cache is None or (cache.key.stride() == cache.value.stride() and cache.key.stride(-1) == 1)
    rows = cos_sin is None or (cos_sin.is_contiguous() and cos_sin.shape[1] % 2 == 0)
    return (
        runs_here(query) and plain and same_layout and rows and (q_norm is None) == (k_norm is None)
        and query.shape[-1] <= MAX_HEAD_DIM and query.shape[0] > 0
    )  # fmt: skip


@ops.rope_and_store_kv.register("triton", supports=_supports)
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
    """One launch. Slots outside the cache (such as -1 for the padding of a captured graph) are not written."""
    tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    heads_each = min(MAX_HEADS_EACH, triton.next_power_of_2(num_kv_heads))
    block_d = max(16, triton.next_power_of_2(head_dim))
    q_out = torch.empty((tokens, num_heads, head_dim), dtype=query.dtype, device=query.device)
    k_out = torch.empty((tokens, num_kv_heads, head_dim), dtype=key.dtype, device=key.device)
    strides, scale_strides, num_slots, block_size, quant = _cache_layout(cache)
    grid = (tokens, triton.cdiv(num_heads, heads_each) + triton.cdiv(num_kv_heads, heads_each))
    _rope_store_kernel[grid](
        query, key, value, q_out, k_out, positions, slot_mapping, cos_sin, q_norm, k_norm,
        *((cache.key, cache.value, cache.key_scale, cache.value_scale) if cache else (None, None, None, None)),
        num_slots, cos_sin.shape[0] if cos_sin is not None else 0, eps,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        *strides, *scale_strides,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        ROTARY_DIM=cos_sin.shape[1] if cos_sin is not None else 0, NORM=q_norm is not None, STORE=cache is not None,
        QUANT=quant, BLOCK_SIZE=block_size, HEADS_EACH=heads_each, BLOCK_D=block_d,
        num_warps=max(1, min(4, heads_each * block_d // 256)),
    )  # fmt: skip
    return q_out, k_out


def _cache_layout(
    cache: PagedKVCache | None,
) -> tuple[tuple[int, int, int], tuple[int, int], int, int, int]:
    """(block, head and offset strides), (scale strides), slots, block size, quantization."""
    if cache is None:
        return (0, 0, 0), (0, 0), 0, 1, NO_QUANT.value
    key = cache.key
    scale = cache.key_scale
    scale_strides = (scale.stride(0), scale.stride(1)) if scale is not None else (0, 0)
    quant = quantization_of(key.dtype) if scale is not None else NO_QUANT.value
    strides = (key.stride(0), key.stride(1), key.stride(2))
    return strides, scale_strides, key.shape[0] * cache.block_size, cache.block_size, quant
