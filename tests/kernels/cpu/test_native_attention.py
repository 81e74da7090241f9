"""Paged attention on the native kernels equals the reference on fresh random batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo_kernels import ops
from octavo_kernels.batch import AttentionBatch, PagedKVCache
from octavo_kernels.cpu.bindings import NativeError
from octavo_kernels.reference.kv_cache import quantize_kv
from octavo_kernels.registry import use_backends

KV_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def random_cache(blocks: int, kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> PagedKVCache:
    key, value = (torch.randn(blocks, kv_heads, block_size, head_dim) for _ in range(2))
    if dtype != torch.int8:
        return PagedKVCache(key.to(dtype), value.to(dtype))
    codes, scales = zip(*(quantize_kv(x.flatten(0, 1), dtype) for x in (key, value)), strict=True)
    shape = (blocks, kv_heads, block_size)
    return PagedKVCache(*(c.view_as(key) for c in codes), *(s.view(shape).contiguous() for s in scales))


def random_batch(lengths: list[int], queries: list[int], block_size: int, spare: int = 2) -> tuple[AttentionBatch, int]:
    """Sequences of these lengths whose last `queries` tokens are new, on shuffled blocks; also the number of blocks."""
    widest = max(-(-length // block_size) for length in lengths)
    blocks = len(lengths) * widest + spare
    tables = torch.randperm(blocks)[: len(lengths) * widest].view(len(lengths), widest).to(torch.int32)
    starts = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32)
    positions = torch.cat([torch.arange(n - q, n) for n, q in zip(lengths, queries, strict=True)])
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(queries))
    slots = tables[rows, positions // block_size].long() * block_size + positions % block_size
    batch = AttentionBatch(
        positions=positions,
        slot_mapping=slots,
        query_start_loc=starts,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_tables=tables,
        num_decodes=sum(1 for _ in itertools.takewhile(lambda q: q == 1, queries)),
        max_query_len=max(queries),
        max_seq_len=max(lengths),
    )
    return batch, blocks


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), seed=st.integers(0, 2**20))
@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
def test_attention_matches_the_reference(isa: str, dtype: torch.dtype, data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (3, 3), (2, 8), (1, 5)]))
    head_dim = data.draw(st.sampled_from([16, 64, 96, 128]))
    block_size = data.draw(st.sampled_from([1, 5, 16, 32]))
    decodes = data.draw(st.lists(st.integers(1, 400), max_size=4))
    prefills = data.draw(st.lists(st.tuples(st.integers(2, 90), st.integers(0, 150)), max_size=2))
    if not decodes and not prefills:
        decodes = [7]
    lengths = [*decodes, *(new + cached for new, cached in prefills)]
    batch, blocks = random_batch(lengths, [1] * len(decodes) + [new for new, _ in prefills], block_size)
    cache = random_cache(blocks, kv_heads, block_size, head_dim, dtype)
    query = torch.randn(batch.num_tokens, kv_heads * group, head_dim)
    window = data.draw(st.sampled_from([0, 1, 33]))
    cap = data.draw(st.sampled_from([0.0, 15.0]))
    sinks = torch.randn(kv_heads * group) if data.draw(st.booleans()) else None

    native = ops.paged_attention(query, cache, batch, head_dim**-0.5, window, cap, sinks)
    with use_backends("reference"):
        expected = ops.paged_attention(query, cache, batch, head_dim**-0.5, window, cap, sinks)

    torch.testing.assert_close(native, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
def test_a_long_decode_is_split_over_keys_and_joined_again(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    batch, blocks = random_batch([1500], [1], 16)
    cache = random_cache(blocks, 3, 16, 64, dtype)
    query = torch.randn(1, 9, 64)
    native = ops.paged_attention(query, cache, batch, 0.125)
    with use_backends("reference"):
        expected = ops.paged_attention(query, cache, batch, 0.125)
    torch.testing.assert_close(native, expected, rtol=2e-5, atol=2e-5)


def test_large_scores_do_not_overflow(isa: str) -> None:
    torch.manual_seed(4)
    batch, blocks = random_batch([40], [1], 16)
    cache = random_cache(blocks, 1, 16, 16, torch.float32)
    query = 1e4 * torch.randn(1, 2, 16)
    native = ops.paged_attention(query, cache, batch, 1.0)
    with use_backends("reference"):
        expected = ops.paged_attention(query, cache, batch, 1.0)
    torch.testing.assert_close(native, expected, rtol=1e-4, atol=1e-4)


def test_a_block_table_that_points_outside_the_cache_is_refused(isa: str) -> None:
    batch, blocks = random_batch([20], [1], 16)
    cache = random_cache(blocks, 1, 16, 16, torch.float32)
    batch.block_tables[0, 1] = blocks
    with pytest.raises(NativeError, match=f"block 1 of sequence 0 is {blocks}"):
        ops.paged_attention(torch.randn(1, 1, 16), cache, batch, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_a_bfloat16_model_may_multiply_in_bfloat16(isa: str, dtype: torch.dtype) -> None:
    """Prefill over a bfloat16 or int8 cache: as close as rounding the operands to 8 bits of mantissa allows."""
    torch.manual_seed(5)
    batch, blocks = random_batch([9, 150, 130], [1, 150, 77], 16)
    cache = random_cache(blocks, 3, 16, 64, dtype)
    query = torch.randn(batch.num_tokens, 9, 64).bfloat16()
    native = ops.paged_attention(query, cache, batch, 0.125)
    with use_backends("reference"):
        expected = ops.paged_attention(query.float(), cache, batch, 0.125)
    torch.testing.assert_close(native.float(), expected, rtol=2e-2, atol=2e-2)
