"""The one flash-attention kernel: paged or packed keys, any query length, optionally split over the keys.

Rows of a tile are the query heads that share a key-value head (GQA), for one or more consecutive tokens of a
sequence. Online softmax after Milakov and Gimelshein (arXiv 1805.02867) and FlashAttention-2 (arXiv 2307.08691);
split over keys with a merging pass as in flash-decoding (Stanford CRFM, 2023); blocks as in PagedAttention
(arXiv 2309.06180); sequences of a flat batch are found by bisection, so that one launch serves any mixture.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo_kernels.triton.environment import LOG2E, NO_QUANT, dot, tanh
from octavo_kernels.triton.unpack import bytes_of


@triton.jit
def find_sequence(query_start_ptr, first_seq, num_seqs, block, BLOCK_Q: tl.constexpr):
    """The sequence that owns query block `block`, and the block's number inside it. Sequence s starts at block
    (query_start[s] - query_start[first]) // BLOCK_Q + s - first: an upper bound that needs no prefix sum."""
    base = tl.load(query_start_ptr + first_seq)
    low = first_seq
    high = first_seq + num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        start = (tl.load(query_start_ptr + middle) - base) // BLOCK_Q + middle - first_seq
        if start <= block:
            low = middle
        else:
            high = middle
    first_block = (tl.load(query_start_ptr + low) - base) // BLOCK_Q + low - first_seq
    return low, block - first_block


