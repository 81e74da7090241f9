"""Multi-head latent attention in the latent space: all heads read one key, whose first part is also the value.

One program serves a token and a block of heads; a tile of the cache is loaded once and used both as keys and as
values (as FlashMLA does), so the bytes read are those of the latent cache alone. Split over keys like flash decoding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels import ops
from octavo_kernels.batch import AttentionBatch
from octavo_kernels.triton import mode
from octavo_kernels.triton.environment import LOG2E, dot, multiprocessors, runs_here
from octavo_kernels.triton.flash import merge_kernel
from octavo_kernels.triton.tuning import LaunchConfig, launch_config

MAX_SPLITS = 64
MIN_TILES = 2


@triton.jit(do_not_specialize=["num_seqs", "num_blocks", "table_width", "table_stride"])
def _mla_kernel(
    q_ptr, cache_ptr, tables_ptr, query_start_ptr, positions_ptr, out_ptr, partial_ptr, stats_ptr,
    scale, num_heads, num_seqs, num_blocks, table_width, q_stride, table_stride, block_stride, row_stride,
    LATENT: tl.constexpr, ROPE: tl.constexpr, ROPE_BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, blocks of heads, splits)."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_ptr + middle) <= token:
            low = middle
        else:
            high = middle
    end = tl.minimum((tl.load(positions_ptr + token) + 1).to(tl.int32), table_width * BLOCK_SIZE)
    first_tile = 0
    last_tile = tl.cdiv(end, BLOCK_N)
    if SPLIT:
        tiles = tl.maximum(tl.cdiv(last_tile, tl.num_programs(2)), MIN_TILES)
        first_tile = split * tiles
        last_tile = tl.minimum(last_tile, first_tile + tiles)
    d = tl.arange(0, LATENT)
    r = tl.arange(0, ROPE_BLOCK)
    valid = heads < num_heads
    q_row = q_ptr + token * q_stride + heads[:, None] * (LATENT + ROPE)
    q = tl.load(q_row + d[None, :], mask=valid[:, None], other=0.0)
    q_rope = tl.load(q_row + LATENT + r[None, :], mask=valid[:, None] & (r < ROPE)[None, :], other=0.0)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, LATENT), tl.float32)
    for tile in range(first_tile, last_tile):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < end
        block = tl.load(tables_ptr + low * table_stride + n // BLOCK_SIZE, mask=inside, other=0)
        block = tl.minimum(tl.maximum(block, 0), num_blocks - 1).to(tl.int64)
        row = cache_ptr + (block * block_stride + (n % BLOCK_SIZE) * row_stride)
        latent = tl.load(row[:, None] + d[None, :], mask=inside[:, None], other=0.0)
        rope = tl.load(row[None, :] + LATENT + r[:, None], mask=inside[None, :] & (r < ROPE)[:, None], other=0.0)
        scores = dot(q_rope, rope, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        scores = dot(q, tl.trans(latent), scores) * (scale * LOG2E)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, axis=1)
        acc = dot(weights.to(latent.dtype), latent, acc * shrink[:, None])
        row_max = new_max
    if SPLIT:
        place = (token * num_heads + heads) * tl.num_programs(2) + split
        tl.store(stats_ptr + place * 2, row_max, mask=valid)
        tl.store(stats_ptr + place * 2 + 1, row_sum, mask=valid)
        if first_tile < last_tile:
            tl.store(partial_ptr + place[:, None] * LATENT + d[None, :], acc, mask=valid[:, None])
    else:
        acc = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
        place = (token * num_heads + heads)[:, None] * LATENT + d[None, :]
        tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=valid[:, None])


def _supports(query: torch.Tensor, cache: torch.Tensor, batch: AttentionBatch, scale: float, latent_dim: int) -> bool:
    power = latent_dim == triton.next_power_of_2(latent_dim) and latent_dim >= 16
    return runs_here(query) and power and query.is_contiguous() and cache.stride(2) == 1 and query.dtype == cache.dtype


@ops.mla_attention.register("triton", supports=_supports)
def mla_attention(
    query: torch.Tensor, cache: torch.Tensor, batch: AttentionBatch, scale: float, latent_dim: int
) -> torch.Tensor:
    """One launch, and one that merges splits. Decodes are bound by the bytes of the latent cache; prefills should
    expand the latent and use `varlen_attention` or `paged_attention` instead."""
    tokens, num_heads, width = query.shape
    rope = width - latent_dim
    out = torch.empty((tokens, num_heads, latent_dim), dtype=query.dtype, device=query.device)
    wide = num_heads > 16  # more heads of a program read the latent cache fewer times
    default = LaunchConfig(
        block_m=64 if wide else 16, block_n=64 if wide else 32, num_warps=8 if wide else 4, num_stages=3
    )
    config = launch_config("mla_decode", f"h{num_heads}_d{latent_dim}", query.device, default)
    head_blocks = triton.cdiv(num_heads, config.block_m)
    splits = _splits(query, tokens * head_blocks, batch.max_seq_len, config)
    partial = torch.empty((tokens, num_heads, splits, latent_dim), dtype=torch.float32, device=query.device)
    stats = torch.empty((tokens, num_heads, splits, 2), dtype=torch.float32, device=query.device)
    _mla_kernel[(tokens, head_blocks, splits)](
        query, cache, batch.block_tables, batch.query_start_loc, batch.positions, out, partial, stats,
        scale, num_heads, batch.num_seqs, cache.shape[0], batch.block_tables.shape[1], query.stride(0),
        batch.block_tables.stride(0), cache.stride(0), cache.stride(1),
        LATENT=latent_dim, ROPE=rope, ROPE_BLOCK=max(16, triton.next_power_of_2(rope)), BLOCK_SIZE=cache.shape[1],
        SPLIT=splits > 1, BLOCK_M=config.block_m, BLOCK_N=config.block_n, MIN_TILES=MIN_TILES,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(tokens, num_heads)](
            partial, stats, None, out, 0, splits, out.stride(0), SINKS=False, HEAD_DIM=latent_dim,
            SPLITS=triton.next_power_of_2(splits), BLOCK_D=latent_dim, num_warps=4,
        )  # fmt: skip
    return out


def _splits(query: torch.Tensor, programs: int, max_seq_len: int, config: LaunchConfig) -> int:
    if mode.batch_invariant():
        return 1
    if config.splits:
        return config.splits
    wanted = 2 * multiprocessors(query.device) // programs
    return int(max(1, min(wanted, triton.cdiv(max_seq_len, config.block_n) // MIN_TILES, MAX_SPLITS)))
