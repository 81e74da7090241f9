"""Paged attention, rotary embedding and cache writes: batches and caches as native structs, and the ops on them."""

from __future__ import annotations

import ctypes

import torch

from octavo_kernels.batch import AttentionBatch, PagedKVCache
from octavo_kernels.cpu.bindings import Attention, Batch, KVCache, check, native

KV_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
MAX_HEAD_DIM = 512
MAX_GROUP = 64


def kv_struct(cache: PagedKVCache) -> KVCache:
    """Pointers into a cache; raises `ValueError` where the native kernels cannot read it."""
    if cache.key.dtype not in KV_DTYPES or not (cache.key.is_contiguous() and cache.value.is_contiguous()):
        raise ValueError(f"a KV cache of {cache.key.dtype} has no native form (float32, bfloat16, float16 or int8 do)")
    scales = [None if s is None else s.data_ptr() for s in (cache.key_scale, cache.value_scale)]
    return KVCache(cache.key.data_ptr(), cache.value.data_ptr(), *scales)


def fill_batch(
    struct: Batch, batch: AttentionBatch, cache: PagedKVCache, token_ids: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """Point `struct` at a batch; returns the tensors that must stay alive while it is used."""
    positions, slots = batch.positions.contiguous(), batch.slot_mapping.contiguous()
    starts, lengths = batch.query_start_loc.contiguous(), batch.seq_lens.contiguous()
    tables = batch.block_tables.contiguous()
    ids = positions if token_ids is None else token_ids.contiguous()
    struct.num_tokens, struct.num_seqs, struct.num_decodes = positions.shape[0], lengths.shape[0], batch.num_decodes
    struct.max_blocks, struct.block_size, struct.num_blocks = tables.shape[1], cache.block_size, cache.key.shape[0]
    struct.kv_dtype = KV_DTYPES[cache.key.dtype]
    struct.token_ids, struct.positions, struct.slot_mapping = ids.data_ptr(), positions.data_ptr(), slots.data_ptr()
    struct.query_start_loc, struct.seq_lens = starts.data_ptr(), lengths.data_ptr()
    struct.block_tables = tables.data_ptr()
    return positions, slots, starts, lengths, tables, ids


def supports_heads(query: torch.Tensor, cache: PagedKVCache | None) -> bool:
    """Whether the native kernels can take these heads: query [T, num_heads, head_dim]."""
    heads, dim = query.shape[1], query.shape[2]
    if dim % 16 or dim > MAX_HEAD_DIM or query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return cache is None or (cache.key.dtype in KV_DTYPES and heads // cache.key.shape[1] <= MAX_GROUP)


def paged_attention(
    query: torch.Tensor,
    cache: PagedKVCache,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.paged_attention` on the native kernels, computed in float32."""
    wide = query.to(torch.float32).contiguous()
    wide_sinks = None if sinks is None else sinks.to(torch.float32).contiguous()
    out = torch.empty_like(wide)
    settings = Attention(
        num_heads=query.shape[1],
        num_kv_heads=cache.key.shape[1],
        head_dim=query.shape[2],
        sliding_window=sliding_window,
        bf16_products=int(query.dtype == torch.bfloat16),
        scale=scale,
        soft_cap=soft_cap,
        sinks=None if wide_sinks is None else wide_sinks.data_ptr(),
    )
    struct = Batch()
    held = fill_batch(struct, batch, cache, None)
    kv = kv_struct(cache)
    check(
        native.oct_paged_attention(
            ctypes.byref(settings), ctypes.byref(struct), ctypes.byref(kv), wide.data_ptr(), out.data_ptr()
        )
    )
    del held
    return out.to(query.dtype)