@triton.jit
def key_offsets(
    table_ptr, n, inside, num_blocks, kv_start_token, block_stride, offset_stride,
    PAGED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Where the keys at positions n begin. Whatever a block table holds, no address leaves the cache."""
    if PAGED:
        block = tl.load(table_ptr + n // BLOCK_SIZE, mask=inside, other=0)
        block = tl.minimum(tl.maximum(block, 0), num_blocks - 1).to(tl.int64)
        return block * block_stride + (n % BLOCK_SIZE) * offset_stride
    return (kv_start_token + n).to(tl.int64) * offset_stride


@triton.jit
def scale_offsets(table_ptr, n, inside, num_blocks, scale_block_stride, BLOCK_SIZE: tl.constexpr):
    block = tl.load(table_ptr + n // BLOCK_SIZE, mask=inside, other=0)
    block = tl.minimum(tl.maximum(block, 0), num_blocks - 1).to(tl.int64)
    return block * scale_block_stride + n % BLOCK_SIZE


@triton.jit
def attend_tile(
    q, q_odd, row_max, row_sum, acc, acc_odd, start, min_key, end, positions,
    key_ptr, value_ptr, key_scale_ptr, value_scale_ptr, table_ptr, kv_start_token, num_blocks,
    block_stride, offset_stride, scale_block_stride, scale, soft_cap, sliding_window,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, QUANT: tl.constexpr,
    WEIGHT_BOOST: tl.constexpr, PAGED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fold keys start .. start + BLOCK_N - 1 (those in min_key .. end - 1) into the softmax. MASKED=False promises
    that every row may see every key of the tile. Scores are counted in powers of two: `scale` includes log2(e), or
    with SOFT_CAP divides by the cap, and `soft_cap` includes log2(e). With QUANT a stored element is a pair of
    8-bit values: its low byte meets q, its high byte q_odd."""
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = (n >= min_key) & (n < end)
    offsets = key_offsets(
        table_ptr, n, inside, num_blocks, kv_start_token, block_stride, offset_stride, PAGED, BLOCK_SIZE
    )
    if WIDTH == BLOCK_D and not MASKED:
        k = tl.load(key_ptr + offsets[None, :] + d[:, None])
        v = tl.load(value_ptr + offsets[:, None] + d[None, :])
    else:
        k = tl.load(key_ptr + offsets[None, :] + d[:, None], mask=inside[None, :] & (d < WIDTH)[:, None], other=0)
        v = tl.load(value_ptr + offsets[:, None] + d[None, :], mask=inside[:, None] & (d < WIDTH)[None, :], other=0)
    scores = tl.zeros((q.shape[0], BLOCK_N), tl.float32)
    if QUANT == NO_QUANT:
        scores = dot(q, k.to(q.dtype), scores)
        step = scale
    else:
        places = scale_offsets(table_ptr, n, inside, num_blocks, scale_block_stride, BLOCK_SIZE)
        scores = dot(q, bytes_of(k, False, QUANT, q.dtype), scores)
        scores = dot(q_odd, bytes_of(k, True, QUANT, q.dtype), scores)
        scores *= (tl.load(key_scale_ptr + places, mask=inside, other=0.0) * scale)[None, :]
        step = 1.0
    if SOFT_CAP:
        scores = soft_cap * tanh(scores * step)
        step = 1.0
    if MASKED:
        distance = positions[:, None] - n[None, :]
        seen = tl.broadcast_to(inside[None, :], scores.shape)
        if CAUSAL:
            seen = seen & (distance >= 0)
        if WINDOW:
            seen = seen & (distance < sliding_window)
            if not CAUSAL:
                seen = seen & (distance > -sliding_window)
        scores = tl.where(seen, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * step)
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
    weights = tl.exp2(scores * step - safe_max[:, None])
    shrink = tl.exp2(row_max - safe_max)
    row_sum = row_sum * shrink + tl.sum(weights, axis=1)
    if QUANT == NO_QUANT:
        acc = dot(weights.to(q.dtype), v.to(q.dtype), acc * shrink[:, None])
    else:
        weights *= (tl.load(value_scale_ptr + places, mask=inside, other=0.0) * WEIGHT_BOOST)[None, :]
        acc = dot(weights.to(q.dtype), bytes_of(v, False, QUANT, q.dtype), acc * shrink[:, None])
        acc_odd = dot(weights.to(q.dtype), bytes_of(v, True, QUANT, q.dtype), acc_odd * shrink[:, None])
    return new_max, row_sum, acc, acc_odd


@triton.jit(
    do_not_specialize=[
        "sliding_window",
        "first_seq",
        "num_seqs",
        "num_blocks",
        "table_width",
        "min_key",
        "total_splits",
        "split_offset",
        "table_stride",
    ]
)
def flash_kernel(
    q_ptr, out_ptr, key_ptr, value_ptr, key_scale_ptr, value_scale_ptr, tables_ptr, query_start_ptr, seq_lens_ptr,
    sinks_ptr, partial_ptr, partial_stats_ptr,
    scale, soft_cap, sliding_window, first_seq, num_seqs, num_blocks, table_width, min_key, total_splits, split_offset,
    q_stride, q_head_stride, out_stride, table_stride, block_stride, kv_head_stride, offset_stride,
    scale_block_stride, scale_head_stride,
    DECODE: tl.constexpr, PAGED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    SINKS: tl.constexpr, SPLIT: tl.constexpr, QUANT: tl.constexpr, QUERY_BOOST: tl.constexpr,
    WEIGHT_BOOST: tl.constexpr, UNBOOST: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MIN_TILES: tl.constexpr,
):  # fmt: skip
    """Grid: (query blocks, key-value heads, splits). Keys before `min_key` are left out (cascade).

    DECODE: query block b is the one token of sequence first_seq + b. SPLIT: write unnormalised partial results
    [tokens, heads, total_splits, HEAD_DIM] with their (max, sum), to be merged by `merge_kernel`. WIDTH: stored
    elements of a key, HEAD_DIM or (QUANT, pairs) half of it. QUERY_BOOST, WEIGHT_BOOST: what queries and softmax
    weights are multiplied by to keep products with unpacked values in range; UNBOOST takes it out of the result.
    """
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    rows = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    if DECODE:
        seq = first_seq + tl.program_id(0)
        first_row = 0
    else:  # the blocks with the most keys first
        seq, local = find_sequence(
            query_start_ptr, first_seq, num_seqs, tl.num_programs(0) - 1 - tl.program_id(0), BLOCK_Q
        )
        first_row = local * BLOCK_Q
    query_start = tl.load(query_start_ptr + seq)
    query_len = tl.load(query_start_ptr + seq + 1) - query_start
    if first_row >= query_len:
        return
    if PAGED:
        seq_len = tl.minimum(tl.load(seq_lens_ptr + seq), table_width * BLOCK_SIZE)
        kv_start_token = 0
    else:
        seq_len = query_len
        kv_start_token = query_start
    token_in_block = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    valid = (token_in_block < BLOCK_Q) & (first_row + token_in_block < query_len)
    token = (query_start + first_row + token_in_block).to(tl.int64)
    if CAUSAL:
        positions = seq_len - query_len + first_row + token_in_block
        first_position = seq_len - query_len + first_row
        end = tl.minimum(seq_len, first_position + BLOCK_Q)
    else:
        positions = first_row + token_in_block
        first_position = first_row
        end = seq_len
    start = min_key
    if WINDOW:
        start = tl.maximum(start, first_position - sliding_window + 1)
        if not CAUSAL:
            end = tl.minimum(end, first_position + BLOCK_Q + sliding_window - 1)
    first_tile = tl.maximum(start, 0) // BLOCK_N
    last_tile = tl.cdiv(tl.maximum(end, 0), BLOCK_N)
    if SPLIT:
        tiles = tl.maximum(tl.cdiv(last_tile - first_tile, tl.num_programs(2)), MIN_TILES)
        first_tile = first_tile + split * tiles
        last_tile = tl.minimum(last_tile, first_tile + tiles)

    mask = valid[:, None] & (d < WIDTH)[None, :]
    q_rows = q_ptr + token[:, None] * q_stride + head[:, None] * q_head_stride
    if QUANT == NO_QUANT:
        q = tl.load(q_rows + d[None, :], mask=mask, other=0.0)
        q_odd = q
    else:
        q = tl.load(q_rows + 2 * d[None, :], mask=mask, other=0.0)
        q_odd = tl.load(q_rows + 2 * d[None, :] + 1, mask=mask, other=0.0)
        q_odd = (q_odd.to(tl.float32) * QUERY_BOOST).to(q.dtype)
        q = (q.to(tl.float32) * QUERY_BOOST).to(q.dtype)
    table = tables_ptr + seq.to(tl.int64) * table_stride
    key_base = key_ptr + kv_head.to(tl.int64) * kv_head_stride
    value_base = value_ptr + kv_head.to(tl.int64) * kv_head_stride
    if QUANT == NO_QUANT:
        key_scale_base = key_scale_ptr
        value_scale_base = value_scale_ptr
    else:
        key_scale_base = key_scale_ptr + kv_head * scale_head_stride
        value_scale_base = value_scale_ptr + kv_head * scale_head_stride
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    acc_odd = acc
    masked_from = first_tile
    if not WINDOW and not DECODE:  # tiles that every row sees in full need no mask
        visible = first_position + 1 if CAUSAL else end
        whole = tl.where(first_tile * BLOCK_N >= min_key, tl.minimum(visible, end) // BLOCK_N, first_tile)
        masked_from = tl.maximum(first_tile, tl.minimum(last_tile, whole))
        for tile in range(first_tile, masked_from):
            row_max, row_sum, acc, acc_odd = attend_tile(
                q, q_odd, row_max, row_sum, acc, acc_odd, tile * BLOCK_N, min_key, end, positions, key_base,
                value_base, key_scale_base, value_scale_base, table, kv_start_token, num_blocks, block_stride,
                offset_stride, scale_block_stride, scale, soft_cap, sliding_window, False, CAUSAL,
                WINDOW, SOFT_CAP, QUANT, WEIGHT_BOOST, PAGED, BLOCK_SIZE, BLOCK_N, WIDTH, BLOCK_D,
            )  # fmt: skip
    for tile in range(masked_from, last_tile):
        row_max, row_sum, acc, acc_odd = attend_tile(
            q, q_odd, row_max, row_sum, acc, acc_odd, tile * BLOCK_N, min_key, end, positions, key_base,
            value_base, key_scale_base, value_scale_base, table, kv_start_token, num_blocks, block_stride,
            offset_stride, scale_block_stride, scale, soft_cap, sliding_window, True, CAUSAL,
            WINDOW, SOFT_CAP, QUANT, WEIGHT_BOOST, PAGED, BLOCK_SIZE, BLOCK_N, WIDTH, BLOCK_D,
        )  # fmt: skip
    if QUANT != NO_QUANT:
        acc = tl.interleave(acc, acc_odd) * UNBOOST
        d = tl.arange(0, 2 * BLOCK_D)
        mask = valid[:, None] & (d < HEAD_DIM)[None, :]
    if SPLIT:
        num_heads = tl.num_programs(1) * GROUP
        place = (token * num_heads + head) * total_splits + split_offset + split
        tl.store(partial_stats_ptr + place * 2, row_max, mask=valid)
        tl.store(partial_stats_ptr + place * 2 + 1, row_sum, mask=valid)
        if first_tile < last_tile:
            tl.store(partial_ptr + place[:, None] * HEAD_DIM + d[None, :], acc, mask=mask)
    else:
        if SINKS:
            sink = tl.load(sinks_ptr + head, mask=valid, other=0.0).to(tl.float32) * LOG2E
            final_max = tl.maximum(row_max, sink)
            shrink = tl.exp2(row_max - final_max)
            row_sum = row_sum * shrink + tl.exp2(sink - final_max)
            acc = acc * shrink[:, None]
        acc = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
        place = token[:, None] * out_stride + head[:, None] * HEAD_DIM + d[None, :]
        tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_token", "splits"])
def merge_kernel(
    partial_ptr, partial_stats_ptr, sinks_ptr, out_ptr, first_token, splits, out_stride,
    SINKS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of one token and head; a split without keys has max = -inf. Grid: (tokens, heads)."""
    token = (first_token + tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1)
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_D)
    place = (token * tl.num_programs(1) + head) * splits + s
    maxima = tl.load(partial_stats_ptr + place * 2, mask=s < splits, other=float("-inf"))
    used = maxima > float("-inf")
    sums = tl.load(partial_stats_ptr + place * 2 + 1, mask=used, other=0.0)
    partial = tl.load(
        partial_ptr + place[:, None] * HEAD_DIM + d[None, :], mask=used[:, None] & (d < HEAD_DIM)[None, :], other=0.0
    )
    total_max = tl.max(maxima, axis=0)
    total = 0.0
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        total_max = tl.maximum(total_max, sink)
        total = tl.exp2(sink - total_max)
    total_max = tl.where(total_max == float("-inf"), 0.0, total_max)
    weight = tl.where(used, tl.exp2(maxima - total_max), 0.0)
    total += tl.sum(sums * weight, axis=0)
    merged = tl.sum(partial * weight[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + token * out_stride + head * HEAD_DIM + d, merged.to(out_ptr.dtype.element_ty), d < HEAD_DIM)
