"""Attention over a paged KV cache, and over plain packed sequences."""

from __future__ import annotations

import itertools

import torch
from torch.nn import functional

from octavo_kernels.batch import AttentionBatch, PagedKVCache

MAX_SCORES = 1 << 24  # attention scores held at once, for each call: 64 MiB in float32
MAX_GATHERED = 1 << 24  # key elements gathered at once for a group of decodes


def paged_attention(
    query: torch.Tensor,
    cache: PagedKVCache,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the step's new tokens over everything in their sequences' blocks.

    query: [T, num_heads, head_dim] -> [T, num_heads, head_dim]. num_heads is a multiple of num_kv_heads (GQA).
    sliding_window: a token sees itself and the window - 1 tokens before it; 0 sees all. soft_cap: scores become
    cap * tanh(score / cap); 0 leaves them. sinks: [num_heads] extra logits that take part in the softmax and
    attend to nothing (gpt-oss).
    """
    out = torch.empty_like(query)
    kv_elements = cache.key.shape[1] * cache.key.shape[3]
    per_group = max(1, MAX_GATHERED // max(1, batch.max_seq_len * kv_elements))
    for first in range(0, batch.num_decodes, per_group):
        group = slice(first, min(first + per_group, batch.num_decodes))
        out[group] = _decode(query[group], cache, batch, group, scale, sliding_window, soft_cap, sinks)
    starts, lengths = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    for seq in range(batch.num_decodes, batch.num_seqs):
        tokens = slice(starts[seq], starts[seq + 1])
        key, value = _gather(cache, batch.block_tables[seq : seq + 1], lengths[seq], query.dtype)
        out[tokens] = _prefill(query[tokens], key[0], value[0], scale, sliding_window, soft_cap, sinks)
    return out


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    causal: bool,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention inside each of several packed sequences, without a cache (encoders, embedding models).

    query: [T, num_heads, head_dim]; key, value: [T, num_kv_heads, head_dim]; cu_seqlens: [S + 1] int32 token offsets.
    causal=False lets every token see its whole sequence; the window then reaches to both sides.
    """
    out = torch.empty_like(query)
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        tokens = slice(start, end)
        k, v = key[tokens].transpose(0, 1), value[tokens].transpose(0, 1)
        out[tokens] = _prefill(query[tokens], k, v, scale, sliding_window, soft_cap, sinks, causal)
    return out


def _decode(
    query: torch.Tensor,
    cache: PagedKVCache,
    batch: AttentionBatch,
    group: slice,
    scale: float,
    sliding_window: int,
    soft_cap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One token for each sequence of the group: [n, num_heads, head_dim]; the heads that share a KV head are rows."""
    num, num_heads, head_dim = query.shape
    lengths = batch.seq_lens[group]
    longest = batch.max_seq_len if num > 1 else int(lengths.max())
    key, value = _gather(cache, batch.block_tables[group], longest, query.dtype)
    kv_heads = key.shape[1]
    place = torch.arange(longest, device=query.device)
    mask = place < lengths.unsqueeze(1)
    if sliding_window:
        mask &= place >= (lengths - sliding_window).unsqueeze(1)
    grouped = query.view(num, kv_heads, num_heads // kv_heads, head_dim)
    grouped_sinks = sinks.view(1, kv_heads, -1, 1) if sinks is not None else None
    return _attend(grouped, key, value, mask[:, None, None, :], scale, soft_cap, grouped_sinks).reshape_as(query)


def _prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    sliding_window: int,
    soft_cap: float,
    sinks: torch.Tensor | None,
    causal: bool = True,
) -> torch.Tensor:
    """The last n tokens of one sequence: [n, num_heads, head_dim] over key, value [num_kv_heads, length, head_dim]."""
    num, num_heads, _ = query.shape
    kv_heads, length, _ = key.shape
    repeat = num_heads // kv_heads
    key, value = (x.repeat_interleave(repeat, 0).unsqueeze(0) if repeat > 1 else x.unsqueeze(0) for x in (key, value))
    heads_first = query.transpose(0, 1).unsqueeze(0)
    all_sinks = sinks.view(1, -1, 1, 1) if sinks is not None else None
    rows = max(1, MAX_SCORES // (num_heads * length))
    parts = []
    for first in range(0, num, rows):
        last = min(first + rows, num)
        seen = _visible(length - num + first, last - first, length, sliding_window, causal, query.device)
        parts.append(_attend(heads_first[:, :, first:last], key, value, seen, scale, soft_cap, all_sinks))
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def _visible(
    first: int, num: int, length: int, sliding_window: int, causal: bool, device: torch.device
) -> torch.Tensor | None:
    """Which of `length` keys the queries at positions first .. first + num - 1 may see: [num, length], None for all."""
    if not causal and not sliding_window:
        return None
    distance = torch.arange(first, first + num, device=device).unsqueeze(1) - torch.arange(length, device=device)
    mask = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if sliding_window:
        mask &= (distance if causal else distance.abs()) < sliding_window
    return mask


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    soft_cap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax attention [batch, heads, rows, head_dim] with equal numbers of query and key heads."""
    if not soft_cap and sinks is None:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        extra = sinks.float().expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, extra), dim=-1).softmax(-1)[..., :-1]
    else:
        scores = scores.softmax(-1)
    return scores.to(value.dtype) @ value


def _gather(
    cache: PagedKVCache, block_tables: torch.Tensor, length: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the first `length` positions as [sequences, num_kv_heads, length, head_dim]."""
    blocks = block_tables[:, : -(-length // cache.block_size)].long()
    gathered = []
    for stored, scales in ((cache.key, cache.key_scale), (cache.value, cache.value_scale)):
        picked = stored[blocks]
        if scales is not None:
            picked = picked.to(torch.float32) * scales[blocks].unsqueeze(-1)
        picked = picked.to(dtype).transpose(1, 2).flatten(2, 3)
        gathered.append(picked[:, :, :length])
    return gathered[0], gathered[1]
