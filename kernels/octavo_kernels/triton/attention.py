"""Launching flash attention: decodes split over their keys, prefills by query blocks, shared prefixes once."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from octavo_kernels import ops
from octavo_kernels.batch import AttentionBatch, PagedKVCache
from octavo_kernels.triton import mode
from octavo_kernels.triton.environment import (
    FP8,
    FP8_MAX,
    INT8_MAX,
    LOG2E,
    NO_QUANT,
    multiprocessors,
    quantization_of,
    runs_here,
)
from octavo_kernels.triton.flash import flash_kernel, merge_kernel
from octavo_kernels.triton.tuning import LaunchConfig, launch_config
from octavo_kernels.triton.unpack import FP8_IN_BF16, FP8_IN_FP16

MAX_HEAD_DIM = 256
MAX_SPLITS = 128
MIN_TILES = 2  # a split of fewer key tiles costs more in merging than it gains
RESIDENT_WARPS = 12  # that a multiprocessor holds at a time: the registers of a decode allow no more
START_TILES = 3
SHORT_QUERY = 16  # up to this many new tokens a sequence is read like a decode (speculative verification)


@dataclass(frozen=True, slots=True)
class Problem:
    """What stays the same over the launches of one attention call."""

    query: torch.Tensor
    out: torch.Tensor
    cache: PagedKVCache
    block_tables: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    scale: float
    sliding_window: int
    soft_cap: float
    sinks: torch.Tensor | None
    paged: bool = True
    causal: bool = True

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]

    @property
    def head_dim(self) -> int:
        return self.query.shape[2]

    @property
    def num_kv_heads(self) -> int:
        return self.cache.key.shape[1]

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class Part:
    """The sequences and keys of one launch. first_token, num_tokens: the query tokens the sequences own."""

    first_seq: int
    num_seqs: int
    first_token: int
    num_tokens: int
    max_query_len: int
    max_seq_len: int
    min_key: int = 0

    @property
    def decode(self) -> bool:
        return self.max_query_len == 1


@dataclass(frozen=True, slots=True)
class Partials:
    """Where split launches leave their results: [T, heads, splits, head_dim] and (max, sum)."""

    values: torch.Tensor
    stats: torch.Tensor
    splits: int


def _supports(
    query: torch.Tensor,
    cache: PagedKVCache,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> bool:
    same_layout = cache.key.stride() == cache.value.stride() and cache.key.stride(-1) == 1
    if cache.key_scale is not None and (query.shape[-1] % 2 or not cache.key.is_contiguous()):
        return False  # 8-bit values are read in pairs
    return runs_here(query) and query.shape[-1] <= MAX_HEAD_DIM and query.stride(-1) == 1 and same_layout


@ops.paged_attention.register("triton", supports=_supports)
def paged_attention(
    query: torch.Tensor,
    cache: PagedKVCache,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One launch for the decodes (and one that merges their splits), one for the sequences with several new tokens.

    Bound by the bytes of the keys and values read for decodes, by 4 * head_dim operations for each visible pair and
    head for prefills. A sequence of length 0 (padding of a captured graph) gets zeros.
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    problem = Problem(
        query,
        out,
        cache,
        batch.block_tables,
        batch.query_start_loc,
        batch.seq_lens,
        scale,
        sliding_window,
        soft_cap,
        sinks,
    )
    decodes = batch.num_decodes
    if mode.batch_invariant():
        _run(problem, Part(0, batch.num_seqs, 0, batch.num_tokens, batch.max_query_len, batch.max_seq_len))
        return out
    if decodes:
        _run(problem, Part(0, decodes, 0, decodes, 1, batch.max_seq_len))
    if batch.num_seqs > decodes:
        rest = batch.num_tokens - decodes
        _run(problem, Part(decodes, batch.num_seqs - decodes, decodes, rest, batch.max_query_len, batch.max_seq_len))
    return out


def _supports_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    causal: bool,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> bool:
    same_layout = key.stride() == value.stride() and key.stride(-1) == 1 and query.stride(-1) == 1
    return runs_here(query) and query.shape[-1] <= MAX_HEAD_DIM and same_layout and query.shape[0] > 0


@ops.varlen_attention.register("triton", supports=_supports_varlen)
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
    """One launch over packed sequences."""
    tokens = query.shape[0]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    # Packed keys [T, heads, dim] seen as one block of T tokens, with the strides of the paged layout.
    packed = PagedKVCache(key.transpose(0, 1).unsqueeze(0), value.transpose(0, 1).unsqueeze(0))
    problem = Problem(
        query, out, packed, cu_seqlens.view(1, -1), cu_seqlens, cu_seqlens, scale, sliding_window, soft_cap, sinks,
        paged=False, causal=causal,
    )  # fmt: skip
    sequences = cu_seqlens.shape[0] - 1
    _run(problem, Part(0, sequences, 0, tokens, tokens, tokens), allow_split=False)
    return out


def _supports_cascade(
    query: torch.Tensor,
    cache: PagedKVCache,
    batch: AttentionBatch,
    num_common_blocks: int,
    scale: float,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> bool:
    return _supports(query, cache, batch, scale) and num_common_blocks > 0 and not mode.batch_invariant()


@ops.cascade_attention.register("triton", supports=_supports_cascade)
def cascade_attention(
    query: torch.Tensor,
    cache: PagedKVCache,
    batch: AttentionBatch,
    num_common_blocks: int,
    scale: float,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The shared blocks are read once for all tokens (as one long packed query), the rest for each sequence; the
    parts are merged by their softmax statistics (Hydragen, arXiv 2402.05099; FlashInfer's cascade)."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    shared = num_common_blocks * cache.block_size
    whole = torch.arange(2, dtype=torch.int32, device=query.device) * batch.num_tokens
    shared_len = torch.full((1,), shared, dtype=torch.int32, device=query.device)
    prefix = Problem(
        query, out, cache, batch.block_tables[:1], whole, shared_len, scale, 0, soft_cap, None, causal=False
    )
    suffix = Problem(
        query, out, cache, batch.block_tables, batch.query_start_loc, batch.seq_lens, scale, 0, soft_cap, None
    )
    tokens = batch.num_tokens
    first = Part(0, 1, 0, tokens, max(2, tokens), shared)
    second = Part(0, batch.num_seqs, 0, tokens, batch.max_query_len, batch.max_seq_len, min_key=shared)
    splits = [_splits(prefix, first, _config(prefix, first)), _splits(suffix, second, _config(suffix, second))]
    partials = _partials(query, sum(splits))
    _launch(prefix, first, _config(prefix, first), partials, 0, splits[0])
    _launch(suffix, second, _config(suffix, second), partials, splits[0], splits[1])
    _merge(query, out, sinks, partials, 0, tokens)
    return out


def _run(problem: Problem, part: Part, allow_split: bool = True) -> None:
    """Choose tiles and splits, launch, merge."""
    config = _config(problem, part)
    splits = _splits(problem, part, config) if allow_split and not mode.batch_invariant() else 1
    if splits == 1:
        _launch(problem, part, config, None, 0, 1)
        return
    partials = _partials(problem.query, splits)
    _launch(problem, part, config, partials, 0, splits)
    _merge(problem.query, problem.out, problem.sinks, partials, part.first_token, part.num_tokens)


def _config(problem: Problem, part: Part) -> LaunchConfig:
    device, head_dim, group = problem.query.device, problem.head_dim, problem.group
    bits = problem.cache.key.element_size() * 8
    rows = max(16, triton.next_power_of_2(group))
    if mode.batch_invariant():  # one shape of tile for every query length, so that a row is always summed alike
        return LaunchConfig(block_m=max(64, rows), block_n=32, num_warps=4, num_stages=2)
    key = f"d{head_dim}_g{group}_kv{bits}"
    if part.max_query_len <= SHORT_QUERY:
        rows = max(rows, min(128, triton.next_power_of_2(group * part.max_query_len)))
        default = _decode_default(head_dim, bits, rows)
        # Drafts to verify, and what a few sequences share, have more rows than a decode: measured apart.
        kernel = "paged_attention_decode" if part.decode else f"paged_attention_short_m{rows}"
        return launch_config(kernel, key, device, default)
    default = _prefill_default(head_dim, bits, rows)
    return launch_config("paged_attention_prefill", key, device, default)


def _decode_default(head_dim: int, bits: int, rows: int) -> LaunchConfig:
    """What was fastest on an H200. More rows than a decode has (verification) keep the deep pipeline."""
    if bits == 8:
        return LaunchConfig(block_m=rows, block_n=64, num_warps=2 if rows == 16 else 4, num_stages=5)
    if head_dim > 128 or bits == 32:
        return LaunchConfig(block_m=rows, block_n=32, num_warps=4, num_stages=2)
    if rows > 16:
        return LaunchConfig(block_m=rows, block_n=64, num_warps=4, num_stages=5)
    return LaunchConfig(block_m=rows, block_n=64, num_warps=8, num_stages=2)


def _prefill_default(head_dim: int, bits: int, rows: int) -> LaunchConfig:
    """What was fastest on an H200."""
    if bits == 32:
        return LaunchConfig(block_m=max(32, rows), block_n=32, num_warps=4, num_stages=2)
    if bits == 8:
        return LaunchConfig(block_m=max(64, rows), block_n=128, num_warps=4, num_stages=2)
    if head_dim > 128:
        return LaunchConfig(block_m=max(64, rows), block_n=32, num_warps=4, num_stages=2)
    return LaunchConfig(block_m=max(128, rows), block_n=64 if head_dim <= 64 else 128, num_warps=8, num_stages=2)


def _query_blocks(problem: Problem, part: Part, config: LaunchConfig) -> int:
    """Query blocks of a launch: exact for decodes, else an upper bound the host knows without asking the device."""
    if part.decode:
        return part.num_seqs
    return part.num_tokens // _block_q(problem, config) + part.num_seqs


def _block_q(problem: Problem, config: LaunchConfig) -> int:
    return config.block_m // problem.group


def _splits(problem: Problem, part: Part, config: LaunchConfig) -> int:
    """How many programs share the keys of a query block: the fewest that come within 5 % of the least time."""
    if config.splits:
        return config.splits
    visible = min(part.max_seq_len, problem.sliding_window or part.max_seq_len) - part.min_key
    tiles = triton.cdiv(max(1, visible), config.block_n)
    programs = _query_blocks(problem, part, config) * problem.num_kv_heads
    slots = max(2, RESIDENT_WARPS // config.num_warps) * multiprocessors(problem.query.device)
    return best_splits(programs, tiles, slots, MAX_SPLITS)


@functools.lru_cache(4096)
def best_splits(programs: int, tiles: int, slots: int, most: int) -> int:
    """Splits of `programs` that each fold `tiles` tiles, when `slots` run at a time. The time of a choice is counted in
    tiles: whole waves of programs, each with the tiles of a split and a start that costs as much as START_TILES."""
    times = {
        splits: triton.cdiv(programs * splits, slots) * (triton.cdiv(tiles, splits) + START_TILES)
        for splits in range(1, max(1, min(tiles // MIN_TILES, most)) + 1)
    }
    least = min(times.values())
    return next(splits for splits, time in times.items() if time <= 1.05 * least)


def _partials(query: torch.Tensor, splits: int) -> Partials:
    tokens, heads, head_dim = query.shape
    values = torch.empty((tokens, heads, splits, head_dim), dtype=torch.float32, device=query.device)
    stats = torch.empty((tokens, heads, splits, 2), dtype=torch.float32, device=query.device)
    return Partials(values, stats, splits)


def _launch(
    problem: Problem, part: Part, config: LaunchConfig, partials: Partials | None, split_offset: int, splits: int
) -> None:
    query, cache = problem.query, problem.cache
    key, value, key_scale = cache.key, cache.value, cache.key_scale
    quant = quantization_of(key.dtype) if key_scale is not None else NO_QUANT.value
    if quant != NO_QUANT.value:
        key, value = key.view(torch.int16), value.view(torch.int16)
    boosts = _boosts(quant, query.dtype)
    capped = problem.soft_cap > 0
    width = key.shape[3]
    grid = (_query_blocks(problem, part, config), problem.num_kv_heads, splits)
    flash_kernel[grid](
        query, problem.out, key, value, key_scale, cache.value_scale, problem.block_tables,
        problem.query_start_loc, problem.seq_lens, problem.sinks,
        partials.values if partials else None, partials.stats if partials else None,
        problem.scale * boosts.unscore / problem.soft_cap if capped else problem.scale * boosts.unscore * LOG2E.value,
        problem.soft_cap * LOG2E.value, problem.sliding_window, part.first_seq, part.num_seqs, key.shape[0],
        problem.block_tables.shape[1], part.min_key, partials.splits if partials else 1, split_offset,
        query.stride(0), query.stride(1), problem.out.stride(0), problem.block_tables.stride(0),
        key.stride(0), key.stride(1), key.stride(2),
        key_scale.stride(0) if key_scale is not None else 0, key_scale.stride(1) if key_scale is not None else 0,
        DECODE=part.decode and not mode.batch_invariant(), PAGED=problem.paged, CAUSAL=problem.causal,
        WINDOW=problem.sliding_window > 0, SOFT_CAP=capped,
        SINKS=problem.sinks is not None, SPLIT=partials is not None, QUANT=quant, QUERY_BOOST=boosts.query,
        WEIGHT_BOOST=boosts.weight, UNBOOST=boosts.unboost, GROUP=problem.group,
        HEAD_DIM=problem.head_dim, WIDTH=width, BLOCK_SIZE=cache.block_size if problem.paged else 1,
        BLOCK_M=config.block_m, BLOCK_Q=_block_q(problem, config), BLOCK_N=config.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(width)), MIN_TILES=MIN_TILES,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Boosts:
    """Factors that keep products with unpacked 8-bit values inside the range of their 16-bit type.

    query, weight: applied to queries and softmax weights. unscore, unboost: take them, and the scale of unpacked
    float8, out of scores and results again.
    """

    query: float = 1.0
    weight: float = 1.0
    unscore: float = 1.0
    unboost: float = 1.0


@functools.cache
def _boosts(quant: int, dtype: torch.dtype) -> _Boosts:
    if quant == NO_QUANT.value:
        return _Boosts()
    fp8 = quant == FP8.value
    if dtype == torch.bfloat16:  # wide in range: float8 in it is tiny, so its partners are made as large
        boost, unit = (2.0**100, FP8_IN_BF16) if fp8 else (1.0, 1.0)
        return _Boosts(boost, boost, unit / boost, unit / boost)
    limit, unit = (FP8_MAX.value, FP8_IN_FP16) if fp8 else (INT8_MAX.value, 1.0)  # float16 would lose small scales
    return _Boosts(1.0, limit, unit, unit / limit)


def _merge(
    query: torch.Tensor, out: torch.Tensor, sinks: torch.Tensor | None, partials: Partials, first: int, tokens: int
) -> None:
    head_dim = query.shape[2]
    merge_kernel[(tokens, query.shape[1])](
        partials.values, partials.stats, sinks, out, first, partials.splits, out.stride(0),
        SINKS=sinks is not None, HEAD_DIM=head_dim, SPLITS=triton.next_power_of_2(partials.splits),
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)), num_warps=4,
    )  # fmt: skip
